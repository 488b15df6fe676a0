"""Tests of the pulled models in float32 against golden files of transformers."""

import functools
import gc
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.transformer.conftest import GOLDEN
from transformer import cache, checkpoint, decoder

MODELS = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct")
CHUNK = 32  # tokens per step; one program for prompts of every length


class Outputs(NamedTuple):
    """Outputs at each position of a prompt and its golden continuation."""

    columns: np.ndarray  # [T, 256] logits of the ids in the golden file
    top_ids: np.ndarray  # [T, 5]
    top_logits: np.ndarray  # [T, 5]
    logsumexp: np.ndarray  # [T]


def reduce(logits: jax.Array, columns: jax.Array) -> Outputs:
    top_logits, top_ids = jax.lax.top_k(logits, 5)
    return Outputs(logits[:, columns], top_ids, top_logits, jax.nn.logsumexp(logits, -1))


@functools.partial(jax.jit, static_argnums=1, donate_argnums=2)
def read_chunk(params, cfg, kv_cache, ids, tables, starts, columns):
    x, kv_cache = decoder.forward_cached(params, cfg, kv_cache, ids, tables, starts)
    return reduce(decoder.unembed(params, cfg, x[0]), columns), kv_cache


@pytest.fixture(scope="module", params=[MODELS[0], pytest.param(MODELS[1], marks=pytest.mark.slow)])
def read(request, model_file):
    """Return the golden file and the outputs for each prompt, computed with the cache."""
    path = model_file(request.param)
    golden = dict(np.load(GOLDEN / f"{request.param}.npz"))
    params, cfg, _ = checkpoint.load(path)
    kv_cache = cache.init(cfg, 1)
    outputs = []
    for prompt, greedy in zip(prompts_of(golden), golden["greedy_ids"], strict=True):
        ids = np.concatenate([prompt, greedy])
        padded = np.pad(ids, (0, -len(ids) % CHUNK))
        parts = []
        for start in range(0, len(padded), CHUNK):
            part, kv_cache = read_chunk(
                params,
                cfg,
                kv_cache,
                padded[None, start : start + CHUNK],
                jnp.array([[1]], jnp.int32),
                jnp.array([start], jnp.int32),
                golden["columns"],
            )
            parts.append(part)
        outputs.append(Outputs(*(np.concatenate(f)[: len(ids)] for f in zip(*parts, strict=True))))
    yield golden, outputs
    del params, kv_cache
    gc.collect()


def prompts_of(golden) -> list[np.ndarray]:
    return np.split(golden["prompt_ids"], np.cumsum(golden["prompt_lengths"])[:-1])


def test_logits_match_golden_file_at_every_position(read):
    golden, outputs = read
    lengths = golden["prompt_lengths"]
    columns = np.concatenate([s.columns[:n] for s, n in zip(outputs, lengths, strict=True)])
    np.testing.assert_allclose(columns, golden["logits"], rtol=0, atol=1e-3)
    top = np.concatenate([s.top_logits for s in outputs])
    np.testing.assert_allclose(top, golden["top_logits"], rtol=0, atol=1e-3)
    logsumexp = np.concatenate([s.logsumexp for s in outputs])
    np.testing.assert_allclose(logsumexp, golden["logsumexp"], rtol=0, atol=1e-3)


def test_top_tokens_match_golden_file(read):
    golden, outputs = read
    ids = np.concatenate([s.top_ids for s in outputs])
    # If two logits differ by less than the tolerance, either may be first.
    gap = golden["top_logits"][:, :-1] - golden["top_logits"][:, 1:]
    is_clear = np.pad(gap, ((0, 0), (1, 0)), constant_values=9)[:, :4] > 2e-3
    is_clear &= gap > 2e-3
    assert is_clear.mean() > 0.95
    np.testing.assert_array_equal(ids[:, :4][is_clear], golden["top_ids"][:, :4][is_clear])


def test_greedy_continuations_equal_golden_file(read):
    # The most likely token after each prefix of the continuation is its next token, which is greedy
    # decoding, computed in chunks instead of token by token.
    golden, outputs = read
    for s, n, greedy in zip(outputs, golden["prompt_lengths"], golden["greedy_ids"], strict=True):
        np.testing.assert_array_equal(s.top_ids[n - 1 : -1, 0], greedy)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=2)
def decode(params, cfg, kv_cache, ids, tables, starts):
    x, kv_cache = decoder.forward_cached(params, cfg, kv_cache, ids[:, None], tables, starts)
    return jnp.argmax(decoder.unembed(params, cfg, x[:, 0]), -1).astype(jnp.int32), kv_cache


@functools.partial(jax.jit, static_argnums=1)
def read_whole(params, cfg, ids, columns):
    return reduce(decoder.forward(params, cfg, ids)[0][0], columns)


@pytest.mark.slow
def test_forward_and_batched_decoding_match_golden_file(model_file):
    """The default model: `forward` without a cache, and batched decoding, match golden outputs."""
    golden = dict(np.load(GOLDEN / f"{MODELS[0]}.npz"))
    params, cfg, _ = checkpoint.load(model_file(MODELS[0]))
    prompts, lengths = prompts_of(golden), golden["prompt_lengths"]
    longest = int(max(lengths))
    padded = np.stack([np.pad(ids, (0, longest - len(ids))) for ids in prompts])
    outputs = [read_whole(params, cfg, ids[None], golden["columns"]).columns for ids in padded]
    ours = np.concatenate([np.asarray(s)[:n] for s, n in zip(outputs, lengths, strict=True)])
    np.testing.assert_allclose(ours, golden["logits"], rtol=0, atol=1e-3)

    # Rows of different lengths: each processes its prompt token by token, then generates.
    is_short = lengths <= 30
    lengths, greedy_ids = lengths[is_short], golden["greedy_ids"][is_short]
    longest = int(max(lengths))
    padded = padded[is_short, :longest]
    kv_cache = cache.init(cfg, len(lengths))
    tables = jnp.arange(1, len(lengths) + 1, dtype=jnp.int32)[:, None]
    ids, generated = padded[:, 0], []
    for position in range(longest + 63):
        next_ids, kv_cache = decode(
            params, cfg, kv_cache, ids, tables, np.full(len(ids), position, np.int32)
        )
        generated.append(np.asarray(next_ids))
        ids = generated[-1]
        if position + 1 < longest:
            ids = np.where(position + 1 < lengths, padded[:, position + 1], ids).astype(np.int32)
    generated = np.stack(generated, 1)
    for row, n, greedy in zip(generated, lengths, greedy_ids, strict=True):
        np.testing.assert_array_equal(row[n - 1 : n + 63], greedy)
