"""Tests of the cache: prefill and decoding must match `forward` without a cache."""

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
# The window of its local layers leaves the first block at position 295.
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
def step(params, cfg, kv_cache, ids, tables, starts):
    x, kv_cache = decoder.forward_cached(params, cfg, kv_cache, ids, tables, starts)
    return decoder.unembed(params, cfg, x), kv_cache


def run_step(cfg, kv_cache, ids, tables, starts):
    logits, kv_cache = step(
        weights(cfg),
        cfg,
        kv_cache,
        np.asarray(ids, np.int32),
        np.asarray(tables, np.int32),
        np.asarray(starts, np.int32),
    )
    return np.asarray(logits), kv_cache


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


@CONFIGS
@pytest.mark.parametrize("chunk", [16, 64, 256])
def test_prefill_in_chunks_matches_forward(cfg, chunk):
    kv_cache, padded = cache.init(cfg, 2), np.pad(IDS[0], (0, -LENGTH % chunk))
    actual = []
    for start in range(0, LENGTH, chunk):
        logits, kv_cache = run_step(
            cfg, kv_cache, padded[None, start : start + chunk], [[1, 2]], [start]
        )
        actual.append(logits[0])
    assert_close(np.concatenate(actual)[:LENGTH], expected(cfg)[0])


@CONFIGS
def test_prefill_then_decode_across_blocks_matches_forward(cfg):
    kv_cache = cache.init(cfg, 2)
    for start in range(0, 192, 64):
        actual, kv_cache = run_step(cfg, kv_cache, IDS[:1, start : start + 64], [[1, 2]], [start])
        assert_close(actual[0], expected(cfg)[0, start : start + 64])
    for position in range(192, LENGTH):
        actual, kv_cache = run_step(
            cfg, kv_cache, IDS[:1, position : position + 1], [[1, 2]], [position]
        )
        assert_close(actual[0, 0], expected(cfg)[0, position])


def test_rows_of_different_lengths_match_forward():
    kv_cache = cache.init(LLAMA, 8)
    tables = np.array([[7, 2], [1, 8], [5, 3]])
    lengths = [256, 64, 192]
    for row, length in enumerate(lengths):
        for start in range(0, length, 64):
            ids = IDS[row : row + 1, start : start + 64]
            _, kv_cache = run_step(LLAMA, kv_cache, ids, tables[row : row + 1], [start])
    for i in range(20):
        position = np.array(lengths) + i
        actual, kv_cache = run_step(
            LLAMA, kv_cache, IDS[range(3), position][:, None], tables, position
        )
        assert_close(actual[:, 0], expected(LLAMA)[range(3), position])


def test_padding_rows_write_to_null_block():
    kv_cache = cache.init(LLAMA, 2)
    _, kv_cache = run_step(LLAMA, kv_cache, IDS[:1, :64], [[1, 2]], [0])
    null_table = [cache.NULL_BLOCK, cache.NULL_BLOCK]
    for position in range(64, 70):
        ids = [[IDS[0, position]], [9], [7]]
        actual, kv_cache = run_step(
            LLAMA, kv_cache, ids, [[1, 2], null_table, null_table], [position, 0, 0]
        )
        assert_close(actual[0, 0], expected(LLAMA)[0, position])
        assert np.isfinite(actual).all()


def test_block_outside_window_is_not_read():
    cfg = Config.debug(windows=(40,))
    kv_cache = cache.init(cfg, 2)
    for start in (0, 64, 128, 192, 256):
        _, kv_cache = run_step(cfg, kv_cache, IDS[:1, start : start + 64], [[1, 2]], [start])
    spoilt = jax.tree.map(lambda pool: pool.at[1].set(jnp.nan), kv_cache)
    actual, _ = run_step(cfg, spoilt, IDS[:1, 300:301], [[1, 2]], [300])
    assert_close(actual[0, 0], expected(cfg)[0, 300])


def test_old_content_of_block_is_masked():
    kv_cache = jax.tree.map(lambda pool: jnp.full_like(pool, 1e4), cache.init(LLAMA, 2))
    actual, kv_cache = run_step(LLAMA, kv_cache, IDS[:1, :64], [[2, 1]], [0])
    assert_close(actual[0], expected(LLAMA)[0, :64])


def test_row_is_independent_of_other_rows():
    kv_cache = cache.init(LLAMA, 4)
    _, kv_cache = run_step(LLAMA, kv_cache, IDS[:1, :64], [[1]], [0])
    _, kv_cache = run_step(LLAMA, kv_cache, IDS[1:2, :64], [[2]], [0])
    _, other = run_step(LLAMA, jax.tree.map(jnp.copy, kv_cache), IDS[2:, :64], [[2]], [0])
    ids = [[5], [6]]
    first, _ = run_step(LLAMA, kv_cache, ids, [[1], [2]], [64, 64])
    second, _ = run_step(LLAMA, other, [[5], [8]], [[1], [2]], [64, 33])
    np.testing.assert_array_equal(first[0], second[0])


def test_append_with_invalid_chunk_size_raises():
    with pytest.raises(ValueError, match=naming(192, cache.BLOCK_SIZE)):
        run_step(LLAMA, cache.init(LLAMA, 2), IDS[:1, :192], [[1, 2]], [0])


def test_bytes_per_block_matches_arrays():
    assert [cache.blocks_for(n) for n in (0, 1, 256, 257)] == [0, 1, 1, 2]
    kv_cache = cache.init(LLAMA, 3, jnp.bfloat16)
    assert kv_cache.num_blocks == 4
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(kv_cache))
    assert size == 4 * cache.bytes_per_block(LLAMA, jnp.bfloat16)
