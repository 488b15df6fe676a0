"""Tests of sampling against NumPy: truncation, frequencies, penalties, log-probabilities."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.naming import naming
from transformer import kernels, sampling
from transformer.kernels.truncation import truncate_typical
from transformer.sampling import SamplingParams

sample = jax.jit(sampling.sample, static_argnames="num_ids")
truncate = jax.jit(
    lambda x, metadata: truncate_typical(
        kernels.truncate(x, metadata.top_k, metadata.top_p, metadata.min_p), metadata.typical_p
    )
)


def sample_rows(logits, rows, *, penalty_state=None, choices=None, steps=None, num_ids=None):
    """Sample one step; rows have separate slots if a penalty state is passed, else share one."""
    logits = np.asarray(logits, np.float32)
    own_slots = penalty_state is not None
    penalty_state = (
        sampling.init_penalty_state(1, logits.shape[1]) if penalty_state is None else penalty_state
    )
    count = len(rows)
    metadata = sampling.batch_sampling_params(
        rows,
        choices or [0] * count,
        steps or [0] * count,
        list(range(count)) if own_slots else [0] * count,
    )
    return sample(logits, penalty_state, metadata, num_ids=num_ids or logits.shape[1])


def ids_of_seeds(logits, num_draws=4000, **metadata):
    """Return the samples of `num_draws` seeds from the same logits [V]."""
    rows = [SamplingParams(seed=seed, **metadata) for seed in range(num_draws)]
    return np.asarray(sample_rows(np.tile(logits, (num_draws, 1)), rows)[0].ids)


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def reference(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0):
    """Return the truncated distribution [V] in float64, by sorting."""
    logits = np.asarray(logits, np.float64) / temperature
    if top_k:
        logits = np.where(logits >= np.sort(logits)[::-1][:top_k][-1], logits, -np.inf)
    if top_p < 1:
        order = np.argsort(-logits)
        before = np.cumsum(softmax(logits)[order]) - softmax(logits)[order]
        logits[order[(before >= top_p) & (np.arange(len(order)) > 0)]] = -np.inf
    p = softmax(logits)
    logits = np.where(p >= min_p * p.max(), logits, -np.inf)
    if typical_p < 1:
        logits[~is_typical(softmax(logits), typical_p)] = -np.inf
    return softmax(logits)


def is_typical(p, typical_p):
    """Return the mask of locally typical sampling, by the definition in arXiv:2202.00666."""
    information = -np.log(np.where(p > 0, p, 1))
    distance = np.where(p > 0, abs(information - p @ information), np.inf)
    order = np.argsort(distance)
    num_kept = 1 + np.sum(np.cumsum(p[order]) < typical_p)
    return np.isin(np.arange(len(p)), order[:num_kept])


def random_logits(*shape, seed=0, scale=2.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


CUTS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10**6},
    {"top_p": 0.0},
    {"top_p": 0.5},
    {"top_p": 0.95, "temperature": 1.3},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 9, "top_p": 0.8, "min_p": 0.05, "temperature": 1.5},
    {"typical_p": 0.0},
    {"typical_p": 0.3},
    {"typical_p": 0.9, "temperature": 1.3},
    {"typical_p": 0.5, "top_k": 8, "min_p": 0.02},
]


@pytest.mark.parametrize("params", CUTS, ids=str)
def test_sampled_frequencies_match_reference(params):
    logits = random_logits(12, scale=1.2)
    expected = reference(logits, **params)
    counts = np.bincount(ids_of_seeds(logits, **params), minlength=12)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))
    mask = expected > 0
    chi_square = np.sum((counts - 4000 * expected)[mask] ** 2 / (4000 * expected[mask]))
    freedom = mask.sum() - 1
    assert chi_square <= freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "params", [params for params in CUTS if set(params) - {"temperature"}], ids=str
)
def test_truncation_matches_sorting(params):
    """Samples would not cover a thousand tokens, so the masks are compared."""
    temperature = params.get("temperature", 1.0)
    for seed in range(20):
        logits = random_logits(1000, seed=seed)
        row = jax.tree.map(
            lambda leaf: leaf[0],
            sampling.batch_sampling_params([SamplingParams(**params)], [0], [0], [0]),
        )
        mask = np.asarray(truncate(jnp.asarray(logits / np.float32(temperature)), row)) > -np.inf
        expected = reference(logits, **params) > 0
        # rounding of float32 sums may move the last token of top-p
        has_mass = any(0 < params.get(name, 1) < 1 for name in ("top_p", "typical_p"))
        assert (mask != expected).sum() <= has_mass


def test_truncation_keeps_tied_tokens_together():
    logits = np.array([3.0, 2.0, 2.0, 2.0, 1.0], np.float32)
    assert set(ids_of_seeds(logits, 200, top_k=2)) == {0, 1, 2, 3}


def test_typical_p_can_exclude_the_likeliest_token():
    """Of one token with p = 0.4 and 60 with 0.01, the unlikely ones are nearest to the entropy."""
    logits = np.log(np.array([0.4] + [0.01] * 60, np.float32))
    assert 0 not in ids_of_seeds(logits, 200, typical_p=0.5)
    assert 0 in ids_of_seeds(logits, 200, typical_p=0.99)


def test_temperature_zero_is_greedy():
    logits = random_logits(16, 100)
    rows = [SamplingParams(temperature=0, top_k=50, top_p=0.1, seed=seed) for seed in range(16)]
    np.testing.assert_array_equal(sample_rows(logits, rows)[0].ids, logits.argmax(1))


@pytest.mark.parametrize("temperature", [1e-3, 1.5e-38, 1e-300])
def test_tiny_temperature_is_greedy(temperature):
    """Bug: logits / 1.5e-38 overflowed, and the first of several infinities was sampled."""
    logits = random_logits(4, 100, scale=8)
    rows = [SamplingParams(temperature=temperature, seed=seed) for seed in range(4)]
    np.testing.assert_array_equal(sample_rows(logits, rows)[0].ids, logits.argmax(1))
    rows = [SamplingParams(temperature=temperature, seed=seed, top_p=0.9) for seed in range(4)]
    np.testing.assert_array_equal(sample_rows(logits, rows)[0].ids, logits.argmax(1))


def penalty_state_of(prompt, generated, vocab_size, bias=None):
    counts = np.bincount(generated, minlength=vocab_size).astype(np.int32)
    is_in_prompt = np.isin(np.arange(vocab_size), prompt)
    bias = np.zeros(vocab_size, np.float32) if bias is None else bias
    return sampling.PenaltyState(counts[None], is_in_prompt[None], bias[None])


@pytest.mark.parametrize(
    "penalties",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"presence_penalty": -1.0, "frequency_penalty": -0.5},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    ],
    ids=str,
)
def test_penalties_match_reference(penalties):
    """The greedy token must be that of the NumPy reference."""
    prompt, generated = [1, 2, 3], [2, 4, 4, 4]
    presence = penalties.get("presence_penalty", 0)
    frequency = penalties.get("frequency_penalty", 0)
    repetition = penalties.get("repetition_penalty", 1)
    for seed in range(30):
        logits = random_logits(8, seed=seed, scale=1.0)
        counts = np.bincount(generated, minlength=8)
        expected = logits.astype(np.float64).copy()
        for i in {*prompt, *generated}:
            expected[i] = expected[i] / repetition if expected[i] > 0 else expected[i] * repetition
        expected -= frequency * counts + presence * (counts > 0)
        penalty_state = penalty_state_of(prompt, generated, 8)
        output, _ = sample_rows(
            logits[None], [SamplingParams(temperature=0, **penalties)], penalty_state=penalty_state
        )
        assert output.ids[0] == expected.argmax()


def test_logit_bias_changes_tokens_but_not_logprobs():
    logits = random_logits(1, 50)
    best = int(logits.argmax())
    bias = np.zeros(50, np.float32)
    bias[[7, best]] = 100, -100
    params = SamplingParams(logit_bias={7: 100.0, best: -100.0})
    output, _ = sample_rows(logits, [params], penalty_state=penalty_state_of([], [], 50, bias))
    assert output.ids[0] == 7
    np.testing.assert_allclose(output.logprobs[0], np.log(softmax(logits[0])[7]), atol=1e-5)
    assert output.top_ids[0, 0] == best
    bias[7] = 0
    many = [SamplingParams(seed=seed, logit_bias={best: -100.0}) for seed in range(500)]
    penalty_state = penalty_state_of([], [], 50, bias)
    metadata = sampling.batch_sampling_params(many, [0] * 500, [0] * 500, [0] * 500)
    output, _ = sample(np.tile(logits, (500, 1)), penalty_state, metadata, num_ids=50)
    assert best not in set(output.ids.tolist())


def test_reset_slot_clears_state_and_sample_counts_tokens():
    penalty_state = sampling.init_penalty_state(2, 6)
    logits = np.full((2, 6), -50, np.float32)
    logits[0, 3] = logits[1, 5] = 50
    for _ in range(2):
        _, penalty_state = sample_rows(
            logits, [SamplingParams(), SamplingParams()], penalty_state=penalty_state
        )
    np.testing.assert_array_equal(penalty_state.counts, [[0, 0, 0, 2, 0, 0], [0, 0, 0, 0, 0, 2]])
    penalty_state = sampling.reset_slot(
        penalty_state, 1, np.arange(6) == 2, np.arange(6, dtype=np.float32)
    )
    np.testing.assert_array_equal(penalty_state.counts, [[0, 0, 0, 2, 0, 0], [0] * 6])
    np.testing.assert_array_equal(penalty_state.is_in_prompt[1], np.arange(6) == 2)
    np.testing.assert_array_equal(penalty_state.bias[1], np.arange(6))
    assert not penalty_state.bias[0].any()


def test_padding_ids_are_never_sampled_nor_reported():
    logits = np.zeros((64, 32), np.float32)
    logits[:, 10:] = 100  # the padding has the largest logits
    rows = [SamplingParams(seed=seed, temperature=0 if seed % 2 else 2) for seed in range(64)]
    output, _ = sample_rows(logits, rows, num_ids=10)
    assert output.ids.max() < 10 and output.top_ids.max() < 10
    np.testing.assert_allclose(output.logprobs, math.log(1 / 10), atol=1e-6)
    # the same distribution as a table without padding
    np.testing.assert_array_equal(output.top_ids.shape, (64, 10))


def test_seed_choice_and_step_determine_sample():
    logits = np.zeros((1, 1000), np.float32)

    def sample_one(seed=1, choice=0, step=0):
        rows = [SamplingParams(seed=seed)]
        return int(sample_rows(logits, rows, choices=[choice], steps=[step])[0].ids[0])

    assert sample_one() == sample_one()
    different = [
        sample_one(),
        sample_one(seed=2),
        sample_one(choice=1),
        sample_one(step=1),
        sample_one(seed=1 + 2**32),
        sample_one(seed=-1),
    ]
    assert len(set(different)) == len(different)
    assert sample_one(choice=3, step=5) != sample_one(choice=5, step=3)


def test_logprobs_ignore_sampling_params_and_are_sorted():
    logits = random_logits(4, 300)
    rows = [SamplingParams(seed=seed, temperature=3.0, top_k=40, top_p=0.9) for seed in range(4)]
    output, _ = sample_rows(logits, rows)
    for b in range(4):
        expected = np.log(softmax(logits[b].astype(np.float64)))
        np.testing.assert_allclose(output.logprobs[b], expected[output.ids[b]], atol=1e-5)
        order = np.argsort(-expected)[: sampling.MAX_TOP_LOGPROBS]
        np.testing.assert_array_equal(output.top_ids[b], order)
        np.testing.assert_allclose(output.top_logprobs[b], expected[order], atol=1e-5)


def test_sampled_row_is_bitwise_equal_in_every_batch_size():
    all_params = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=5),
        SamplingParams(seed=6, temperature=0.7, top_p=0.9),
        SamplingParams(seed=7, top_k=30, min_p=0.02),
        SamplingParams(seed=8, presence_penalty=0.5, frequency_penalty=0.2, repetition_penalty=1.2),
    ]
    logits = random_logits(16, 5003, seed=3)
    rng = np.random.default_rng(1)
    penalty_state = sampling.PenaltyState(
        counts=rng.integers(0, 3, (16, 5003)).astype(np.int32),
        is_in_prompt=rng.random((16, 5003)) < 0.3,
        bias=np.zeros((16, 5003), np.float32),
    )
    for number, params in enumerate(all_params):
        rows = [params, *(all_params[(number + i) % 5] for i in range(1, 16))]
        outputs = {
            size: sample_rows(logits[:size], rows[:size], penalty_state=penalty_state)
            for size in (1, 2, 4, 8, 16)
        }
        alone, _ = outputs.pop(1)
        for output, _ in outputs.values():
            for name in ("ids", "logprobs", "top_ids", "top_logprobs"):
                np.testing.assert_array_equal(getattr(output, name)[0], getattr(alone, name)[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_p", -0.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("repetition_penalty", 0.0),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", {3: math.inf}),
    ],
)
def test_sampling_params_out_of_range_are_rejected_with_value(name, value):
    invalid = value[3] if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=naming(name, invalid)):
        SamplingParams(**{name: value})


def test_token_bitmask_limits_its_row_and_no_other():
    logits = random_logits(3, 70)
    is_allowed = np.ones((3, 96), bool)
    is_allowed[1] = np.isin(np.arange(96), [3, 31, 32, 69])
    is_allowed[2] = np.arange(96) == 64
    bitmask = np.packbits(is_allowed, axis=1, bitorder="little").view(np.uint32)
    rows = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.0), SamplingParams()]
    metadata = sampling.batch_sampling_params(rows, [0] * 3, [0] * 3, [0] * 3, bitmask)
    output, _ = sample(logits, sampling.init_penalty_state(1, 70), metadata, num_ids=70)
    limited = np.where(is_allowed[:, :70], logits, -np.inf)
    assert output.ids.tolist() == [*limited[:2].argmax(1), 64]
    unlimited, _ = sample_rows(logits, rows)
    assert np.array_equal(output.top_logprobs, unlimited.top_logprobs), (
        "reported before the bitmask"
    )


@pytest.mark.parametrize("cut", CUTS)
def test_token_bitmask_applies_before_truncation(cut):
    logits = random_logits(40)
    allowed = [1, 5, 8, 13, 21, 34]
    bits = np.packbits(np.isin(np.arange(64), allowed), bitorder="little").view(np.uint32)
    rows = [SamplingParams(seed=seed, **cut) for seed in range(4000)]
    zeros = [0] * len(rows)
    metadata = sampling.batch_sampling_params(
        rows, zeros, zeros, zeros, np.tile(bits, (len(rows), 1))
    )
    state = sampling.init_penalty_state(1, 40)
    ids = sample(np.tile(logits, (len(rows), 1)), state, metadata, num_ids=40)[0].ids
    counts = np.bincount(np.asarray(ids), minlength=40)
    assert np.allclose(counts[allowed] / len(rows), reference(logits[allowed], **cut), atol=0.03)
    assert counts[allowed].sum() == len(rows)
