"""Reading through the cache in any way must give what `forward` gives without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.naming import naming
from tests.transformer.conftest import GEMMA_VARIANT, GPT2_VARIANT, randomize
from transformer import cache, decoder
from transformer.config import Config

pytestmark = pytest.mark.heavy

LLAMA = Config.debug()
GPT2 = Config.debug(**GPT2_VARIANT)
# Its local layers leave the first block behind at position 295.
GEMMA = Config.debug(**GEMMA_VARIANT | {"windows": (40, None)})
CONFIGS = pytest.mark.parametrize("cfg", [LLAMA, GPT2, GEMMA], ids=["llama", "gpt2", "gemma"])
LENGTH = 320  # more than one block
IDS = np.random.default_rng(2).integers(0, 320, (3, LENGTH)).astype(np.int32)


@functools.cache
def weights(cfg: Config) -> decoder.Params:
    return randomize(decoder.init(jax.random.key(0), cfg))


@functools.cache
def expected(cfg: Config) -> np.ndarray:
    return np.asarray(jax.jit(decoder.forward, static_argnums=1)(weights(cfg), cfg, IDS)[0])


@functools.partial(jax.jit, static_argnums=1, donate_argnums=2)
def step(params, cfg, memory, ids, tables, starts):
    x, memory = decoder.forward_cached(params, cfg, memory, ids, tables, starts)
    return decoder.unembed(params, cfg, x), memory


def read(cfg, memory, ids, tables, starts):
    logits, memory = step(
        weights(cfg),
        cfg,
        memory,
        np.asarray(ids, np.int32),
        np.asarray(tables, np.int32),
        np.asarray(starts, np.int32),
    )
    return np.asarray(logits), memory


def same(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@CONFIGS
@pytest.mark.parametrize("chunk", [16, 64, 256])
def test_prefill_in_chunks_matches_forward(cfg, chunk):
    memory, padded = cache.init(cfg, 2), np.pad(IDS[0], (0, -LENGTH % chunk))
    found = []
    for start in range(0, LENGTH, chunk):
        logits, memory = read(cfg, memory, padded[None, start : start + chunk], [[1, 2]], [start])
        found.append(logits[0])
    same(np.concatenate(found)[:LENGTH], expected(cfg)[0])


@CONFIGS
def test_prefill_then_decode_across_blocks_matches_forward(cfg):
    memory = cache.init(cfg, 2)
    for start in range(0, 192, 64):
        found, memory = read(cfg, memory, IDS[:1, start : start + 64], [[1, 2]], [start])
        same(found[0], expected(cfg)[0, start : start + 64])
    for at in range(192, LENGTH):
        found, memory = read(cfg, memory, IDS[:1, at : at + 1], [[1, 2]], [at])
        same(found[0, 0], expected(cfg)[0, at])


def test_rows_of_different_lengths_match_forward():
    memory = cache.init(LLAMA, 8)
    tables = np.array([[7, 2], [1, 8], [5, 3]])
    lengths = [256, 64, 192]
    for row, length in enumerate(lengths):
        for start in range(0, length, 64):
            ids = IDS[row : row + 1, start : start + 64]
            _, memory = read(LLAMA, memory, ids, tables[row : row + 1], [start])
    for i in range(20):
        at = np.array(lengths) + i
        found, memory = read(LLAMA, memory, IDS[range(3), at][:, None], tables, at)
        same(found[:, 0], expected(LLAMA)[range(3), at])


def test_padding_rows_write_to_null_block():
    memory = cache.init(LLAMA, 2)
    _, memory = read(LLAMA, memory, IDS[:1, :64], [[1, 2]], [0])
    trash = [cache.NULL_BLOCK, cache.NULL_BLOCK]
    for at in range(64, 70):
        ids = [[IDS[0, at]], [9], [7]]
        found, memory = read(LLAMA, memory, ids, [[1, 2], trash, trash], [at, 0, 0])
        same(found[0, 0], expected(LLAMA)[0, at])
        assert np.isfinite(found).all()


def test_block_outside_window_is_not_read():
    cfg = Config.debug(windows=(40,))
    memory = cache.init(cfg, 2)
    for start in (0, 64, 128, 192, 256):
        _, memory = read(cfg, memory, IDS[:1, start : start + 64], [[1, 2]], [start])
    spoilt = jax.tree.map(lambda pool: pool.at[1].set(jnp.nan), memory)
    found, _ = read(cfg, spoilt, IDS[:1, 300:301], [[1, 2]], [300])
    same(found[0, 0], expected(cfg)[0, 300])


def test_old_content_of_block_is_masked():
    memory = jax.tree.map(lambda pool: jnp.full_like(pool, 1e4), cache.init(LLAMA, 2))
    found, memory = read(LLAMA, memory, IDS[:1, :64], [[2, 1]], [0])
    same(found[0], expected(LLAMA)[0, :64])


def test_row_is_independent_of_other_rows():
    memory = cache.init(LLAMA, 4)
    _, memory = read(LLAMA, memory, IDS[:1, :64], [[1]], [0])
    _, memory = read(LLAMA, memory, IDS[1:2, :64], [[2]], [0])
    _, other = read(LLAMA, jax.tree.map(jnp.copy, memory), IDS[2:, :64], [[2]], [0])
    ids = [[5], [6]]
    first, _ = read(LLAMA, memory, ids, [[1], [2]], [64, 64])
    second, _ = read(LLAMA, other, [[5], [8]], [[1], [2]], [64, 33])
    np.testing.assert_array_equal(first[0], second[0])


def test_append_with_invalid_chunk_size_raises():
    with pytest.raises(ValueError, match=naming(192, cache.BLOCK_SIZE)):
        read(LLAMA, cache.init(LLAMA, 2), IDS[:1, :192], [[1, 2]], [0])


def test_bytes_per_block_matches_arrays():
    assert [cache.blocks_for(n) for n in (0, 1, 256, 257)] == [0, 1, 1, 2]
    memory = cache.init(LLAMA, 3, jnp.bfloat16)
    assert memory.num_blocks == 4
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(memory))
    assert size == 4 * cache.bytes_per_block(LLAMA, jnp.bfloat16)
