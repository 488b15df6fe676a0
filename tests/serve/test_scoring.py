"""Compare prompt logprobs from chunked prefill with those of one forward pass."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer import cache, checkpoint, decoder
from transformer.engine import Done, Engine, PromptLogprobs, SequenceRequest, Token
from transformer.engine.runner import CHUNK_SIZE, NUM_SLOTS, Runner
from transformer.engine.scheduler import Scheduler
from transformer.sampling import SamplingParams

pytestmark = pytest.mark.heavy

TINY = Path(__file__).parents[1] / "golden/transformer/llama"
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def model():
    params, cfg, _ = checkpoint.load(TINY, dtype="float32")
    return params, cfg


@pytest.fixture(scope="module")
def runner(model):
    params, cfg = model
    return Runner(params, cfg, cfg.vocab_size, cache.blocks_for(cfg.max_seq_len), jnp.float32)


@pytest.fixture
def engine(model, runner):
    num_blocks = cache.blocks_for(model[1].max_seq_len)
    scheduler = Scheduler(NUM_SLOTS, num_blocks, cache.BLOCK_SIZE, CHUNK_SIZE, 10)
    engine = Engine(runner, scheduler, model[1].max_seq_len)
    yield engine
    engine.close(drain=False)


def prompt_of(length, cfg):
    return tuple(np.random.default_rng(length).integers(0, cfg.vocab_size, length).tolist())


def scored(events):
    return [
        token for event in events if isinstance(event, PromptLogprobs) for token in event.tokens
    ]


@pytest.mark.parametrize("length", [1, 2, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1])
def test_echo_logprobs_equal_forward_pass(model, engine, length):
    params, cfg = model
    prompt = prompt_of(length, cfg)
    *events, end = engine.generate(
        SequenceRequest(prompt=prompt, max_tokens=0, sampling_params=GREEDY, prompt_logprobs=5)
    )
    tokens = scored(events)
    assert end == Done("length") and not any(isinstance(event, Token) for event in events)
    assert tuple(token.id for token in tokens) == prompt
    assert tokens[0] == Token(prompt[0])
    logits, _ = decoder.forward(params, cfg, jnp.array([prompt]))
    logprobs = np.asarray(jax.nn.log_softmax(logits[0]))
    for position, token in enumerate(tokens[1:]):
        row = logprobs[position]
        assert abs(token.logprob - row[token.id]) < 1e-4
        likeliest = np.sort(row)[::-1][:5]
        np.testing.assert_allclose([value for _, value in token.top_logprobs], likeliest, atol=1e-4)
        np.testing.assert_allclose([row[id] for id, _ in token.top_logprobs], likeliest, atol=1e-4)


def test_scoring_does_not_change_completion(model, engine):
    prompt = prompt_of(CHUNK_SIZE + 5, model[1])
    plain = SequenceRequest(
        prompt=prompt, max_tokens=6, sampling_params=SamplingParams(seed=4), top_logprobs=3
    )
    both = SequenceRequest(**{**vars(plain), "prompt_logprobs": 0})
    *events, end = engine.generate(both)
    assert len(scored(events)) == len(prompt) and scored(events)[-1].top_logprobs == ()
    rest = [event for event in events if isinstance(event, Token)]
    assert [*rest, end] == [*engine.generate(plain)][1:]  # the first is Began


def test_prompt_of_context_length_is_scored(model, engine):
    prompt = prompt_of(model[1].max_seq_len, model[1])
    request = SequenceRequest(
        prompt=prompt, max_tokens=0, sampling_params=GREEDY, prompt_logprobs=0
    )
    assert len(scored(engine.generate(request))) == len(prompt)


def test_preempted_prompt_is_scored_once(model, runner):
    """A preempted sequence prefills its prompt again."""
    scheduler = Scheduler(
        NUM_SLOTS, cache.blocks_for(model[1].max_seq_len), cache.BLOCK_SIZE, CHUNK_SIZE, 10
    )
    engine = Engine(runner, scheduler, model[1].max_seq_len)
    request = SequenceRequest(
        prompt=prompt_of(CHUNK_SIZE + 5, model[1]),
        max_tokens=8,
        sampling_params=GREEDY,
        prompt_logprobs=1,
    )
    alone = [*engine.generate(request)]
    append_token = engine._append_token

    def start_over_once(row, drawn, i):
        append_token(row, drawn, i)
        if row.num_generated == 4 and not row.preempted_ids:
            scheduler.preempt(row)

    engine._append_token = start_over_once
    try:
        assert [*engine.generate(request)] == alone
    finally:
        engine.close(drain=False)


def test_end_token_is_in_logprobs(model, engine):
    """Evaluation harnesses request one token more than they score and expect its logprob."""
    prompt = prompt_of(9, model[1])
    once = SequenceRequest(prompt=prompt, max_tokens=1, sampling_params=GREEDY, top_logprobs=2)
    (first,) = [event for event in engine.generate(once) if isinstance(event, Token)]
    ends = {"prompt": prompt, "sampling_params": GREEDY, "stop_ids": frozenset({first.id})}
    with_logprobs = SequenceRequest(**ends, max_tokens=1, top_logprobs=2, prompt_logprobs=2)
    *events, end = engine.generate(with_logprobs)
    assert end == Done("stop", first) and len(scored(events)) == len(prompt)
    assert [*engine.generate(SequenceRequest(**ends, max_tokens=1))][-1] == Done("stop")
