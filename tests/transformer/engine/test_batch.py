"""The engine as a library: batches of requests without a server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from transformer import decoder
from transformer.config import Config
from transformer.engine import Device, Done, Failed, SequenceRequest, Token, build_engine
from transformer.engine.engine import NAN_MESSAGE
from transformer.sampling import SamplingParams

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[3]
CFG = Config.debug(vocab_size=64, num_layers=1, max_seq_len=128)
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def engine():
    params = decoder.init(jax.random.key(0), CFG)
    device = Device()
    engine = build_engine(params, CFG, cache_bytes=2**22, max_batch_size=4, device=device)
    yield engine
    engine.close()
    device.close()


def requests(count: int) -> list[SequenceRequest]:
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, 64, rng.integers(1, 9)).tolist()) for _ in range(count)]
    return [
        SequenceRequest(prompt=prompt, max_tokens=5, sampling_params=GREEDY) for prompt in prompts
    ]


def test_generate_batch_many_requests_equals_generate_in_order(engine):
    batch = requests(300)  # more than the limit per client, and than the whole queue
    completions = engine.generate_batch(iter(batch))
    assert len(completions) == 300 and {completion.finish_reason for completion in completions} == {
        "length"
    }
    for request, completion in zip(batch[::50], completions[::50], strict=True):
        *events, end = engine.generate(request)
        assert end == Done("length")
        assert completion.ids == tuple(e.id for e in events if isinstance(e, Token))


def test_generate_batch_with_logprobs_returns_those_of_prompt_and_completion(engine):
    request = SequenceRequest(
        prompt=(1, 2, 3), max_tokens=2, sampling_params=GREEDY, top_logprobs=2, prompt_logprobs=1
    )
    (completion,) = engine.generate_batch([request])
    assert [token.id for token in completion.prompt_logprobs] == [1, 2, 3]
    assert (
        completion.prompt_logprobs[0].logprob is None and completion.prompt_logprobs[1].logprob < 0
    )
    assert [len(token.top_logprobs) for token in completion.tokens] == [2, 2]


def test_build_engine_nan_weight_raises_value_error():
    """Bug: a model with NaN in its weights generated the token 0 without an error."""
    params = decoder.init(jax.random.key(0), CFG)
    (layer,) = params.layers
    up = layer.up.replace(weight=layer.up.weight.at[0, 0].set(np.nan))
    with pytest.raises(ValueError, match="NaN"):
        build_engine(params.replace(layers=(layer.replace(up=up),)), CFG, cache_bytes=2**22)


def test_generate_nan_embedding_of_a_token_fails_only_its_sequences():
    params = decoder.init(jax.random.key(0), CFG)
    embed = params.embed.replace(weight=params.embed.weight.at[7].set(np.nan))
    params = params.replace(embed=embed, head=params.head or params.embed)
    device = Device()
    engine = build_engine(params, CFG, cache_bytes=2**22, device=device)
    bad, good = (
        list(engine.generate(SequenceRequest(prompt=(id,), max_tokens=2, sampling_params=GREEDY)))
        for id in (7, 8)
    )
    assert bad[-1] == Failed(NAN_MESSAGE)
    assert good[-1] == Done("length")
    engine.close()
    device.close()


def test_generate_batch_empty_returns_empty_list(engine):
    assert engine.generate_batch([]) == []


def test_generate_batch_with_too_long_request_cancels_others(engine):
    batch = [*requests(3), SequenceRequest(prompt=(1,) * 200, max_tokens=5, sampling_params=GREEDY)]
    with pytest.raises(ValueError):
        engine.generate_batch(batch)
    assert len(engine.generate_batch(requests(3))) == 3


RUN_SCRIPT = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0])
assert "serve" not in sys.modules
"""


@pytest.mark.slow
def test_example_generates_64_prompts_without_serve(model_file):
    command = [sys.executable, "-c", RUN_SCRIPT, ROOT / "examples/batch.py"]
    process = subprocess.run(
        [*command, model_file("smollm2-135m-instruct")],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    texts = [json.loads(line) for line in process.stdout.splitlines()]
    prompts = [f"The number that comes after {n} is" for n in range(64)]
    assert [text[: len(prompt)] for text, prompt in zip(texts, prompts, strict=True)] == prompts
    assert all(len(text) > len(prompt) for text, prompt in zip(texts, prompts, strict=True))
