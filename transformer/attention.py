"""Attention without a cache: the scores of all queries and keys in one matrix product.

`attend` is the equation of "Attention is all you need" (Vaswani et al. 2017, arXiv:1706.03762) with
grouped key-value heads (Ainslie et al. 2023, arXiv:2305.13245): N query heads share K key heads, so
that G = N / K query heads use each key head. The function is the reference for the faster
implementations of `kernels.attend` and for the blockwise attention of `cache.attend`. `interpret`
uses it too, because no other implementation returns the attention weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None = None,
    segments: jax.Array | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    is_causal: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Compute softmax attention, causal by default.

    Args:
        q: Queries, float32 [B, T, N, H].
        k: Keys, float32 [B, T, K, H].
        v: Values, float32 [B, T, K, H].
        window: Number of positions that a query attends to, including its own. None means all
            positions up to its own.
        segments: Number of the text that each position belongs to, if several texts share a row,
            int32 [B, T]. A query attends to positions of its own text only. None means one text per
            row.
        softcap: Scores become softcap * tanh(score / softcap) before the softmax (Gemma 2,
            arXiv:2408.00118). None means no cap.
        sinks: Score of each head for attending to no position, float32 [N]: exp(sink) is added to
            the sum that divides the weights (gpt-oss, arXiv:2508.10925). None means no sinks.
        is_causal: Whether a query attends to no later position. If False, `window` is the number of
            positions on either side of the query.

    Returns:
        The attention output [B, T, N, H] and the attention weights [B, N, T, T], both float32. The
        weights of a query sum to 1, or less with sinks.
    """
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    q = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k)
    visible = jnp.ones((length, length), bool)  # [T, S]
    if is_causal:
        visible = jnp.tril(visible)
    if window is not None:
        visible = jnp.triu(visible, 1 - window if is_causal else -window)
        visible = visible if is_causal else jnp.tril(visible, window)
    if segments is not None:
        same_segment = segments[:, :, None] == segments[:, None, :]  # [B, T, S]
        visible = (visible & same_segment)[:, None, None]
    scores = scores * head_dim**-0.5
    if softcap is not None:
        scores = soft_cap(scores, softcap)
    scores = jnp.where(visible, scores, -jnp.inf)
    weights = softmax(scores, sinks)  # [B, K, G, T, S]
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v)
    return (
        out.reshape(batch, length, num_heads, head_dim),
        weights.reshape(batch, num_heads, length, length),
    )


def softmax(scores: jax.Array, sinks: jax.Array | None = None) -> jax.Array:
    """Return attention weights from scores [B, K, G, T, S], over the last axis.

    Each head has one more score if there are `sinks` [K * G], which belongs to no position; the
    weights of a query then sum to less than 1.
    """
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks.reshape(*scores.shape[1:3], 1, 1)
    column = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1)).astype(scores.dtype)
    return jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Limit numbers smoothly to (-cap, cap): cap * tanh(x / cap)."""
    return cap * jnp.tanh(x / cap)
