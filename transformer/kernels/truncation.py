"""Truncation of the token distribution: `kernels.truncate` and `kernels.truncate_typical`.

top-p ("nucleus sampling") is Holtzman et al. 2019, arXiv:1904.09751; min-p is Nguyen et al. 2024,
arXiv:2407.01082; locally typical sampling is Meister et al. 2022, arXiv:2202.00666.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from transformer.kernels.registry import register


@register("truncate")
def reference(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Apply top-k, top-p and min-p by their definitions, with two sorts and a cumulative sum."""
    descending = jnp.sort(logits)[::-1]
    last = jnp.where(top_k > 0, jnp.minimum(top_k, logits.size), logits.size) - 1
    logits = jnp.where(logits >= descending[last], logits, -jnp.inf)
    weights = jnp.exp(logits - logits.max())
    descending = jnp.sort(weights)[::-1]
    mass = jnp.cumsum(descending)
    # The smallest set with a probability of at least top_p; never empty.
    last = jnp.argmax(mass >= top_p * mass[-1])
    mask = ((weights >= descending[last]) | (top_p >= 1)) & (weights >= min_p)
    return jnp.where(mask | (logits == logits.max()), logits, -jnp.inf)


@register("truncate")
def bisection(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Truncate without a sort, with a bisection of each threshold over float bit patterns."""
    ones = jnp.ones_like(logits)
    count = jnp.where(top_k > 0, top_k, logits.size).astype(jnp.float32)
    # A dot product is a vectorized sum; `jnp.sum` of float32 adds one by one on a CPU.
    mask = _top_mask(logits, lambda mask: jnp.dot(mask.astype(jnp.float32), ones) >= count)
    logits = jnp.where(mask, logits, -jnp.inf)
    weights = jnp.exp(logits - logits.max())
    mass = top_p * jnp.dot(weights, ones)
    mask = _top_mask(logits, lambda mask: jnp.dot(mask.astype(jnp.float32), weights) >= mass)
    mask = (mask | (top_p >= 1)) & (weights >= min_p)
    return jnp.where(mask | (logits == logits.max()), logits, -jnp.inf)


def truncate_typical(logits: jax.Array, typical_p: jax.Array) -> jax.Array:
    """Set the logits of tokens that locally typical sampling excludes to -inf.

    The tokens are kept whose information, -log p, is nearest to its expectation, the entropy: as
    few as reach a total probability of `typical_p`. Tokens with the same distance are kept
    together. The likeliest token is not always kept.

    Args:
        logits: float32 [V]; -inf for tokens that are already excluded.
        typical_p: float32 []; 1 keeps all tokens.

    Returns:
        float32 [V].
    """
    logprobs = jax.nn.log_softmax(logits)
    p = jnp.exp(logprobs)
    entropy = -jnp.dot(p, jnp.where(p > 0, logprobs, 0))
    nearness = -jnp.abs(-logprobs - entropy)
    # At 0 keep the most typical token; rounding must not make the mass unreachable.
    mass = jnp.maximum(typical_p * p.sum(), 1e-30)
    mask = _top_mask(nearness, lambda mask: jnp.dot(mask.astype(jnp.float32), p) >= mass)
    return jnp.where(mask, logits, -jnp.inf)


def _top_mask(x: jax.Array, is_enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Return the smallest mask of the largest entries of `x` that satisfies `is_enough`.

    Equal entries are all in the mask or all outside. The bit patterns of floats, compared as
    integers (with negative ones flipped), have the order of the floats, so 32 bisection steps find
    the exact threshold.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    order = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))  # [V]

    def bisect(_, bounds):
        low, high = bounds  # the mask of order >= low is enough; that of >= high may not be
        middle = low + (high - low) // 2 + (high - low) % 2
        enough = is_enough(order >= middle)
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low, _ = jax.lax.fori_loop(0, 32, bisect, (jnp.uint32(0), jnp.uint32(2**32 - 1)))
    return order >= low
