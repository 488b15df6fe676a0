"""The engine with a fake model: the next token is the last token plus its position.

The fake KV cache stores the tokens themselves. Before sampling, the fake model asserts that the
blocks of a sequence contain exactly its tokens, whichever sequence wrote them.
"""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.naming import naming
from tests.waiting import wait_until
from transformer.engine import (
    Busy,
    Device,
    Done,
    Engine,
    Failed,
    GrammarError,
    PrefillDone,
    SequenceRequest,
    Token,
)
from transformer.engine.engine import UNREAD_MESSAGE
from transformer.engine.scheduler import Scheduler
from transformer.sampling import SampleOutput, SamplingParams

CONTEXT = 64
BLOCK = 8
CHUNK = 4
POISON = 666  # a prompt with this token makes the computation fail


class FakeRunner:
    """A fake model: next token = (last token + its position) % 1000.

    Attributes:
        work_items: ("prefill" or "decode", batch size) of each work item run so far.
        gate: clear it to block the next work item.
        seconds: the minimum duration of a work item.
        loses_cache: whether a failure loses the KV cache, as can happen if a call donated it.
    """

    seconds = 0.0
    max_batch_size = 16
    loses_cache = False

    def __init__(self):
        self.work_items = []
        self.gate = threading.Event()
        self.gate.set()
        self.is_waiting = False
        self.kv_cache = {}  # (block, offset) -> token

    def prefill(self, sequence, copy):
        self._record("prefill", [sequence])
        if copy is not None:
            source, target = copy
            ids = {offset: id for (block, offset), id in self.kv_cache.items() if block == source}
            self.kv_cache |= {(target, offset): id for offset, id in ids.items()}
        assert sequence.num_computed_tokens % CHUNK == 0, (
            "chunks must begin at multiples of the chunk size"
        )
        end = min(sequence.num_computed_tokens + CHUNK, len(sequence.request.prompt))
        for position in range(sequence.num_computed_tokens, end):
            self._write(sequence, position)
        sequence.num_computed_tokens = end
        return None if sequence.is_prefilling else self._sample([sequence])

    def decode(self, sequences):
        self._record("decode", sequences)
        assert len(sequences) <= self.max_batch_size
        for sequence in sequences:
            self._write(sequence, sequence.num_computed_tokens)
            sequence.num_computed_tokens += 1
        return self._sample(sequences)

    def recover(self):
        if self.loses_cache:
            self.kv_cache.clear()
        return self.loses_cache

    def _write(self, sequence, position):
        self.kv_cache[sequence.block_table[position // BLOCK], position % BLOCK] = sequence.ids[
            position
        ]

    def _record(self, kind, sequences):
        self.is_waiting = True
        assert self.gate.wait(10), "the gate was never opened"
        self.is_waiting = False
        time.sleep(self.seconds)
        self.work_items.append((kind, len(sequences)))
        if any(POISON in sequence.request.prompt for sequence in sequences):
            raise ArithmeticError("poison")

    def _sample(self, sequences):
        for sequence in sequences:
            assert sequence.num_computed_tokens == len(sequence.ids), "all tokens are computed"
            assert sequence.slot >= 0
            positions = range(sequence.num_computed_tokens)
            cached = [self.kv_cache[sequence.block_table[p // BLOCK], p % BLOCK] for p in positions]
            assert cached == sequence.ids, "the blocks of a sequence must contain its tokens"
        ids = np.array(
            [(sequence.ids[-1] + sequence.num_computed_tokens - 1) % 1000 for sequence in sequences]
        )
        top = np.stack([ids, ids + 1, ids + 2], 1)
        values = np.stack([-ids / 8, -ids / 8 - 1, -ids / 8 - 2], 1)
        return SampleOutput(ids, -ids / 8, top, values)


def expected(prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append((ids[-1] + len(ids) - 1) % 1000)
    return ids[len(prompt) :]


def make_request(*prompt, max_tokens=5, **more):
    return SequenceRequest(
        prompt=prompt, max_tokens=max_tokens, sampling_params=SamplingParams(), **more
    )


def seconds_from_now(seconds):
    return time.monotonic() + seconds


def tokens(events):
    return [event.id for event in events if isinstance(event, Token)]


class EngineFixture:
    def __init__(self, slots=4, blocks=10, waiting=200):
        self.runner = FakeRunner()
        self.device = Device()
        self.scheduler = Scheduler(slots, blocks, BLOCK, CHUNK, waiting)
        self.engine = Engine(self.runner, self.scheduler, CONTEXT, self.device)
        self.slots, self.blocks = slots, blocks

    def is_free(self):
        return (
            self.scheduler.is_idle
            and len(self.scheduler.free_slots) == self.slots
            and self.scheduler.block_pool.num_free_blocks == self.blocks
        )

    def num_accepted(self):
        return len(self.scheduler.waiting) + len(self.scheduler.running)

    def start(self, request):
        """Generate on a new thread, and return the list that receives the events."""
        events = []
        iterator = self.engine.generate(request)
        threading.Thread(target=lambda: events.extend(iterator), daemon=True).start()
        return events

    def close(self):
        self.runner.gate.set()
        self.engine.close(drain=False)
        self.device.close()


@pytest.fixture
def setup():
    setup = EngineFixture()
    yield setup
    setup.close()


async def collect(engine, request):
    return [event async for event in engine.stream(request)]


def test_generate_one_request_yields_expected_events(setup):
    events = list(setup.engine.generate(make_request(3, 1, 4, 1, 5, max_tokens=4)))
    # 5 stands at position 4: 9; 9 at 5: 14; 14 at 6: 20; 20 at 7: 27
    assert events == [PrefillDone(0), Token(9), Token(14), Token(20), Token(27), Done("length")]
    assert setup.runner.work_items == [("prefill", 1)] * 2 + [("decode", 1)] * 3
    assert setup.is_free()


def test_stream_yields_same_events_as_generate(setup):
    request = make_request(1, 2, 3, max_tokens=7, top_logprobs=2)
    assert asyncio.run(collect(setup.engine, request)) == list(setup.engine.generate(request))


def test_stop_id_sampled_ends_without_token(setup):
    request = make_request(3, 1, 4, 1, 5, max_tokens=9, stop_ids=frozenset({20, 99}))
    assert [*setup.engine.generate(request)][1:] == [Token(9), Token(14), Done("stop")]
    at_once = make_request(3, 1, 4, 1, 5, stop_ids=frozenset({9}))
    assert [*setup.engine.generate(at_once)][1:] == [Done("stop")]


def test_top_logprobs_requested_are_delivered(setup):
    (_, token, done) = setup.engine.generate(make_request(7, max_tokens=1, top_logprobs=2))
    assert token == Token(7, -0.875, ((7, -0.875), (8, -1.875))) and done == Done("length")
    (_, token, _) = setup.engine.generate(make_request(7, max_tokens=1, top_logprobs=0))
    assert token == Token(7, -0.875, ())


def test_stream_concurrent_requests_get_their_own_tokens(setup):
    async def main():
        return await asyncio.gather(
            *(collect(setup.engine, make_request(i, i + 1, max_tokens=i + 1)) for i in range(20))
        )

    for i, events in enumerate(asyncio.run(main())):
        assert tokens(events) == expected((i, i + 1), i + 1)
        assert events[-1] == Done("length") and len(events) == i + 3
    assert max(size for _, size in setup.runner.work_items) == 4
    assert setup.is_free()


def test_preemption_for_lack_of_blocks_delivers_each_token_once():
    setup = EngineFixture(slots=4, blocks=8)

    async def main():
        requests = [make_request(i, max_tokens=40) for i in range(6)]
        return await asyncio.gather(*(collect(setup.engine, request) for request in requests))

    for i, events in enumerate(asyncio.run(main())):
        assert tokens(events) == expected((i,), 40) and events[-1] == Done("length")
    computed = sum(size for kind, size in setup.runner.work_items if kind == "decode")
    assert computed > 6 * 39, "no sequence was preempted, so the test checks nothing; lower blocks"
    assert setup.is_free()
    setup.close()


@pytest.mark.parametrize(
    ("request_", "facts"),
    [
        (make_request(), ["prompt"]),
        (make_request(1, max_tokens=0), ["token"]),
        (make_request(1, max_tokens=CONTEXT), [1, CONTEXT]),
    ],
)
def test_request_invalid_raises_value_error(setup, request_, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        next(setup.engine.generate(request_))
    with pytest.raises(ValueError, match=naming(*facts)):
        asyncio.run(collect(setup.engine, request_))


def test_request_of_whole_context_is_answered(setup):
    assert len(tokens(setup.engine.generate(make_request(*range(60), max_tokens=4)))) == 4


def test_queue_full_raises_busy_until_request_ends():
    setup = EngineFixture(slots=1, waiting=2)
    setup.runner.gate.clear()
    running = setup.start(make_request(1))
    wait_until(lambda: setup.runner.is_waiting)
    waiting = [setup.start(make_request(i, client=str(i))) for i in (2, 3)]
    wait_until(lambda: setup.num_accepted() == 3)
    with pytest.raises(Busy) as full:
        next(setup.engine.generate(make_request(4)))
    assert 1 <= full.value.retry_after <= 60
    setup.runner.gate.set()
    wait_until(lambda: all(len(events) == 7 for events in [running, *waiting]))
    assert tokens(setup.engine.generate(make_request(4))) == expected((4,), 5)
    setup.close()


def test_stream_closed_early_cancels_within_one_work_item(setup):
    setup.runner.seconds = 0.005

    async def main():
        stream = setup.engine.stream(make_request(1, max_tokens=60))
        assert isinstance(await anext(stream), PrefillDone)
        setup.runner.gate.clear()
        await asyncio.to_thread(wait_until, lambda: setup.runner.is_waiting)
        before = len(setup.runner.work_items)
        await stream.aclose()
        setup.runner.gate.set()
        await asyncio.to_thread(wait_until, setup.is_free)
        return before

    before = asyncio.run(main())
    assert len(setup.runner.work_items) == before + 1  # the work item in progress


def test_stream_in_cancelled_task_cancels_request(setup):
    async def main():
        setup.runner.gate.clear()
        task = asyncio.create_task(collect(setup.engine, make_request(1, max_tokens=60)))
        await asyncio.to_thread(wait_until, lambda: setup.runner.is_waiting)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    setup.runner.gate.set()
    wait_until(setup.is_free)
    assert len(setup.runner.work_items) == 1


def test_generate_closed_early_cancels_request(setup):
    setup.runner.seconds = 0.01
    iterator = setup.engine.generate(make_request(1, max_tokens=60))
    next(iterator)
    iterator.close()
    wait_until(setup.is_free)
    assert len(setup.runner.work_items) < 60


def test_stream_one_cancelled_others_finish(setup):
    async def main():
        async def leave():
            stream = setup.engine.stream(make_request(9, max_tokens=60))
            await anext(stream)
            await stream.aclose()

        remaining = [
            asyncio.create_task(collect(setup.engine, make_request(i, max_tokens=30)))
            for i in (1, 2)
        ]
        await leave()
        return await asyncio.gather(*remaining)

    for i, events in zip((1, 2), asyncio.run(main()), strict=True):
        assert tokens(events) == expected((i,), 30)


def test_prefill_failure_ends_only_its_own_request(setup):
    setup.runner.gate.clear()
    healthy = setup.start(make_request(1))
    wait_until(lambda: setup.runner.is_waiting)
    failing = setup.start(make_request(POISON))
    wait_until(lambda: setup.num_accepted() == 2)
    setup.runner.gate.set()
    wait_until(lambda: len(healthy) == 7 and len(failing) == 1)
    assert tokens(healthy) == expected((1,), 5)
    assert isinstance(failing[0], Failed) and "poison" not in failing[0].message
    assert tokens(setup.engine.generate(make_request(2))) == expected((2,), 5)
    assert setup.is_free()


def test_decode_failure_ends_its_batch_and_waiting_requests_run():
    setup = EngineFixture(slots=2)
    decode = setup.runner.decode

    def fail_once(sequences):
        if len(sequences) < 2:
            return decode(sequences)
        setup.runner.decode = decode
        raise MemoryError("no room")

    setup.runner.decode = fail_once
    setup.runner.gate.clear()
    events = [setup.start(make_request(1, max_tokens=50))]
    wait_until(lambda: setup.runner.is_waiting)
    events.append(setup.start(make_request(2, max_tokens=50)))
    wait_until(lambda: setup.num_accepted() == 2)
    events.append(setup.start(make_request(3)))
    wait_until(lambda: setup.num_accepted() == 3)
    setup.runner.gate.set()
    wait_until(lambda: all(answer and not isinstance(answer[-1], Token) for answer in events))
    assert isinstance(events[0][-1], Failed) and isinstance(events[1][-1], Failed)
    assert tokens(events[2]) == expected((3,), 5)
    assert setup.is_free()
    setup.close()


def test_close_idle_engine_twice_then_requests_are_cancelled():
    setup = EngineFixture()
    for _ in range(2):
        setup.engine.close(drain=True, timeout=5)
    assert [*setup.engine.generate(make_request(1))] == [Done("cancelled")]


def test_close_with_drain_finishes_all_requests(setup):
    setup.runner.gate.clear()
    events = [setup.start(make_request(i)) for i in range(6)]  # two more than there are slots
    wait_until(lambda: setup.num_accepted() == 6)
    threading.Timer(0.05, setup.runner.gate.set).start()
    setup.engine.close(drain=True, timeout=10)
    wait_until(lambda: all(len(answer) == 7 for answer in events))
    assert [tokens(answer) for answer in events] == [expected((i,), 5) for i in range(6)]


def test_close_without_drain_cancels_all_requests(setup):
    setup.runner.gate.clear()
    events = [setup.start(make_request(i, max_tokens=60)) for i in range(6)]
    wait_until(lambda: setup.num_accepted() == 6)
    threading.Timer(0.05, setup.runner.gate.set).start()
    setup.engine.close(drain=False, timeout=10)
    assert setup.engine.is_idle and not setup.engine.is_alive
    wait_until(lambda: all(answer and answer[-1] == Done("cancelled") for answer in events))
    assert setup.is_free()


def test_close_with_drain_stops_at_timeout(setup):
    setup.runner.seconds = 0.05
    events = setup.start(make_request(1, max_tokens=60))
    wait_until(lambda: setup.runner.work_items)
    setup.engine.close(drain=True, timeout=0.2)
    assert setup.engine.is_idle
    wait_until(lambda: Done("cancelled") in events)
    assert len(events) < 60


def count_cached_tokens(setup, *prompt, **more):
    """Run a request, and return the number of prompt tokens taken from the prefix cache."""
    prefill_done, *events = setup.engine.generate(make_request(*prompt, **more))
    assert tokens(events) == expected(prompt, 5)
    return prefill_done.cached_tokens


def test_prefix_cache_repeated_prompt_skips_cached_chunks(setup):
    prompt = tuple(range(21))  # two blocks, one chunk, one token
    assert count_cached_tokens(setup, *prompt) == 0
    assert count_cached_tokens(setup, *prompt) == 20  # the last token is always computed
    assert setup.runner.work_items.count(("prefill", 1)) == 6 + 1
    assert (
        count_cached_tokens(setup, *prompt[:20]) == 16
    )  # the last chunk is cached, but contains the last token
    assert count_cached_tokens(setup, *prompt[:10], 7) == 8
    assert count_cached_tokens(setup, *prompt[:14], 7, 7) == 12  # part of a block: copied
    assert count_cached_tokens(setup, *prompt[:14], 7, 7) == 12  # the chunk after it is not full
    assert count_cached_tokens(setup, *prompt[:14], 7, 7, 8) == 16
    assert (
        count_cached_tokens(setup, 5, *prompt[1:]) == 0
    )  # different first chunk, so the same later chunks do not match
    assert setup.is_free()


def test_prefix_cache_disabled_neither_reads_nor_writes(setup):
    prompt = tuple(range(21))
    assert count_cached_tokens(setup, *prompt, use_prefix_cache=False) == 0
    assert count_cached_tokens(setup, *prompt) == 0
    assert count_cached_tokens(setup, *prompt, use_prefix_cache=False) == 0
    assert count_cached_tokens(setup, *prompt) == 20


def test_prefix_cache_prefills_prompt_of_four_choices_once(setup):
    setup.runner.gate.clear()
    events = [setup.start(make_request(*range(17), index=i)) for i in range(4)]
    wait_until(lambda: setup.num_accepted() == 4)
    setup.runner.gate.set()
    wait_until(lambda: all(len(answer) == 7 for answer in events))
    assert sorted(answer[0].cached_tokens for answer in events) == [0, 16, 16, 16]
    assert setup.runner.work_items.count(("prefill", 1)) == 5 + 3
    assert all(tokens(answer) == expected(tuple(range(17)), 5) for answer in events)


def test_prefix_cache_without_free_blocks_evicts_unreferenced_ones():
    setup = EngineFixture(blocks=8)
    first, second = tuple(range(30)), tuple(range(100, 130))
    assert count_cached_tokens(setup, *first) == 0
    assert (
        count_cached_tokens(setup, *second) == 0
    )  # 4 blocks each, and one more for generated tokens
    assert count_cached_tokens(setup, *second) == 28
    assert count_cached_tokens(setup, *first) < 28
    assert setup.is_free()
    setup.close()


def test_deadline_while_running_ends_request(setup):
    setup.runner.seconds = 0.02
    events = [
        *setup.engine.generate(make_request(1, max_tokens=60, deadline=seconds_from_now(0.2)))
    ]
    assert events[-1] == Done("timeout") and 3 < len(tokens(events)) < 12
    assert tokens(events) == expected((1,), len(tokens(events)))
    assert setup.is_free()


def test_deadline_while_waiting_ends_request():
    setup = EngineFixture(slots=1)
    setup.runner.seconds = 0.01
    running = setup.start(make_request(1, max_tokens=60))
    wait_until(lambda: setup.runner.work_items)
    assert [*setup.engine.generate(make_request(2, deadline=seconds_from_now(0.1)))] == [
        Done("timeout")
    ]
    wait_until(lambda: len(running) == 62)
    setup.close()


def test_stream_unread_events_cancel_request(setup, monkeypatch):
    """Bug: unread events of a slow client were stored without limit."""
    monkeypatch.setattr("transformer.engine.engine.MAX_UNREAD_EVENTS", 10)

    async def main():
        stream = setup.engine.stream(make_request(1, max_tokens=60))
        first = await anext(stream)
        await asyncio.to_thread(wait_until, setup.is_free)
        await asyncio.sleep(0)
        return [first, *[event async for event in stream]]

    events = asyncio.run(main())
    assert tokens(events) == expected((1,), 10)
    assert events[-1] == Failed(UNREAD_MESSAGE)


def test_decode_above_max_batch_size_is_split(setup):
    setup.runner.max_batch_size = 2
    setup.runner.gate.clear()
    events = [setup.start(make_request(i, max_tokens=9)) for i in range(4)]
    wait_until(lambda: setup.num_accepted() == 4)
    setup.runner.gate.set()
    wait_until(lambda: all(len(answer) == 11 for answer in events))
    assert [tokens(answer) for answer in events] == [expected((i,), 9) for i in range(4)]
    steps = [size for kind, size in setup.runner.work_items if kind == "decode"]
    assert max(steps) == 2 and len(steps) <= 4 * 8 // 2 + 3


def test_stats_after_requests_are_exact(setup):
    list(setup.engine.generate(make_request(*range(10), max_tokens=3)))
    list(setup.engine.generate(make_request(*range(10), max_tokens=3)))
    list(setup.engine.generate(make_request(POISON)))
    stats = setup.engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens) == (20, 8, 6)
    assert (stats.prefill_chunks, stats.decode_steps, stats.decoded_rows) == (3 + 1, 4, 4)
    assert stats.finished == {"length": 2, "failed": 1}
    assert (stats.waiting, stats.running, stats.slots) == (0, 0, 4)
    # The block with two cached chunks stays cached; the block after it had no whole chunk.
    assert (stats.blocks, stats.blocks_held, stats.blocks_cached) == (10, 0, 1)


def test_on_speed_is_called_only_for_request_that_ran_alone():
    speeds = []
    setup = EngineFixture()

    def on_speed(tokens, seconds):  # called outside the lock: other threads can read stats
        with ThreadPoolExecutor() as pool:
            assert pool.submit(setup.engine.stats).result(5)
        speeds.append((tokens, seconds))

    setup.engine._on_speed = on_speed
    setup.runner.seconds = 0.004
    list(setup.engine.generate(make_request(1, max_tokens=20)))
    assert speeds == []  # too short
    list(setup.engine.generate(make_request(1, max_tokens=41)))
    wait_until(lambda: speeds)  # after the end of the request, outside the lock
    (tokens_, seconds), *more = speeds
    assert tokens_ == 40 and 0.16 < seconds < 1 and not more
    together = [setup.start(make_request(i, max_tokens=41)) for i in range(2)]
    wait_until(lambda: all(len(answer) == 43 for answer in together))
    assert len(speeds) <= 2  # at most the last of the two counts as alone
    setup.close()


@pytest.mark.filterwarnings("ignore:Exception in thread device")
def test_device_thread_ended_fails_running_and_new_requests(setup):
    setup.runner.gate.clear()
    events = setup.start(make_request(1))
    wait_until(lambda: setup.runner.is_waiting)

    def break_down():
        raise SystemExit

    setup.device._run_one = break_down  # not an Exception: no handler catches it
    setup.runner.gate.set()
    wait_until(lambda: events and isinstance(events[-1], Failed))
    wait_until(lambda: not setup.engine.is_alive)
    assert isinstance([*setup.engine.generate(make_request(1))][-1], Failed)


PREFIXES = ((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12), (1, 2, 3, 4, 5, 7, 7, 7, 7, 7, 7, 7))
PROMPTS = st.tuples(st.sampled_from(PREFIXES), st.integers(0, 12), st.integers(0, 600)).map(
    lambda parts: (*parts[0][: parts[1]], parts[2])
)
SCENARIOS = st.lists(
    st.tuples(
        PROMPTS,
        st.integers(1, 30),
        st.one_of(st.none(), st.integers(0, 12)),  # close the stream after this many tokens
        st.sampled_from(["", "a", "b"]),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60)
@given(SCENARIOS, st.integers(1, 4), st.integers(6, 8), st.integers(1, 4))
def test_random_requests_each_end_once_with_their_own_tokens(
    scenario, slots, blocks, max_batch_size
):
    setup = EngineFixture(slots, blocks)
    setup.runner.max_batch_size = max_batch_size

    async def one(prompt, count, num_read, client, use_prefix_cache):
        request = make_request(
            *prompt, max_tokens=count, client=client, use_prefix_cache=use_prefix_cache
        )
        stream = setup.engine.stream(request)
        events = []
        async for event in stream:
            events.append(event)
            if len(tokens(events)) == num_read:
                break
        await stream.aclose()
        return events

    async def main():
        return await asyncio.gather(*(one(*part) for part in scenario))

    for (prompt, count, num_read, *_), events in zip(scenario, asyncio.run(main()), strict=True):
        generated = tokens(events)
        assert generated == expected(prompt, count)[: len(generated)]
        assert sum(isinstance(event, PrefillDone) for event in events) == (
            1 if generated else len(events) > 0
        )
        ends = [event for event in events if not isinstance(event, PrefillDone | Token)]
        if num_read is not None and len(generated) == num_read:
            assert ends in ([], [Done("length")])
        else:
            assert ends == [Done("length")] and len(generated) == count
    wait_until(setup.is_free)
    ended = setup.engine.stats().finished
    assert sum(ended.values()) == len(scenario) and ended.keys() <= {"length", "cancelled"}
    setup.close()


def test_failure_that_loses_cache_recomputes_other_sequences(setup):
    """Bug: if a failed call deleted the donated cache, every running sequence failed too."""
    runner, engine = setup.runner, setup.engine
    runner.loses_cache = True
    runner.seconds = 0.005
    healthy = engine.generate(make_request(3, 4, max_tokens=60))
    first = [next(healthy) for _ in range(3)]
    assert isinstance(list(engine.generate(make_request(POISON)))[-1], Failed)
    events = first + list(healthy)
    assert tokens(events) == expected((3, 4), 60)
    assert events[-1] == Done("length")


class FakeGrammar:
    """A grammar that checks the order of calls: one bitmask, then the sampled token.

    Args:
        length: the number of tokens of a complete text.
        failing_step: the step whose bitmask raises GrammarError.
    """

    def __init__(self, length, failing_step=None):
        self.length, self.failing_step = length, failing_step
        self.accepted = []  # the tokens of each matcher

    def matcher(self):
        self.accepted.append([])
        return FakeMatcher(self, self.accepted[-1])


class FakeMatcher:
    def __init__(self, grammar, tokens):
        self.grammar, self.tokens = grammar, tokens
        self.is_bitmask_read = False

    @property
    def is_finished(self):
        return len(self.tokens) == self.grammar.length

    def token_bitmask(self):
        if len(self.tokens) == self.grammar.failing_step:
            raise GrammarError("too complex")
        self.is_bitmask_read = True
        return np.full(32, 0xFFFFFFFF, np.uint32)

    def accept(self, token):
        assert self.is_bitmask_read, "a token was sampled without the bitmask of its step"
        self.is_bitmask_read = False
        self.tokens.append(token)


def test_grammar_complete_ends_sequence_with_stop(setup):
    grammar = FakeGrammar(length=3)
    events = list(setup.engine.generate(make_request(1, 2, max_tokens=9, grammar=grammar)))
    assert tokens(events) == grammar.accepted[0] == expected((1, 2), 3)
    assert events[-1] == Done("stop")
    assert setup.is_free()


@pytest.mark.parametrize("failing_step", [0, 2])
def test_grammar_failure_ends_only_its_own_sequence(setup, failing_step):
    grammar = FakeGrammar(length=9, failing_step=failing_step)

    async def main():
        requests = [make_request(1, grammar=grammar), make_request(2), make_request(3)]
        return await asyncio.gather(*(collect(setup.engine, request) for request in requests))

    failed, *others = asyncio.run(main())
    assert failed[-1] == Failed("too complex", is_grammar_error=True)
    assert tokens(failed) == expected((1,), failing_step)
    assert [tokens(events) for events in others] == [expected((2,), 5), expected((3,), 5)]
    assert setup.is_free()


def test_grammar_of_preempted_sequence_accepts_its_tokens_again():
    setup = EngineFixture(slots=4, blocks=8)
    grammars = [FakeGrammar(length=40) for _ in range(6)]

    async def main():
        requests = [make_request(i, max_tokens=50, grammar=g) for i, g in enumerate(grammars)]
        return await asyncio.gather(*(collect(setup.engine, request) for request in requests))

    for i, events in enumerate(asyncio.run(main())):
        assert tokens(events) == grammars[i].accepted[-1] == expected((i,), 40)
    assert max(len(grammar.accepted) for grammar in grammars) > 1, "no sequence was preempted"
    assert setup.is_free()
    setup.close()
