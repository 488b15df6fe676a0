"""The same request and seed give a bitwise identical response under any load.

Two layers of the real chat model are enough: the others repeat the same operations on the same
shapes. The tests cover batch sizes 1 (in int4), 2, 4, 8 and 16, with sequences that start, end, and
are preempted. The slow test at the end uses the complete model over HTTP.
"""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from openai import OpenAI

from serve.models.compilation_cache import enable_compilation_cache
from serve.models.decoder import load_decoder
from tests.serve import scripted
from tests.waiting import wait_until
from transformer import cache, checkpoint
from transformer.engine import Done, Engine, PrefillDone, SequenceRequest, Token
from transformer.engine.runner import CHUNK_SIZE, NUM_SLOTS, Runner
from transformer.engine.scheduler import Scheduler
from transformer.sampling import SamplingParams

pytestmark = pytest.mark.heavy

CHAT = "smollm2-135m-instruct"
NUM_BLOCKS = 36
NUM_IDS = 49152


@pytest.fixture(
    scope="module", params=["int4", "bfloat16", pytest.param("int8", marks=pytest.mark.slow)]
)
def runner(request, model_file):
    enable_compilation_cache()
    path = model_file(CHAT)
    params, cfg, _ = checkpoint.load(path, dtype=request.param)
    params, cfg = params.replace(layers=params.layers[:2]), replace(cfg, num_layers=2)
    runner = Runner(params, cfg, NUM_IDS, NUM_BLOCKS, jnp.bfloat16)
    runner.compile("read", *runner.batch_sizes)
    return runner


def prompt(length, seed):
    return tuple(np.random.default_rng(seed).integers(0, NUM_IDS, length).tolist())


REQUESTS = [
    SequenceRequest(
        prompt=prompt(20, 1),
        max_tokens=12,
        sampling_params=SamplingParams(temperature=0),
        top_logprobs=5,
    ),
    SequenceRequest(
        prompt=prompt(250, 2),  # crosses into its second block of cache
        max_tokens=12,
        sampling_params=SamplingParams(
            seed=7, temperature=1.2, top_p=0.95, frequency_penalty=0.3, repetition_penalty=1.1
        ),
        top_logprobs=20,
        index=2,
    ),
]


def other(number):
    """Return the request with this number to run beside one of `REQUESTS`, and longer than it.

    Some of these requests have the same seed or prompt.
    """
    return SequenceRequest(
        prompt=prompt(5 + 23 * number, number),
        max_tokens=40 + number,
        sampling_params=SamplingParams(
            seed=number % 3 + 6, temperature=number % 4 / 2, top_k=10 * number
        ),
    )


def run_with_others(runner, request, num_others, num_blocks=NUM_BLOCKS):
    """Return the events of `request`, started while `num_others` other requests are decoding."""
    scheduler = Scheduler(NUM_SLOTS, num_blocks, cache.BLOCK_SIZE, CHUNK_SIZE, 100)
    engine = Engine(runner, scheduler, num_blocks * cache.BLOCK_SIZE)
    ended = []
    try:
        others = [engine.generate(other(number)) for number in range(num_others)]
        threads = [
            threading.Thread(target=lambda row=row: ended.append(list(row)[-1])) for row in others
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(scheduler.running) == num_others, 20)
        events = list(engine.generate(request))
    finally:
        engine.close(drain=False)
    for thread in threads:
        thread.join()
    assert len(ended) == num_others and isinstance(events[-1], Done)
    return events


@pytest.mark.parametrize("case", REQUESTS, ids=["greedy", "sampled"])
def test_concurrent_requests_do_not_change_output(runner, case):
    alone = run_with_others(runner, case, 0)
    assert len(alone) == 14 and isinstance(alone[0], PrefillDone)
    for num_others in (1, 3, 6, 10):  # batches of 2, 4, 8, 16
        assert run_with_others(runner, case, num_others) == alone, f"{num_others} others"


def test_preemption_does_not_change_output(runner):
    """Other requests use all cache blocks but two when the request needs its second block."""
    alone = run_with_others(runner, REQUESTS[1], 0)
    assert run_with_others(runner, REQUESTS[1], 5, num_blocks=7) == alone


def test_prefix_cache_does_not_change_output(runner):
    """Of a cached prefix, whole blocks are shared, and a partly filled block is copied."""
    long = prompt(700, 3)
    scheduler = Scheduler(NUM_SLOTS, NUM_BLOCKS, cache.BLOCK_SIZE, CHUNK_SIZE, 100)
    engine = Engine(runner, scheduler, NUM_BLOCKS * cache.BLOCK_SIZE)
    for length, cached in ((700, 640), (640, 576), (600, 576), (300, 256), (330, 320)):
        request = SequenceRequest(
            prompt=long[:length], max_tokens=8, sampling_params=SamplingParams(seed=length)
        )
        alone = list(engine.generate(replace(request, use_prefix_cache=False)))
        assert alone[0] == PrefillDone(0)
        if length == 700:
            assert list(engine.generate(request)) == alone
        assert list(engine.generate(request)) == [PrefillDone(cached), *alone[1:]]
    engine.close()


def test_split_decoding_steps_do_not_change_output(runner):
    alone = run_with_others(runner, REQUESTS[1], 0)
    all_programs = runner._programs
    runner._programs = {name: all_programs[name] for name in ("read", 2, 4)}
    try:
        assert runner.max_batch_size == 4
        assert run_with_others(runner, REQUESTS[1], 9) == alone
    finally:
        runner._programs = all_programs


def random_body(rng: random.Random, prefixes: list[str]) -> dict:
    """Return the body of a random request; some share a prefix."""
    words = [chr(ord("a") + rng.randrange(26)) * rng.randint(1, 6) for _ in range(80)]
    return {
        "model": CHAT,
        "prompt": rng.choice(prefixes) + " ".join(words[: rng.randint(1, 80)]),
        "max_tokens": rng.randint(1, 32),
        "temperature": rng.choice([0, 0.5, 1, 1.5]),
        "top_p": rng.choice([1, 1, 0.9, 0.5]),
        "frequency_penalty": rng.choice([0, 0, 0.5, -0.5]),
        "seed": rng.randrange(2**31),
        "logprobs": 3,
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_random_requests_over_http_equal_single_requests(model_file, dtype):
    """Requests run alone and with seven others, with and without prefix cache and streaming."""
    served = load_decoder(
        CHAT,
        model_file(CHAT),
        owned_by="test",
        cache_budget=256 * 2**20,
        dtype=dtype,
        max_batch_size=16,
    )
    tokenizer = served.tokenizer
    rng = random.Random(5)
    prefixes = ["", "Hello. ", " ".join(f"1{number}" for number in range(90))]
    bodies = [random_body(rng, prefixes) for _ in range(100)]

    def alone(body: dict) -> tuple[str, list[float]]:
        params = {
            name: body[name] for name in ("temperature", "top_p", "frequency_penalty", "seed")
        }
        request = SequenceRequest(
            prompt=tuple(tokenizer.encoding.encode_ordinary(body["prompt"])),
            max_tokens=body["max_tokens"],
            sampling_params=SamplingParams(**params),
            stop_ids=tokenizer.stop_ids,
            top_logprobs=3,
            use_prefix_cache=False,
        )
        tokens = [event for event in served.engine.generate(request) if isinstance(event, Token)]
        text = tokenizer.encoding.decode([token.id for token in tokens])
        return text, [token.logprob for token in tokens]

    def complete(client: OpenAI, body: dict) -> tuple[str, list[float]]:
        (choice,) = client.completions.create(**body).choices
        return choice.text, choice.logprobs.token_logprobs

    def streamed(client: OpenAI, body: dict) -> tuple[str, list[float]]:
        text, logprobs = "", []
        for chunk in client.completions.create(**body, stream=True):
            text += chunk.choices[0].text
            if chunk.choices[0].logprobs:
                logprobs += chunk.choices[0].logprobs.token_logprobs
        return text, logprobs

    try:
        expected = [alone(body) for body in bodies]
        assert len({text for text, _ in expected}) > 80, "the requests differ"
        before = served.engine.stats()
        with (
            scripted.serve_models(served) as address,
            OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client,
            ThreadPoolExecutor(8) as pool,
        ):
            for send in (complete, streamed):
                order = rng.sample(range(100), 100)
                responses = dict(
                    zip(
                        order,
                        pool.map(lambda i, send=send: send(client, bodies[i]), order),
                        strict=True,
                    )
                )
                for i, (text, logprobs) in enumerate(expected):
                    assert responses[i][0] == text, f"{send.__name__}: {bodies[i]}"
                    assert responses[i][1][: len(logprobs)] == pytest.approx(logprobs, abs=0)
        after = served.engine.stats()
        assert before.cached_tokens == 0 and after.cached_tokens > 5000
        rows, steps = (
            after.decoded_rows - before.decoded_rows,
            after.decode_steps - before.decode_steps,
        )
        assert rows > 2 * steps, "requests shared decode steps"
    finally:
        served.close(5.0)
