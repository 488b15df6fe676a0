"""Test the scoring of labels: tries, contextual calibration, temperature and calibration error."""

import jax
import numpy as np
import pytest

from transformer import decoder, scoring
from transformer.config import Config
from transformer.engine import Device, SequenceRequest, build_engine
from transformer.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0)


def test_trie_has_one_entry_for_each_beginning():
    labels = [(1,), (2, 3), (2, 4, 5)]
    assert scoring.trie(labels) == {(): (1, 2), (2,): (3, 4), (2, 4): (5,)}


def test_trie_empty_label_raises():
    with pytest.raises(ValueError):
        scoring.trie([(1,), ()])


@pytest.mark.parametrize(
    ("labels", "expected"), [([(1,), (1, 2)], True), ([(1, 2), (1, 3)], False), ([(1,)] * 2, False)]
)
def test_has_prefix_finds_labels_that_begin_others(labels, expected):
    assert scoring.has_prefix(labels) is expected


def test_label_logprobs_are_sums_over_tokens():
    logprobs = {(): {1: -1.0, 2: -2.0}, (2,): {3: -0.5}}
    assert scoring.label_logprobs([(1,), (2, 3)], logprobs).tolist() == [-1.0, -2.5]


def test_calibrate_of_the_content_free_input_is_uniform():
    prior = np.log([0.7, 0.2, 0.1])
    np.testing.assert_allclose(np.exp(scoring.calibrate(prior - 3, prior[None])), [1 / 3] * 3)


def test_calibrate_divides_by_the_mean_prior():
    logprobs = np.log([0.5, 0.5])
    content_free = np.log([[0.9, 0.1], [0.5, 0.5]])
    weights = np.array([0.5 / 0.7, 0.5 / 0.3])  # W p of Zhao et al., with the mean prior
    np.testing.assert_allclose(
        np.exp(scoring.calibrate(logprobs, content_free)), weights / weights.sum()
    )


def test_fit_temperature_recovers_the_temperature_of_samples():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(4000, 3)) * 2
    probabilities = np.exp(scoring.log_softmax(true))
    answers = [int(rng.choice(3, p=row)) for row in probabilities]
    assert scoring.fit_temperature(list(true * 2.5), answers) == pytest.approx(2.5, rel=0.1)


def test_expected_calibration_error_of_known_bins():
    bins = scoring.reliability([0.95, 0.95, 0.55, 1.0], [True, False, True, True])
    assert [bin.count for bin in bins] == [1, 3]
    # |0.55 - 1| for one example, |(0.95 + 0.95 + 1) / 3 - 2 / 3| for three
    expected = (0.45 + 3 * abs(2.9 / 3 - 2 / 3)) / 4
    assert scoring.expected_calibration_error(bins) == pytest.approx(expected)


@pytest.mark.heavy
def test_logprob_token_ids_equal_the_logprobs_of_prompts():
    """The engine returns the log-probabilities of given tokens, with and without cached blocks."""
    cfg = Config.debug(vocab_size=64, num_layers=1, max_seq_len=256)
    device = Device()
    params = decoder.init(jax.random.key(0), cfg)
    engine = build_engine(params, cfg, cache_bytes=2**22, max_batch_size=4, device=device)
    prompt, ids = tuple(np.random.default_rng(0).integers(0, 64, 150).tolist()), (5, 60, 7)
    scored = SequenceRequest(
        prompt=prompt,
        max_tokens=1,
        sampling_params=GREEDY,
        top_logprobs=3,
        logprob_token_ids=ids,
    )
    first, cached = (engine.generate_batch([scored])[0] for _ in range(2))
    assert first == cached
    assert [id for id, _ in first.tokens[0].top_logprobs] == list(ids)
    for id, logprob in first.tokens[0].top_logprobs:
        echo = SequenceRequest(
            prompt=(*prompt, id), max_tokens=0, sampling_params=GREEDY, prompt_logprobs=0
        )
        (completion,) = engine.generate_batch([echo])
        assert completion.prompt_logprobs[-1].logprob == pytest.approx(logprob, abs=1e-5)
    engine.close()
    device.close()
