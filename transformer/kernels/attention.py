"""Causal attention of whole sequences, without a cache: `kernels.attend`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from transformer import attention
from transformer.kernels import Unavailable

_SPAN = 256  # queries, and keys, looked at together


def reference(q, k, v, *, window: int | None, segments: jax.Array | None) -> jax.Array:
    """The definition: all scores at once."""
    return attention.attend(q, k, v, window=window, segments=segments)[0]


def blocks(q, k, v, *, window: int | None, segments: jax.Array | None) -> jax.Array:
    """Blocks of queries over blocks of keys with an online softmax; none in the future is touched.

    After Rabe & Staats 2021, arXiv:2112.05682, and FlashAttention (Dao et al. 2022,
    arXiv:2205.14135): memory grows with the length, not with its square, and half of the work, all
    that the mask would throw away, is not done.
    """
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads, span = k.shape[2], min(_SPAN, length)
    if length % span:
        raise Unavailable(f"attend blocks needs a multiple of {span} positions, not {length}")
    if segments is not None:
        raise Unavailable("attend blocks is for rows of one text")
    group = num_heads // num_kv_heads
    # Heads first, and queries that share a key head as rows of one product: R = G * span.
    q = (q * head_dim**-0.5).reshape(batch, length // span, span, num_kv_heads, group, head_dim)
    q = q.transpose(1, 0, 3, 4, 2, 5).reshape(-1, batch, num_kv_heads, group * span, head_dim)
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)  # [B, K, H, T], [B, K, T, H]
    row = jnp.arange(group * span) % span  # [R], place within the block of queries
    out = []
    for i, queries in enumerate(q):
        position = i * span + row
        first = 0 if window is None else max(i * span - window + 1, 0) // span
        top = jnp.full((batch, num_kv_heads, group * span, 1), -1e30, q.dtype)
        total, mixed = jnp.zeros_like(top), jnp.zeros_like(queries)
        for j in range(first, i + 1):
            at = slice(j * span, (j + 1) * span)
            scores = jnp.einsum("bkrh,bkhs->bkrs", queries, k[..., at])
            if j == i or window is not None:
                key = j * span + jnp.arange(span)
                visible = key <= position[:, None]  # [R, span]
                if window is not None:
                    visible &= key > position[:, None] - window
                scores = jnp.where(visible, scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
            weight, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            total = total * shrink + weight.sum(-1, keepdims=True)
            mixed = mixed * shrink + jnp.einsum("bkrs,bksh->bkrh", weight, v[:, :, at])
            top = new_top
        out.append((mixed / total).reshape(batch, num_kv_heads, group, span, head_dim))
    y = jnp.stack(out, axis=1)  # [B, T/span, K, G, span, H]
    return y.transpose(0, 1, 4, 2, 3, 5).reshape(batch, length, num_heads, head_dim)


def library(q, k, v, *, window: int | None, segments: jax.Array | None) -> jax.Array:
    """JAX's own function, for comparison."""
    sight = None if window is None else (window - 1, 0)
    mask = None
    if segments is not None:
        mask = (segments[:, :, None] == segments[:, None, :])[:, None]  # [B, 1, T, S]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, local_window_size=sight)
