"""Causal attention without a cache: every query against every earlier key, in one product.

This is the equation of "Attention is all you need" (Vaswani et al. 2017, arXiv:1706.03762) with
grouped key-value heads (Ainslie et al. 2023, arXiv:2305.13245): N query heads share K key heads,
G = N / K each. It is the reference that the faster forms of `kernels.attend` and the blockwise walk
of `cache.attend` are compared with, and what looking inside uses: it alone has all weights at once.
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
) -> tuple[jax.Array, jax.Array]:
    """Causal softmax attention.

    Args:
        q: float32 [B, T, N, H].
        k, v: float32 [B, T, K, H].
        window: how many positions a query sees, its own among them; None: all before it.
        segments: int32 [B, T], which of several texts in a row a position belongs to; it sees those
            of its own. None: a row is one text.

    Returns:
        The attended values [B, T, N, H] and the attention weights [B, N, T, T].
    """
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    q = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k)
    visible = jnp.tril(jnp.ones((length, length), bool))  # [T, S]
    if window is not None:
        visible = jnp.triu(visible, 1 - window)
    if segments is not None:
        together = segments[:, :, None] == segments[:, None, :]  # [B, T, S]
        visible = (visible & together)[:, None, None]
    scores = jnp.where(visible, scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)  # [B, K, G, T, S]
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v)
    return (
        out.reshape(batch, length, num_heads, head_dim),
        weights.reshape(batch, num_heads, length, length),
    )
