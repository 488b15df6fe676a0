"""Causal attention of whole sequences, without a cache: `kernels.attend`."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from transformer import attention
from transformer.kernels.registry import Unavailable, register
from transformer.remat import recompute

_MIN_QUERY_BLOCK = 128  # minimum number of queries per block
_MAX_QUERY_BLOCKS = 8  # bounds the compile time: the loop over blocks is unrolled


@register("attend")
def reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None,
    segments: jax.Array | None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Compute attention by the definition, with all scores at once."""
    return attention.attend(
        q, k, v, window=window, segments=segments, softcap=softcap, sinks=sinks
    )[0]


@register("attend")
def blockwise(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None,
    segments: jax.Array | None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Compute attention one block of queries at a time, over the keys that the block attends to.

    After Rabe & Staats 2021, arXiv:2112.05682, without their blocks of keys. Only the scores of one
    block are in memory, and most masked scores are never computed. The backward pass recomputes
    the scores of a block.
    """
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    group = num_heads // num_kv_heads
    # Heads first, because products over the two last axes are fast.
    q = (q * head_dim**-0.5).reshape(batch, length, num_kv_heads, group, head_dim)
    q, k, v = q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, ..., T, H]
    span = max(_MIN_QUERY_BLOCK, -(-length // _MAX_QUERY_BLOCKS))
    out = []
    for start in range(0, length, span):
        stop = min(start + span, length)
        first = 0 if window is None else max(start - window + 1, 0)
        query, key = np.arange(start, stop)[:, None], np.arange(first, stop)
        visible = key <= query  # [span, S]
        if window is not None:
            visible &= key > query - window
        if segments is not None:
            same_segment = segments[:, start:stop, None] == segments[:, None, first:stop]
            visible = (visible & same_segment)[:, None, None]  # [B, 1, 1, span, S]
        qkv = q[:, :, :, start:stop], k[:, :, first:stop], v[:, :, first:stop]
        out.append(recompute(partial(_attend_block, softcap=softcap))(*qkv, visible, sinks))
    y = jnp.concatenate(out, axis=3)  # [B, K, G, T, H]
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, head_dim)


def _attend_block(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    sinks: jax.Array | None,
    *,
    softcap: float | None,
) -> jax.Array:
    """Compute softmax attention of a block of queries: q [B, K, G, T, H], k and v [B, K, S, H]."""
    *heads, group, length, head_dim = q.shape
    # Queries that share a key-value head are rows of one product: R = G * T.
    scores = jnp.einsum("bkrh,bksh->bkrs", q.reshape(*heads, group * length, head_dim), k)
    if softcap is not None:
        scores = attention.soft_cap(scores, softcap)
    scores = jnp.where(visible, scores.reshape(*heads, group, length, -1), -jnp.inf)
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.reshape(heads[-1], group, 1, 1)
        top = jnp.maximum(top, sinks)
    top = jax.lax.stop_gradient(top)  # it cancels out
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    y = jnp.einsum("bkrs,bksh->bkrh", weights.reshape(*heads, group * length, -1), v)
    return y.reshape(q.shape) / total  # divides H numbers per query instead of S


@register("attend")
def jax_nn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None,
    segments: jax.Array | None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Call `jax.nn.dot_product_attention`, for comparison."""
    if softcap is not None:
        raise Unavailable(f"the implementation attend jax_nn has no soft cap, got {softcap}")
    if sinks is not None:
        raise Unavailable(
            f"the implementation attend jax_nn has no sinks, got those of {len(sinks)} heads"
        )
    local_window = None if window is None else (window - 1, 0)
    mask = None
    if segments is not None:
        mask = (segments[:, :, None] == segments[:, None, :])[:, None]  # [B, 1, T, S]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, local_window_size=local_window
    )
