"""The registry of implementations, the defaults per platform, and how to override them.

This module imports no implementation. Each one registers itself with `@register` when `kernels`
imports its module.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

Implementation = Callable[..., Any]
_F = TypeVar("_F", bound=Implementation)

# Operation -> name of the implementation -> function. The first implementation is the reference.
IMPLS: dict[str, dict[str, Implementation]] = {}

# Number of rows from which a product is limited by arithmetic rather than by reading the weight.
MANY_ROWS = 128

# The implementations used when `impl` is None. The best product depends on the dtype of the weight
# and on the number of rows.
DEFAULT_IMPL: dict[str, dict[str, str]] = {
    "cpu": {
        "matmul float32": "batched",
        "matmul float32, one row": "split_weight",
        "matmul float32, many rows": "dot",
        "matmul bfloat16": "batched",
        "matmul bfloat16, one row": "pad_to_two_rows",
        "matmul bfloat16, many rows": "dot",
        "matmul int8": "int8",
        "matmul int8, one row": "int8",
        "matmul int8, many rows": "int8",
        "matmul blocks": "native",
        "decode_layers": "native",
        "norm": "sum_by_matmul",
        "rotate": "halves",
        "attend": "blockwise",
        "attend_cached": "blockwise",
        "gated_mlp": "unfused",
        "experts": "sorted_blocks",
        "truncate": "bisection",
    },
    "default": {
        "matmul float32": "dot",
        "matmul float32, one row": "dot",
        "matmul float32, many rows": "dot",
        "matmul bfloat16": "dot",
        "matmul bfloat16, one row": "pad_to_two_rows",
        "matmul bfloat16, many rows": "dot",
        "matmul int8": "int8",
        "matmul int8, one row": "int8",
        "matmul int8, many rows": "int8",
        "matmul blocks": "dequantized",
        "decode_layers": "reference",
        "norm": "sum_by_matmul",
        "rotate": "halves",
        "attend": "reference",
        "attend_cached": "blockwise",
        "gated_mlp": "unfused",
        "experts": "sorted_blocks",
        "truncate": "bisection",
    },
}

# Numba compiles the kernels of `transformer.native`; without it, XLA computes everything.
HAS_NUMBA = importlib.util.find_spec("numba") is not None
if not HAS_NUMBA:
    for _kind in ("matmul blocks", "decode_layers"):
        DEFAULT_IMPL["cpu"][_kind] = DEFAULT_IMPL["default"][_kind]

_overrides: dict[str, str] = {}  # operation -> implementation, inside `override`


class Unavailable(ValueError):
    """Raised when an implementation does not support the platform or the arguments."""


def register(operation: str, name: str | None = None) -> Callable[[_F], _F]:
    """Return a decorator that registers a function in `IMPLS[operation]`.

    Args:
        operation: Name of the operation.
        name: Name of the implementation; None means that of the function.

    Raises:
        ValueError: The operation has another implementation of this name.
    """

    def add(function: _F) -> _F:
        impls = IMPLS.setdefault(operation, {})
        impl = name or function.__name__
        if impls.setdefault(impl, function) is not function:
            raise ValueError(f"{operation} already has an implementation {impl!r}")
        return function

    return add


@contextlib.contextmanager
def override(**impls: str) -> Iterator[None]:
    """Override default implementations in a `with` block.

    For example `with override(norm="reference"): ...`. This is for experiments, not for servers: it
    affects the whole process, and it clears JAX's caches on entry and exit, so that no compiled
    program keeps another implementation.

    Args:
        **impls: Implementation of each operation to override.

    Raises:
        ValueError: An operation or implementation does not exist.
    """
    global _overrides
    previous = _overrides
    for operation, impl in impls.items():
        get_impl(operation, impl)
    _overrides = {**previous, **impls}
    jax.clear_caches()
    try:
        yield
    finally:
        _overrides = previous
        jax.clear_caches()


def get_impl(operation: str, impl: str) -> Implementation:
    """Return an implementation by its name.

    Args:
        operation: Name of the operation.
        impl: Name in `IMPLS[operation]`, or "package.module.function".

    Returns:
        The function.

    Raises:
        ValueError: The operation or the implementation does not exist.
    """
    if operation not in IMPLS:
        raise ValueError(f"operation must be one of {', '.join(IMPLS)}, got {operation!r}")
    if impl in IMPLS[operation]:
        return IMPLS[operation][impl]
    if "." not in impl:
        known = ", ".join(IMPLS[operation])
        raise ValueError(
            f"the implementation of {operation} must be one of {known} or "
            f"'package.module.function', got {impl!r}"
        )
    module, _, name = impl.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import {impl!r} for {operation}: {error}") from error


def native_module(name: str) -> Any:
    """Return a module of `transformer.native`, imported and compiled when it is needed.

    Raises:
        Unavailable: Numba is not installed, or the platform is not the CPU.
    """
    if not HAS_NUMBA:
        raise Unavailable("native kernels need Numba: pip install numba")
    if jax.default_backend() != "cpu":
        raise Unavailable(f"native kernels are for the CPU, got {jax.default_backend()}")
    return importlib.import_module(f"transformer.native.{name}")


def select_impl(kind: str) -> str:
    """Return the name of the default implementation on this platform, or of its override.

    Args:
        kind: An operation, or for products "matmul DTYPE", "matmul DTYPE, one row" or "matmul
            DTYPE, many rows".

    Returns:
        The name of the implementation.

    Raises:
        Unavailable: `DEFAULT_IMPL` has no entry for `kind` on this platform.
    """
    operation = kind.partition(" ")[0]
    if operation in _overrides:
        return _overrides[operation]
    platform = jax.default_backend()
    defaults = DEFAULT_IMPL.get(platform, DEFAULT_IMPL["default"])
    if kind not in defaults:
        raise Unavailable(
            f"no implementation for {kind!r} on {platform}; there are {', '.join(defaults)}"
        )
    return defaults[kind]
