"""Cutting the unlikely tokens off before one is drawn: `kernels.truncate`.

top-p ("nucleus sampling") is Holtzman et al. 2019, arXiv:1904.09751; min-p is Nguyen et al. 2024,
arXiv:2407.01082.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from transformer.kernels.registry import register


@register("truncate")
def reference(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """The definition: sort, count, add up."""
    descending = jnp.sort(logits)[::-1]
    last = jnp.where(top_k > 0, jnp.minimum(top_k, logits.size), logits.size) - 1
    logits = jnp.where(logits >= descending[last], logits, -jnp.inf)
    weights = jnp.exp(logits - logits.max())
    descending = jnp.sort(weights)[::-1]
    mass = jnp.cumsum(descending)
    # As few as hold top_p of the whole; at least one.
    last = jnp.argmax(mass >= top_p * mass[-1])
    kept = ((weights >= descending[last]) | (top_p >= 1)) & (weights >= min_p)
    return jnp.where(kept | (logits == logits.max()), logits, -jnp.inf)


@register("truncate")
def bisection(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Without a sort: each cut is found by halving the range of a float's bit patterns."""
    ones = jnp.ones_like(logits)
    wanted = jnp.where(top_k > 0, top_k, logits.size).astype(jnp.float32)
    # A dot is a vectorised sum; `jnp.sum` of float32 adds one by one.
    kept = _highest(logits, lambda is_kept: jnp.dot(is_kept.astype(jnp.float32), ones) >= wanted)
    logits = jnp.where(kept, logits, -jnp.inf)
    weights = jnp.exp(logits - logits.max())
    mass = top_p * jnp.dot(weights, ones)
    kept = _highest(logits, lambda is_kept: jnp.dot(is_kept.astype(jnp.float32), weights) >= mass)
    kept = (kept | (top_p >= 1)) & (weights >= min_p)
    return jnp.where(kept | (logits == logits.max()), logits, -jnp.inf)


def _highest(x: jax.Array, is_enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The mask of the highest entries of `x`, as few as satisfy `is_enough` (ties stay together).

    Bit patterns of floats, read as integers, are in the order of the floats (negative ones
    flipped), so 32 halvings find the exact cut.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    order = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))  # [V]

    def halve(_, bounds):
        low, high = bounds  # keeping everything >= low is enough; >= high may not be
        middle = low + (high - low) // 2 + (high - low) % 2
        enough = is_enough(order >= middle)
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low, _ = jax.lax.fori_loop(0, 32, halve, (jnp.uint32(0), jnp.uint32(2**32 - 1)))
    return order >= low
