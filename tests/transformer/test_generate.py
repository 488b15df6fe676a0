"""Tests of generation, against a loop of `forward` over the whole sequence."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.naming import naming
from tests.transformer.conftest import randomize
from transformer import decoder, generate
from transformer.config import Config
from transformer.sampling import SamplingParams

pytestmark = pytest.mark.heavy

forward = jax.jit(decoder.forward, static_argnums=1)


@pytest.fixture(scope="module")
def cfg():
    return replace(Config.debug(), max_seq_len=512)


@pytest.fixture(scope="module")
def params(cfg):
    return randomize(decoder.init(jax.random.key(0), cfg), seed=1)


def prompt_of(length, cfg, seed=0):
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, length).tolist()


def reference(params, cfg, prompt, count):
    """Return greedy ids by `forward` over the whole sequence; later padding is masked."""
    ids = np.zeros((1, 336), np.int32)
    ids[0, : len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + count):
        ids[0, end] = int(forward(params, cfg, ids)[0][0, end - 1].argmax())
    return ids[0, len(prompt) : len(prompt) + count].tolist()


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 255, 256, 257, 320])
def test_greedy_generation_matches_forward(params, cfg, length):
    prompt = prompt_of(length, cfg)
    ids = list(generate.generate(params, cfg, prompt, max_new_tokens=6))
    assert ids == reference(params, cfg, prompt, 6)


@pytest.mark.parametrize("sizes", [(256, 64), (64,), (128,), (256,)], ids=str)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 255, 256, 257, 320, 511])
def test_chunks_contain_the_prompt_in_order(length, sizes):
    prompt = list(range(1, length + 1))
    ids_read = []
    for start, ids, last in generate.chunks(prompt, sizes):
        assert start == len(ids_read) and start % min(ids.shape[1], 256) == 0
        assert ids.shape[1] in sizes
        ids_read += ids[0, : last + 1].tolist()
        assert not ids[0, last + 1 :].any()
    assert ids_read == prompt


@pytest.mark.parametrize("length", [65, 257, 320])
def test_chunk_size_does_not_change_the_logits(params, cfg, length):
    prompt = prompt_of(length, cfg)
    tables = np.array([[1, 2]], np.int32)
    expected = forward(params, cfg, np.array([prompt]))[0][0, -1]
    for sizes in [(64,), (256, 64), (256,)]:
        kv_cache = generate.cache.init(cfg, 2)
        for start, ids, last in generate.chunks(prompt, sizes):
            start = np.array([start], np.int32)
            logits, kv_cache = generate.prefill(params, cfg, kv_cache, ids, tables, start, last)
        np.testing.assert_allclose(logits[0], expected, atol=1e-4)


def test_stop_id_ends_generation_and_is_not_yielded(params, cfg):
    prompt = prompt_of(10, cfg)
    ids = list(generate.generate(params, cfg, prompt, max_new_tokens=12))
    stop = next(token for i, token in enumerate(ids) if i and token not in ids[:i])
    cut = list(generate.generate(params, cfg, prompt, max_new_tokens=12, stop_ids={stop}))
    assert cut == ids[: ids.index(stop)]


def test_generation_can_fill_the_context(params, cfg):
    small = replace(cfg, max_seq_len=70)
    assert len(list(generate.generate(params, small, prompt_of(66, cfg), max_new_tokens=4))) == 4


def test_sampling_is_deterministic_by_seed(params, cfg):
    prompt = prompt_of(10, cfg)

    def ids(seed):
        sampling_params = SamplingParams(seed=seed, temperature=2.0)
        return list(
            generate.generate(
                params, cfg, prompt, max_new_tokens=16, sampling_params=sampling_params
            )
        )

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_penalty_prevents_repetition_and_bias_forces_token(params, cfg):
    prompt = prompt_of(10, cfg)
    sampling_params = SamplingParams(temperature=0, frequency_penalty=900.0)
    ids = list(
        generate.generate(params, cfg, prompt, max_new_tokens=20, sampling_params=sampling_params)
    )
    assert len(set(ids)) == len(ids), "no token twice under so large a penalty"
    sampling_params = SamplingParams(temperature=0, logit_bias={5: 1000.0})
    assert set(
        generate.generate(params, cfg, prompt, max_new_tokens=5, sampling_params=sampling_params)
    ) == {5}


def test_padding_ids_are_never_generated(params, cfg):
    sampling_params = SamplingParams(temperature=5.0)
    ids = generate.generate(
        params, cfg, [1], max_new_tokens=40, sampling_params=sampling_params, num_ids=3
    )
    assert set(ids) <= {0, 1, 2}


def test_generation_with_bfloat16_cache_returns_tokens(params, cfg):
    ids = generate.generate(params, cfg, [1, 2], max_new_tokens=4, cache_dtype=jnp.bfloat16)
    assert len(list(ids)) == 4


@pytest.mark.parametrize(
    ("prompt", "count", "facts"),
    [
        ([], 1, ["prompt"]),
        ([-1], 1, ["prompt", "-1"]),
        ([10**6], 1, ["prompt", 10**6]),
        ([1] * 500, 13, [500, 13, 512]),
    ],
)
def test_invalid_prompt_is_rejected_with_value(params, cfg, prompt, count, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        list(generate.generate(params, cfg, prompt, max_new_tokens=count))


def test_logit_bias_outside_vocabulary_is_rejected(params, cfg):
    """Bug: a negative id silently biased the last token; a large one raised IndexError."""
    for id in (-1, cfg.vocab_size):
        sampling_params = SamplingParams(temperature=0, logit_bias={id: 5.0})
        with pytest.raises(ValueError, match=f"logit_bias.*{id}"):
            list(
                generate.generate(
                    params, cfg, [1], max_new_tokens=2, sampling_params=sampling_params
                )
            )
