"""Attention of new queries over a paged key-value cache: `kernels.attend_cached`.

`transformer/cache.py` defines the layout: keys [P, K, H, BLOCK_SIZE] with positions last, values
[P, K, BLOCK_SIZE, H], and a table of block numbers per row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from transformer.attention import soft_cap, softmax
from transformer.kernels.registry import register


@register("attend_cached")
def reference(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
    *,
    window: int | None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Compute attention by the definition: gather the blocks of a row, then take one softmax."""
    batch, num_new, num_heads, head_dim = q.shape
    num_kv_heads, size = keys.shape[1], keys.shape[-1]
    length = tables.shape[1] * size
    # [B, S/BLOCK_SIZE, BLOCK_SIZE, K, H]
    k = _widen(keys[tables], q.dtype).transpose(0, 1, 4, 2, 3)
    v = _widen(values[tables], q.dtype).transpose(0, 1, 3, 2, 4)
    k, v = (x.reshape(batch, length, num_kv_heads, head_dim) for x in (k, v))
    q = q.reshape(batch, num_new, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * head_dim**-0.5
    if softcap is not None:
        scores = soft_cap(scores, softcap)
    position = starts[:, None] + jnp.arange(num_new)  # [B, T]
    key_position = jnp.arange(length)
    visible = key_position <= position[..., None]  # [B, T, S]
    if window is not None:
        visible &= key_position > position[..., None] - window
    weights = softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), sinks)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v)
    return out.reshape(batch, num_new, num_heads, head_dim)


@register("attend_cached")
def blockwise(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
    *,
    window: int | None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Compute attention row by row and block by block with an online softmax.

    The online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867) keeps a running maximum and
    sum. Only blocks that the row has filled and that lie in its window are read. The result of a
    row does not depend on the other rows of the batch.
    """

    def attend_row(args: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        row_q, table, start = args
        return _attend_row(row_q, table, start, keys, values, window, softcap, sinks)

    if q.shape[0] == 1:
        return attend_row((q[0], tables[0], starts[0]))[None]
    return jax.lax.map(attend_row, (q, tables, starts))


def _attend_row(q, table, start, keys, values, window, softcap, sinks):
    num_new, num_heads, head_dim = q.shape
    num_kv_heads, size = keys.shape[1], keys.shape[-1]
    group = num_heads // num_kv_heads
    # Queries that share a key-value head become rows of one matrix product: R = G * T.
    q = (q * head_dim**-0.5).reshape(num_new, num_kv_heads, group, head_dim)
    q = q.transpose(1, 2, 0, 3).reshape(num_kv_heads, group * num_new, head_dim)  # [K, R, H]
    position = start + jnp.arange(group * num_new) % num_new  # [R]

    def block(i, carry):
        top, total, out = carry  # [K, R, 1], [K, R, 1], [K, R, H]
        k = _widen(keys[table[i]], jnp.float32)  # [K, H, BLOCK_SIZE]
        v = _widen(values[table[i]], jnp.float32)  # [K, BLOCK_SIZE, H]
        scores = jnp.einsum("krh,khs->krs", q, k)
        if softcap is not None:
            scores = soft_cap(scores, softcap)
        key_position = i * size + jnp.arange(size)
        visible = key_position <= position[:, None]  # [R, BLOCK_SIZE]
        if window is not None:
            visible &= key_position > position[:, None] - window
        scores = jnp.where(visible, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        weight = jnp.exp(scores - new_top)  # [K, R, BLOCK_SIZE]
        rescale = jnp.exp(top - new_top)
        total = total * rescale + weight.sum(-1, keepdims=True)
        out = out * rescale + jnp.einsum("krs,ksh->krh", weight, v)
        return new_top, total, out

    rows = (num_kv_heads, group * num_new)
    if sinks is None:
        # A finite initial maximum avoids exp(-inf + inf) for rows that have no visible key yet.
        top = jnp.full((*rows, 1), -1e30, jnp.float32)
        total = jnp.zeros((*rows, 1), jnp.float32)
    else:  # the sink is the first score, of no position
        top = jnp.repeat(sinks.reshape(num_kv_heads, group), num_new, axis=1)[..., None]
        total = jnp.ones((*rows, 1), jnp.float32)
    carry = top, total, jnp.zeros((*rows, head_dim), jnp.float32)
    num_blocks = (start + num_new - 1) // size + 1
    first = 0 if window is None else jnp.maximum(start - window + 1, 0) // size
    _, total, out = jax.lax.fori_loop(first, num_blocks, block, carry)
    out = (out / total).reshape(num_kv_heads, group, num_new, head_dim)
    return out.transpose(2, 0, 1, 3).reshape(num_new, num_heads, head_dim)  # [T, N, H]


def _widen(x: jax.Array, dtype) -> jax.Array:
    """Cast cached keys or values to `dtype`; uint16 holds the bits of bfloat16."""
    if x.dtype == jnp.uint16:
        x = jax.lax.bitcast_convert_type(x, jnp.bfloat16)
    return x.astype(dtype)
