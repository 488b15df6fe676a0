"""The table of forms: which there are, which one is taken, and how to take another.

It imports no form. Each form enters itself with `@register`, when `kernels` imports its module.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax

Implementation = Callable[..., jax.Array]
_F = TypeVar("_F", bound=Implementation)

# Operation, name of the form, function. The first form is the reference.
IMPLS: dict[str, dict[str, Implementation]] = {}

MANY_ROWS = (
    128  # rows of a product from which on it counts how fast one multiplies, not how one reads
)

# What is taken when `impl` is None. The best product depends on the weight's dtype and on the rows.
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
        "norm": "sum_by_matmul",
        "rotate": "halves",
        "attend": "blockwise",
        "attend_cached": "blockwise",
        "gated_mlp": "unfused",
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
        "norm": "sum_by_matmul",
        "rotate": "halves",
        "attend": "reference",
        "attend_cached": "blockwise",
        "gated_mlp": "unfused",
        "truncate": "bisection",
    },
}

_overrides: dict[str, str] = {}  # operation: form, inside `trying`


class Unavailable(ValueError):
    """A form that cannot run here, or not with these arguments. The message says why."""


def register(operation: str) -> Callable[[_F], _F]:
    """Enter a function in `FORMS[operation]` under its own name, and return it as it is.

    Raises:
        ValueError: the operation has a form of this name.
    """

    def enter(form: _F) -> _F:
        forms = IMPLS.setdefault(operation, {})
        if forms.setdefault(form.__name__, form) is not form:
            raise ValueError(f"{operation} has a form {form.__name__!r} already")
        return form

    return enter


@contextlib.contextmanager
def override(**forms: str) -> Iterator[None]:
    """Takes other forms where `impl` is None: `with trying(norm="reference"): ...`.

    For experiments, not for a server: it holds for the whole process, and makes JAX forget its
    compiled programs at both ends, so that none keeps what it was traced with.

    Raises:
        ValueError: no such operation or form.
    """
    global _overrides
    before = _overrides
    for operation, form in forms.items():
        get_impl(operation, form)
    _overrides = {**before, **forms}
    jax.clear_caches()
    try:
        yield
    finally:
        _overrides = before
        jax.clear_caches()


def get_impl(operation: str, form: str) -> Implementation:
    """The function behind a name.

    Args:
        form: a form of `FORMS[operation]`, or "package.module.function".

    Raises:
        ValueError: there is none.
    """
    if operation not in IMPLS:
        raise ValueError(f"operation must be one of {', '.join(IMPLS)}, got {operation!r}")
    if form in IMPLS[operation]:
        return IMPLS[operation][form]
    if "." not in form:
        known = ", ".join(IMPLS[operation])
        raise ValueError(
            f"{operation} has the forms {known}, got {form!r} (another is named "
            "'package.module.function')"
        )
    module, _, name = form.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{operation} {form!r} cannot be found: {error}") from error


def select_impl(kind: str) -> str:
    """The form that a line of `CHOSEN` names for this platform, or that is being tried.

    Args:
        kind: an operation; for products "matmul DTYPE", "matmul DTYPE, one row" or "matmul DTYPE,
            many rows".
    """
    operation = kind.partition(" ")[0]
    if operation in _overrides:
        return _overrides[operation]
    platform = jax.default_backend()
    table = DEFAULT_IMPL.get(platform, DEFAULT_IMPL["default"])
    if kind not in table:
        raise Unavailable(f"there is no form for {kind!r} on {platform}: {', '.join(table)}")
    return table[kind]
