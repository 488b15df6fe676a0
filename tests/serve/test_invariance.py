"""The same request and seed give the same answer under any load, to the last bit.

Two layers of the real chat model are enough: the others repeat the same operations on the same
shapes. Batch sizes 2, 4, 8 and 16 are all met, with rows that come, go, and start over.
"""

import threading
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from serve.engine import Began, Done, Engine, Request
from serve.engine.load import keep_compiled_programs
from serve.engine.runner import BUCKETS, CHUNK, NUM_SLOTS, Runner
from serve.engine.scheduler import Scheduler
from tests.serve.scripted import wait_until
from transformer import cache, checkpoint
from transformer.sampling import Sampling

NUM_BLOCKS = 36
NUM_IDS = 49152


@pytest.fixture(scope="module", params=["int8", "bfloat16"])
def runner(request, model_file):
    keep_compiled_programs()
    path = model_file("smollm2-135m-instruct")
    params, cfg, _ = checkpoint.load(path, format=request.param)
    params, cfg = params.replace(layers=params.layers[:2]), replace(cfg, num_layers=2)
    runner = Runner(params, cfg, NUM_IDS, NUM_BLOCKS, jnp.bfloat16)
    runner.compile("read", *BUCKETS)
    return runner


def prompt(length, seed):
    return tuple(np.random.default_rng(seed).integers(0, NUM_IDS, length).tolist())


WATCHED = [
    Request(prompt=prompt(20, 1), max_tokens=12, sampling=Sampling(temperature=0), top_logprobs=5),
    Request(
        prompt=prompt(250, 2),  # crosses into its second block of cache
        max_tokens=12,
        sampling=Sampling(seed=7, temperature=1.2, top_p=0.95, frequency_penalty=0.3),
        top_logprobs=20,
        choice=2,
    ),
]


def other(number):
    """Requests of all sorts, longer than the watched ones, some sharing seed or prompt."""
    return Request(
        prompt=prompt(5 + 23 * number, number),
        max_tokens=40 + number,
        sampling=Sampling(seed=number % 3 + 6, temperature=number % 4 / 2, top_k=10 * number),
    )


def answers(runner, watched, num_others, num_blocks=NUM_BLOCKS):
    """The events of `watched`, started when `num_others` others are already decoding."""
    scheduler = Scheduler(NUM_SLOTS, num_blocks, cache.BLOCK, CHUNK, 100)
    engine = Engine(runner, scheduler, num_blocks * cache.BLOCK)
    ended = []
    try:
        others = [engine.generate(other(number)) for number in range(num_others)]
        threads = [
            threading.Thread(target=lambda row=row: ended.append(list(row)[-1])) for row in others
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(scheduler.active) == num_others, 20)
        events = list(engine.generate(watched))
    finally:
        engine.close(drain=False)
    for thread in threads:
        thread.join()
    assert len(ended) == num_others and isinstance(events[-1], Done)
    return events


@pytest.mark.parametrize("watched", WATCHED, ids=["greedy", "sampled"])
def test_company_does_not_change_a_bit(runner, watched):
    alone = answers(runner, watched, 0)
    assert len(alone) == 14 and isinstance(alone[0], Began)
    for num_others in (1, 3, 6, 10):  # batches of 2, 4, 8, 16
        assert answers(runner, watched, num_others) == alone, f"{num_others} others"


def test_starting_over_for_want_of_memory_does_not_change_a_bit(runner):
    """The others hold all blocks but two when the watched row needs its second."""
    alone = answers(runner, WATCHED[1], 0)
    assert answers(runner, WATCHED[1], 5, num_blocks=7) == alone


def test_what_others_have_read_does_not_change_a_bit(runner):
    """Whole blocks shared, part of one copied, and the last chunk read again."""
    long = prompt(700, 3)
    scheduler = Scheduler(NUM_SLOTS, NUM_BLOCKS, cache.BLOCK, CHUNK, 100)
    engine = Engine(runner, scheduler, NUM_BLOCKS * cache.BLOCK)
    for length, cached in ((700, 640), (640, 576), (600, 576), (300, 256), (330, 320)):
        request = Request(prompt=long[:length], max_tokens=8, sampling=Sampling(seed=length))
        alone = list(engine.generate(replace(request, reuse=False)))
        assert alone[0] == Began(0)
        if length == 700:
            assert list(engine.generate(request)) == alone
        assert list(engine.generate(request)) == [Began(cached), *alone[1:]]
    engine.close()


def test_a_step_in_parts_does_not_change_a_bit(runner):
    alone = answers(runner, WATCHED[1], 0)
    whole = runner._programs
    runner._programs = {name: whole[name] for name in ("read", 2, 4)}
    try:
        assert runner.max_rows == 4
        assert answers(runner, WATCHED[1], 9) == alone
    finally:
        runner._programs = whole
