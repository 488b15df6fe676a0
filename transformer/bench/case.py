"""Benchmark cases: a function, its inputs, and the cost of its work."""

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
    """A function to measure, with its inputs, its cost and a reference result."""

    name: str  # operation or program, sizes, dtype: "matmul 1x1536x576 float32"
    function: Callable[..., Any]  # a pure function, which the benchmark compiles
    inputs: Callable[[], tuple]  # returns the arguments; called when the case is measured
    flops: float
    bytes: float | None = None  # that must be moved; None: the size of all arguments and results
    dtype: str = "float32"  # of matrix products; selects the peak FLOP/s of the roofline
    operation: str | None = None  # a key of `kernels.IMPLS`; None for a whole program
    expected: Callable[..., Any] | None = None  # float64 reference result for the same arguments
    select_output: Callable[[Any], Any] = lambda out: out  # the part of the result to compare
    cold_argnums: tuple[int, ...] = ()  # arguments that are read from memory, not from a CPU cache
    reuse_distance: float = 0.0  # bytes a model reads between two uses of the cold arguments
    donate_argnums: tuple[int, ...] = ()
    # For cases that donate arguments: maps (arguments, result) to the arguments of the next call.
    next_inputs: Callable[[tuple, Any], tuple] | None = None


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A case, and the implementations to measure it with; a run compares several contenders."""

    case: Case
    impl: str = "chosen"  # label in results; "chosen" means the default implementations
    # Implementations in place of the defaults: operation -> implementation.
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)


def in_float64(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """Return a function that converts all float arguments to float64 and calls `function`.

    Args:
        function: A function of pytrees of arrays that returns one array. It must not set a dtype or
            precision itself; the reference implementations of `kernels` do not.

    Returns:
        A function of the same arguments, which raises TypeError if the result is not float64.
    """

    def run(*inputs: Any) -> np.ndarray:
        def widen(leaf: Any) -> Any:
            is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
            return np.asarray(leaf).astype(np.float64) if is_float else np.asarray(leaf)

        with jax.enable_x64(True):
            out = jax.jit(function)(*jax.tree.map(widen, inputs))
            if any(leaf.dtype != jnp.float64 for leaf in jax.tree.leaves(out)):
                raise TypeError("the reference must return float64, but it returned another dtype")
            return np.asarray(out)

    return run
