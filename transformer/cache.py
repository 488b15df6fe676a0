"""The key-value cache: keys and values of the tokens a decoder has processed.

Keys and values are stored in blocks of `BLOCK_SIZE` positions. Each row (one sequence) has a *block
table*, the list of its blocks in order. A row therefore wastes less than one block, and any free
block can serve any row ("PagedAttention", Kwon et al. 2023, arXiv:2309.06180).

Attention processes the blocks of a row one after another with a running maximum and a running sum
(the online softmax of Milakov & Gimelshein 2018, arXiv:1805.02867). It reads only blocks that the
row has filled, and the result of a row does not depend on the other rows of the batch.

The array layout is private to this file and `kernels/cached_attention.py`; other files use `init`,
`append` and `attend`. The last axis of the keys is the position, so that scores are a row-major
matrix product (measured 1.1 to 1.4 times as fast). Block 0 is the null block: padding rows of a
batch write to it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from transformer import kernels
from transformer.config import Config

BLOCK_SIZE = 256  # positions per block
NULL_BLOCK = 0  # padding rows write to this block


class KVCache(struct.PyTreeNode):
    """Keys and values of every layer, one array of keys and one of values per layer.

    bfloat16 is stored as its bits in uint16, because XLA's CPU backend widens a whole bfloat16
    array to write one row into it (measured 300 times slower).
    """

    keys: tuple[jax.Array, ...]  # per layer [P, K, H, BLOCK_SIZE]
    values: tuple[jax.Array, ...]  # per layer [P, K, BLOCK_SIZE, H]

    @property
    def num_blocks(self) -> int:
        """The number of blocks P, including the null block."""
        return self.keys[0].shape[0]


def bytes_per_block(cfg: Config, dtype: jnp.dtype | str | type) -> int:
    """Return the size in bytes of one block: BLOCK_SIZE keys and values of every layer."""
    return (
        2
        * cfg.num_layers
        * cfg.num_kv_heads
        * BLOCK_SIZE
        * cfg.head_dim
        * jnp.dtype(dtype).itemsize
    )


def blocks_for(num_positions: int) -> int:
    """Return the number of blocks that are needed to store `num_positions` positions."""
    return -(-num_positions // BLOCK_SIZE)


def init(cfg: Config, num_blocks: int, dtype: jnp.dtype | str | type = jnp.float32) -> KVCache:
    """Return a cache of zeros.

    Args:
        cfg: Config of the decoder.
        num_blocks: Number of usable blocks; the null block is added to it.
        dtype: float32 or bfloat16.

    Returns:
        A cache of `num_blocks` + 1 blocks.
    """
    storage_dtype = jnp.uint16 if jnp.dtype(dtype) == jnp.bfloat16 else dtype
    pool_size, k, h = num_blocks + 1, cfg.num_kv_heads, cfg.head_dim
    layers = range(cfg.num_layers)
    return KVCache(
        keys=tuple(jnp.zeros((pool_size, k, h, BLOCK_SIZE), storage_dtype) for _ in layers),
        values=tuple(jnp.zeros((pool_size, k, BLOCK_SIZE, h), storage_dtype) for _ in layers),
    )


def copy_block(kv_cache: KVCache, source: jax.Array, target: jax.Array) -> KVCache:
    """Copy the content of one block to another block, in every layer (copy on write).

    A row that shares a block with another row copies it before it appends to it.

    Args:
        kv_cache: The cache; donate it, so that it is updated in place.
        source: Index of the block to copy, int32.
        target: Index of the block to overwrite, int32.

    Returns:
        The updated cache.
    """
    copy = lambda pool: pool.at[target].set(pool[source])  # noqa: E731
    return jax.tree.map(copy, kv_cache)


@jax.named_scope("append")
def append(
    keys: jax.Array,
    values: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Append new keys and values of one layer to each row.

    Args:
        keys: Cached keys of the layer [P, K, H, BLOCK_SIZE], donated by the caller.
        values: Cached values of the layer [P, K, BLOCK_SIZE, H], donated by the caller.
        k: New keys, float32 [B, T, K, H]. T is 1, or a divisor or multiple of BLOCK_SIZE.
        v: New values, float32 [B, T, K, H].
        tables: The block indices of each row in order, int32 [B, S/BLOCK_SIZE].
        starts: Position of the first new token of each row, int32 [B]; a multiple of
            min(T, BLOCK_SIZE).

    Returns:
        The updated cached keys and values.

    Raises:
        ValueError: T neither divides BLOCK_SIZE nor is a multiple of it.
    """
    num_rows, num_new = k.shape[:2]
    if num_new != 1 and BLOCK_SIZE % num_new and num_new % BLOCK_SIZE:
        raise ValueError(
            f"the number of new positions must divide {BLOCK_SIZE} or be a multiple of it, "
            f"got {num_new}"
        )
    span = min(num_new, BLOCK_SIZE)
    k = _narrow(k, keys.dtype).transpose(0, 2, 3, 1)  # [B, K, H, T]
    v = _narrow(v, values.dtype).transpose(0, 2, 1, 3)  # [B, K, T, H]
    write = jax.lax.dynamic_update_slice
    for b in range(num_rows):
        for t in range(0, num_new, span):
            position = starts[b] + t
            block, offset = tables[b, position // BLOCK_SIZE], position % BLOCK_SIZE
            keys = write(keys, k[b : b + 1, :, :, t : t + span], (block, 0, 0, offset))
            values = write(values, v[b : b + 1, :, t : t + span], (block, 0, offset, 0))
    return keys, values


def _narrow(x: jax.Array, storage_dtype: jnp.dtype) -> jax.Array:
    """Convert float32 to the dtype of the cache; bfloat16 is stored as uint16."""
    if storage_dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(storage_dtype)


def attend(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Compute causal attention of new queries over the cached positions of their rows.

    Args:
        q: New queries, float32 [B, T, N, H]; query t of row b has position starts[b] + t.
        keys: Cached keys of the layer, to which `append` has added the new positions.
        values: Cached values of the layer, to which `append` has added the new positions.
        tables: The block indices of each row in order, int32 [B, S/BLOCK_SIZE].
        starts: Position of the first query of each row, int32 [B].
        window: Number of positions that a query attends to, including its own; None means all
            positions up to its own. Blocks outside the window are not read. They stay allocated,
            because other layers can need them.
        softcap: Scores become softcap * tanh(score / softcap) before the softmax; None: no cap.
        sinks: As in `attention.attend`.

    Returns:
        The attention output, float32 [B, T, N, H].
    """
    return kernels.attend_cached(
        q, keys, values, tables, starts, window=window, softcap=softcap, sinks=sinks
    )
