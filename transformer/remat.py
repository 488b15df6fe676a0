"""Computing again instead of remembering (Chen et al. 2016, arXiv:1604.06174).

To differentiate a function one needs what it computed on the way. `recompute` keeps its arguments
only, and computes the rest again when the gradient is wanted: more arithmetic, less memory.

`jax.checkpoint` means the same, and keeps its word on accelerators. XLA's CPU backend drops the
barriers it relies on before it decides what is computed when, and then computes everything "again"
early, beside the first time: a decoder of eight layers needed 685 MB instead of 735. Here the
second time truly depends on the gradient that comes in, and so cannot begin before there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def recompute(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, of which nothing but the arguments is remembered.

    Args:
        function: from trees of arrays to a tree of arrays; it may not close over an array that is
            differentiated.
    """

    def call(*arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)

        def flat(*leaves: jax.Array) -> Any:
            return function(*jax.tree.unflatten(structure, leaves))

        @jax.custom_vjp
        def forward(*leaves: jax.Array) -> Any:
            return flat(*leaves)

        def keep(*leaves: Any) -> tuple[Any, tuple[tuple, tuple]]:
            # Which arguments are differentiated is known by which of the two places they stand in.
            values = [leaf.value for leaf in leaves]
            varied = tuple(leaf.value if leaf.perturbed else None for leaf in leaves)
            fixed = tuple(None if leaf.perturbed else leaf.value for leaf in leaves)
            return flat(*values), (varied, fixed)

        def pull(kept: tuple[tuple, tuple], gradient: Any) -> tuple:
            varied, fixed = kept
            gradient = jax.tree.map(_instantiate, gradient, is_leaf=_is_zero)
            varied = _after(varied, gradient)

            def again(varied: tuple) -> Any:
                return flat(*(b if a is None else a for a, b in zip(varied, fixed, strict=True)))

            return jax.vjp(again, varied)[1](gradient)[0]

        forward.defvjp(keep, pull, symbolic_zeros=True)
        return forward(*leaves)

    return call


def _after(arrays: tuple, gradient: Any) -> tuple:
    """The arrays, such that no program can have them before the gradient.

    What is added is nothing, but only to us: a compiler may not assume that a number times zero is
    zero, since it may not be finite.
    """
    first = jax.tree.leaves(gradient)[0]
    nothing = first[(0,) * first.ndim] * 0.0
    return tuple(None if x is None else x + nothing.astype(x.dtype) for x in arrays)


def _is_zero(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.SymbolicZero)


def _instantiate(leaf: Any) -> jax.Array:
    return jnp.zeros(leaf.shape, leaf.dtype) if _is_zero(leaf) else leaf
