"""What is measured: a function, its inputs, and what the work amounts to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to measure."""

    name: str  # the operation or program, sizes, dtype: "matmul 1x1536x576 float32"
    function: Callable[..., Any]  # pure; it is compiled here
    inputs: Callable[[], tuple]  # makes the arguments, so that they live while they are needed
    flops: float
    bytes: float | None = None  # that must move; None: all arguments and the outcome, once
    dtype: str = "float32"  # of the products: whose roof counts
    operation: str | None = None  # of `kernels.FORMS`; None for a program made of several
    expected: Callable[..., Any] | None = None  # the right result in float64, of the same arguments
    select_output: Callable[[Any], Any] = lambda out: out  # which part of the outcome that is
    cold_argnums: tuple[int, ...] = ()  # arguments that come from memory, not from a cache
    reuse_distance: float = 0.0  # bytes that pass between two uses of the cold arguments
    donate_argnums: tuple[int, ...] = ()
    next_inputs: Callable[[tuple, Any], tuple] | None = (
        None  # arguments after a call that donated some
    )


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A case with the forms to take in it."""

    case: Case
    impl: str = "chosen"  # what to call it
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)  # operation: form


def in_float64(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """The same function with every float of its arguments in float64: what a form is held to.

    The function must name no precision of its own, as references of `kernels` don't.
    """

    def run(*inputs: Any) -> np.ndarray:
        def widen(leaf: Any) -> Any:
            is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
            return np.asarray(leaf).astype(np.float64) if is_float else np.asarray(leaf)

        with jax.enable_x64(True):
            out = jax.jit(function)(*jax.tree.map(widen, inputs))
            if any(leaf.dtype != jnp.float64 for leaf in jax.tree.leaves(out)):
                raise TypeError("the reference fell back to a narrower type than float64")
            return np.asarray(out)

    return run
