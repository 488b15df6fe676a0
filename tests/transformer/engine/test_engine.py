"""The engine with a model whose numbers are computed by hand: the next token is last + position.

The model also keeps, in place of keys and values, the tokens themselves, and sees to it before
every draw that the blocks of a row hold exactly the row's tokens, whoever wrote them.
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
POISON = 666  # a prompt that holds this makes the computation fail


class Mock:
    """Next token = (last token + position of the last token) % 1000; `works` is what it did.

    Clear `gate` to hold the next piece of work back; `seconds` is what each takes at least.
    """

    seconds = 0.0
    max_rows = 16
    loses_its_cache = False  # in a failure, as a call that donated it may

    def __init__(self):
        self.works = []
        self.gate = threading.Event()
        self.gate.set()
        self.is_waiting = False
        self.memory = {}  # (block, offset) -> token

    def prefill(self, row, copy):
        self._pass("prefill", [row])
        if copy is not None:
            source, target = copy
            held = {offset: id for (block, offset), id in self.memory.items() if block == source}
            self.memory |= {(target, offset): id for offset, id in held.items()}
        assert row.length % CHUNK == 0, "chunks begin where chunks begin"
        end = min(row.length + CHUNK, len(row.request.prompt))
        for position in range(row.length, end):
            self._write(row, position)
        row.length = end
        return None if row.is_prefilling else self._draw([row])

    def decode(self, rows):
        self._pass("decode", rows)
        assert len(rows) <= self.max_rows
        for row in rows:
            self._write(row, row.length)
            row.length += 1
        return self._draw(rows)

    def recover(self):
        if self.loses_its_cache:
            self.memory.clear()
        return self.loses_its_cache

    def _write(self, row, position):
        self.memory[row.blocks[position // BLOCK], position % BLOCK] = row.ids[position]

    def _pass(self, kind, rows):
        self.is_waiting = True
        assert self.gate.wait(10), "held back for ever"
        self.is_waiting = False
        time.sleep(self.seconds)
        self.works.append((kind, len(rows)))
        if any(POISON in row.request.prompt for row in rows):
            raise ArithmeticError("poison")

    def _draw(self, rows):
        for row in rows:
            assert row.length == len(row.ids), "every token but the one to come was read"
            assert row.slot >= 0
            held = [self.memory[row.blocks[p // BLOCK], p % BLOCK] for p in range(row.length)]
            assert held == row.ids, "the blocks of a row hold its tokens"
        ids = np.array([(row.ids[-1] + row.length - 1) % 1000 for row in rows])
        top = np.stack([ids, ids + 1, ids + 2], 1)
        values = np.stack([-ids / 8, -ids / 8 - 1, -ids / 8 - 2], 1)
        return SampleOutput(ids, -ids / 8, top, values)


def expected(prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append((ids[-1] + len(ids) - 1) % 1000)
    return ids[len(prompt) :]


def ask(*prompt, max_tokens=5, **more):
    return SequenceRequest(
        prompt=prompt, max_tokens=max_tokens, sampling_params=SamplingParams(), **more
    )


def soon(seconds):
    return time.monotonic() + seconds


def tokens(events):
    return [event.id for event in events if isinstance(event, Token)]


class Setup:
    def __init__(self, slots=4, blocks=10, waiting=200):
        self.mock = Mock()
        self.device = Device()
        self.scheduler = Scheduler(slots, blocks, BLOCK, CHUNK, waiting)
        self.engine = Engine(self.mock, self.scheduler, CONTEXT, self.device)
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
        """Generates on a thread of its own; gives the list its events go to."""
        events = []
        iterator = self.engine.generate(request)
        threading.Thread(target=lambda: events.extend(iterator), daemon=True).start()
        return events

    def close(self):
        self.mock.gate.set()
        self.engine.close(drain=False)
        self.device.close()


@pytest.fixture
def setup():
    setup = Setup()
    yield setup
    setup.close()


async def collect(engine, request):
    return [event async for event in engine.stream(request)]


def test_tokens_are_those_computed_by_hand(setup):
    events = list(setup.engine.generate(ask(3, 1, 4, 1, 5, max_tokens=4)))
    # 5 stands at position 4: 9; 9 at 5: 14; 14 at 6: 20; 20 at 7: 27
    assert events == [PrefillDone(0), Token(9), Token(14), Token(20), Token(27), Done("length")]
    assert setup.mock.works == [("prefill", 1)] * 2 + [("decode", 1)] * 3
    assert setup.is_free()


def test_stream_and_generate_agree(setup):
    request = ask(1, 2, 3, max_tokens=7, top_logprobs=2)
    assert asyncio.run(collect(setup.engine, request)) == list(setup.engine.generate(request))


def test_a_stop_id_ends_it_and_is_not_delivered(setup):
    request = ask(3, 1, 4, 1, 5, max_tokens=9, stop_ids=frozenset({20, 99}))
    assert [*setup.engine.generate(request)][1:] == [Token(9), Token(14), Done("stop")]
    at_once = ask(3, 1, 4, 1, 5, stop_ids=frozenset({9}))
    assert [*setup.engine.generate(at_once)][1:] == [Done("stop")]


def test_logprobs_are_given_when_asked_for(setup):
    (_, token, done) = setup.engine.generate(ask(7, max_tokens=1, top_logprobs=2))
    assert token == Token(7, -0.875, ((7, -0.875), (8, -1.875))) and done == Done("length")
    (_, token, _) = setup.engine.generate(ask(7, max_tokens=1, top_logprobs=0))
    assert token == Token(7, -0.875, ())


def test_many_at_once_each_get_their_own(setup):
    async def main():
        return await asyncio.gather(
            *(collect(setup.engine, ask(i, i + 1, max_tokens=i + 1)) for i in range(20))
        )

    for i, events in enumerate(asyncio.run(main())):
        assert tokens(events) == expected((i, i + 1), i + 1)
        assert events[-1] == Done("length") and len(events) == i + 3
    assert max(rows for _, rows in setup.mock.works) == 4
    assert setup.is_free()


def test_rows_that_start_over_for_want_of_blocks_deliver_each_token_once():
    setup = Setup(slots=4, blocks=8)

    async def main():
        requests = [ask(i, max_tokens=40) for i in range(6)]
        return await asyncio.gather(*(collect(setup.engine, request) for request in requests))

    for i, events in enumerate(asyncio.run(main())):
        assert tokens(events) == expected((i,), 40) and events[-1] == Done("length")
    computed = sum(rows for kind, rows in setup.mock.works if kind == "decode")
    assert computed > 6 * 39, "nobody had to start over: the test shows nothing"
    assert setup.is_free()
    setup.close()


@pytest.mark.parametrize(
    ("request_", "facts"),
    [
        (ask(), ["prompt"]),
        (ask(1, max_tokens=0), ["token"]),
        (ask(1, max_tokens=CONTEXT), [1, CONTEXT]),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(setup, request_, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        next(setup.engine.generate(request_))
    with pytest.raises(ValueError, match=naming(*facts)):
        asyncio.run(collect(setup.engine, request_))


def test_the_whole_context_can_be_used(setup):
    assert len(tokens(setup.engine.generate(ask(*range(60), max_tokens=4)))) == 4


def test_a_full_queue_is_busy_and_room_comes_back():
    setup = Setup(slots=1, waiting=2)
    setup.mock.gate.clear()
    running = setup.start(ask(1))
    wait_until(lambda: setup.mock.is_waiting)
    waiting = [setup.start(ask(i, client=str(i))) for i in (2, 3)]
    wait_until(lambda: setup.num_accepted() == 3)
    with pytest.raises(Busy) as full:
        next(setup.engine.generate(ask(4)))
    assert 1 <= full.value.retry_after <= 60
    setup.mock.gate.set()
    wait_until(lambda: all(len(events) == 7 for events in [running, *waiting]))
    assert tokens(setup.engine.generate(ask(4))) == expected((4,), 5)
    setup.close()


def test_leaving_early_cancels_within_one_piece_of_work(setup):
    setup.mock.seconds = 0.005

    async def main():
        stream = setup.engine.stream(ask(1, max_tokens=60))
        assert isinstance(await anext(stream), PrefillDone)
        setup.mock.gate.clear()
        await asyncio.to_thread(wait_until, lambda: setup.mock.is_waiting)
        before = len(setup.mock.works)
        await stream.aclose()
        setup.mock.gate.set()
        await asyncio.to_thread(wait_until, setup.is_free)
        return before

    before = asyncio.run(main())
    assert len(setup.mock.works) == before + 1  # the one that was under way


def test_a_cancelled_task_cancels_its_request(setup):
    async def main():
        setup.mock.gate.clear()
        task = asyncio.create_task(collect(setup.engine, ask(1, max_tokens=60)))
        await asyncio.to_thread(wait_until, lambda: setup.mock.is_waiting)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    setup.mock.gate.set()
    wait_until(setup.is_free)
    assert len(setup.mock.works) == 1


def test_closing_the_blocking_iterator_cancels_too(setup):
    setup.mock.seconds = 0.01
    iterator = setup.engine.generate(ask(1, max_tokens=60))
    next(iterator)
    iterator.close()
    wait_until(setup.is_free)
    assert len(setup.mock.works) < 60


def test_one_cancelled_leaves_the_others_alone(setup):
    async def main():
        async def leave():
            stream = setup.engine.stream(ask(9, max_tokens=60))
            await anext(stream)
            await stream.aclose()

        stayed = [asyncio.create_task(collect(setup.engine, ask(i, max_tokens=30))) for i in (1, 2)]
        await leave()
        return await asyncio.gather(*stayed)

    for i, events in zip((1, 2), asyncio.run(main()), strict=True):
        assert tokens(events) == expected((i,), 30)


def test_a_failed_prefill_ends_only_its_own_request(setup):
    setup.mock.gate.clear()
    fine = setup.start(ask(1))
    wait_until(lambda: setup.mock.is_waiting)
    broken = setup.start(ask(POISON))
    wait_until(lambda: setup.num_accepted() == 2)
    setup.mock.gate.set()
    wait_until(lambda: len(fine) == 7 and len(broken) == 1)
    assert tokens(fine) == expected((1,), 5)
    assert isinstance(broken[0], Failed) and "poison" not in broken[0].message
    assert tokens(setup.engine.generate(ask(2))) == expected((2,), 5)
    assert setup.is_free()


def test_a_failed_decode_ends_its_rows_and_those_that_wait_go_on():
    setup = Setup(slots=2)
    decode = setup.mock.decode

    def fail_once(rows):
        if len(rows) < 2:
            return decode(rows)
        setup.mock.decode = decode
        raise MemoryError("no room")

    setup.mock.decode = fail_once
    setup.mock.gate.clear()
    events = [setup.start(ask(1, max_tokens=50))]
    wait_until(lambda: setup.mock.is_waiting)
    events.append(setup.start(ask(2, max_tokens=50)))
    wait_until(lambda: setup.num_accepted() == 2)
    events.append(setup.start(ask(3)))
    wait_until(lambda: setup.num_accepted() == 3)
    setup.mock.gate.set()
    wait_until(lambda: all(row and not isinstance(row[-1], Token) for row in events))
    assert isinstance(events[0][-1], Failed) and isinstance(events[1][-1], Failed)
    assert tokens(events[2]) == expected((3,), 5)
    assert setup.is_free()
    setup.close()


def test_close_when_idle_and_twice():
    setup = Setup()
    for _ in range(2):
        setup.engine.close(drain=True, timeout=5)
    assert [*setup.engine.generate(ask(1))] == [Done("cancelled")]


def test_close_drains(setup):
    setup.mock.gate.clear()
    events = [setup.start(ask(i)) for i in range(6)]  # two more than there are slots
    wait_until(lambda: setup.num_accepted() == 6)
    threading.Timer(0.05, setup.mock.gate.set).start()
    setup.engine.close(drain=True, timeout=10)
    wait_until(lambda: all(len(answer) == 7 for answer in events))
    assert [tokens(answer) for answer in events] == [expected((i,), 5) for i in range(6)]


def test_close_without_draining_cancels_everybody(setup):
    setup.mock.gate.clear()
    events = [setup.start(ask(i, max_tokens=60)) for i in range(6)]
    wait_until(lambda: setup.num_accepted() == 6)
    threading.Timer(0.05, setup.mock.gate.set).start()
    setup.engine.close(drain=False, timeout=10)
    assert setup.engine.is_idle and not setup.engine.is_alive
    wait_until(lambda: all(answer and answer[-1] == Done("cancelled") for answer in events))
    assert setup.is_free()


def test_close_stops_draining_when_time_is_up(setup):
    setup.mock.seconds = 0.05
    events = setup.start(ask(1, max_tokens=60))
    wait_until(lambda: setup.mock.works)
    setup.engine.close(drain=True, timeout=0.2)
    assert setup.engine.is_idle
    wait_until(lambda: Done("cancelled") in events)
    assert len(events) < 60


def ask_again(setup, *prompt, **more):
    """What somebody asks, and how many tokens of the prompt were known already."""
    began, *events = setup.engine.generate(ask(*prompt, **more))
    assert tokens(events) == expected(prompt, 5)
    return began.cached_tokens


def test_a_prompt_read_before_is_not_read_again(setup):
    prompt = tuple(range(21))  # two blocks, one chunk, one token
    assert ask_again(setup, *prompt) == 0
    assert ask_again(setup, *prompt) == 20  # the last token is always read
    assert setup.mock.works.count(("prefill", 1)) == 6 + 1
    assert ask_again(setup, *prompt[:20]) == 16  # what is left is a chunk, though it is known
    assert ask_again(setup, *prompt[:10], 7) == 8
    assert ask_again(setup, *prompt[:14], 7, 7) == 12  # a part of a block: copied
    assert ask_again(setup, *prompt[:14], 7, 7) == 12  # the chunk behind it is not full
    assert ask_again(setup, *prompt[:14], 7, 7, 8) == 16
    assert ask_again(setup, 5, *prompt[1:]) == 0  # the same chunks behind another beginning
    assert setup.is_free()


def test_who_does_not_want_to_share_neither_takes_nor_gives(setup):
    prompt = tuple(range(21))
    assert ask_again(setup, *prompt, reuse=False) == 0
    assert ask_again(setup, *prompt) == 0
    assert ask_again(setup, *prompt, reuse=False) == 0
    assert ask_again(setup, *prompt) == 20


def test_choices_of_one_prompt_read_it_once(setup):
    setup.mock.gate.clear()
    events = [setup.start(ask(*range(17), choice=i)) for i in range(4)]
    wait_until(lambda: setup.num_accepted() == 4)
    setup.mock.gate.set()
    wait_until(lambda: all(len(row) == 7 for row in events))
    assert sorted(row[0].cached_tokens for row in events) == [0, 16, 16, 16]
    assert setup.mock.works.count(("prefill", 1)) == 5 + 3
    assert all(tokens(row) == expected(tuple(range(17)), 5) for row in events)


def test_what_nobody_holds_is_forgotten_when_its_memory_is_needed():
    setup = Setup(blocks=8)
    first, second = tuple(range(30)), tuple(range(100, 130))
    assert ask_again(setup, *first) == 0
    assert ask_again(setup, *second) == 0  # 4 blocks each, and one more for what is generated
    assert ask_again(setup, *second) == 28
    assert ask_again(setup, *first) < 28
    assert setup.is_free()
    setup.close()


def test_a_request_ends_when_its_time_is_up(setup):
    setup.mock.seconds = 0.02
    events = [*setup.engine.generate(ask(1, max_tokens=60, deadline=soon(0.2)))]
    assert events[-1] == Done("timeout") and 3 < len(tokens(events)) < 12
    assert tokens(events) == expected((1,), len(tokens(events)))
    assert setup.is_free()


def test_time_runs_out_in_the_queue_too():
    setup = Setup(slots=1)
    setup.mock.seconds = 0.01
    running = setup.start(ask(1, max_tokens=60))
    wait_until(lambda: setup.mock.works)
    assert [*setup.engine.generate(ask(2, deadline=soon(0.1)))] == [Done("timeout")]
    wait_until(lambda: len(running) == 62)
    setup.close()


def test_who_does_not_read_is_given_up(setup, monkeypatch):
    """What a client did not read was kept for it without end."""
    monkeypatch.setattr("transformer.engine.engine.MAX_UNREAD", 10)

    async def main():
        stream = setup.engine.stream(ask(1, max_tokens=60))
        first = await anext(stream)
        await asyncio.to_thread(wait_until, setup.is_free)
        await asyncio.sleep(0)
        return [first, *[event async for event in stream]]

    events = asyncio.run(main())
    assert tokens(events) == expected((1,), 10)
    assert events[-1] == Failed(UNREAD_MESSAGE)


def test_steps_are_taken_in_parts_while_large_ones_are_not_compiled(setup):
    setup.mock.max_rows = 2
    setup.mock.gate.clear()
    events = [setup.start(ask(i, max_tokens=9)) for i in range(4)]
    wait_until(lambda: setup.num_accepted() == 4)
    setup.mock.gate.set()
    wait_until(lambda: all(len(row) == 11 for row in events))
    assert [tokens(row) for row in events] == [expected((i,), 9) for i in range(4)]
    steps = [rows for kind, rows in setup.mock.works if kind == "decode"]
    assert max(steps) == 2 and len(steps) <= 4 * 8 // 2 + 3


def test_what_it_did_is_counted(setup):
    list(setup.engine.generate(ask(*range(10), max_tokens=3)))
    list(setup.engine.generate(ask(*range(10), max_tokens=3)))
    list(setup.engine.generate(ask(POISON)))
    stats = setup.engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens) == (20, 8, 6)
    assert (stats.chunks, stats.steps, stats.decoded_rows) == (3 + 1, 4, 4)
    assert stats.requests == {"length": 2, "failed": 1}
    assert (stats.waiting, stats.running, stats.slots) == (0, 0, 4)
    # The block whose two chunks are known is kept; the one behind it held no whole chunk.
    assert (stats.blocks, stats.blocks_held, stats.blocks_cached) == (10, 0, 1)


def test_speed_is_that_of_a_request_alone():
    told = []
    setup = Setup()

    def on_speed(tokens, seconds):  # it writes a file: nobody should have to wait for that
        with ThreadPoolExecutor() as pool:
            assert pool.submit(setup.engine.stats).result(5)
        told.append((tokens, seconds))

    setup.engine._on_speed = on_speed
    setup.mock.seconds = 0.004
    list(setup.engine.generate(ask(1, max_tokens=20)))
    assert told == []  # too short to say anything
    list(setup.engine.generate(ask(1, max_tokens=41)))
    wait_until(lambda: told)  # after the end of the request, outside the lock
    (tokens_, seconds), *more = told
    assert tokens_ == 40 and 0.16 < seconds < 1 and not more
    together = [setup.start(ask(i, max_tokens=41)) for i in range(2)]
    wait_until(lambda: all(len(row) == 43 for row in together))
    assert len(told) <= 2  # the one that ended last may have been alone at its end, not before
    setup.close()


@pytest.mark.filterwarnings("ignore:Exception in thread device")
def test_a_dead_device_fails_what_runs_and_what_comes(setup):
    setup.mock.gate.clear()
    events = setup.start(ask(1))
    wait_until(lambda: setup.mock.is_waiting)

    def break_down():
        raise SystemExit

    setup.device._turn = break_down  # not an Exception: it gets past every guard
    setup.mock.gate.set()
    wait_until(lambda: events and isinstance(events[-1], Failed))
    wait_until(lambda: not setup.engine.is_alive)
    assert isinstance([*setup.engine.generate(ask(1))][-1], Failed)


BEGINNINGS = ((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12), (1, 2, 3, 4, 5, 7, 7, 7, 7, 7, 7, 7))
PROMPTS = st.tuples(st.sampled_from(BEGINNINGS), st.integers(0, 12), st.integers(0, 600)).map(
    lambda parts: (*parts[0][: parts[1]], parts[2])
)
STORY = st.lists(
    st.tuples(
        PROMPTS,
        st.integers(1, 30),
        st.one_of(st.none(), st.integers(0, 12)),  # leave after so many tokens
        st.sampled_from(["", "a", "b"]),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(STORY, st.integers(1, 4), st.integers(6, 8), st.integers(1, 4))
def test_every_request_ends_once_with_its_own_tokens(story, slots, blocks, max_rows):
    setup = Setup(slots, blocks)
    setup.mock.max_rows = max_rows

    async def one(prompt, count, leave, client, reuse):
        request = ask(*prompt, max_tokens=count, client=client, reuse=reuse)
        stream = setup.engine.stream(request)
        events = []
        async for event in stream:
            events.append(event)
            if len(tokens(events)) == leave:
                break
        await stream.aclose()
        return events

    async def main():
        return await asyncio.gather(*(one(*part) for part in story))

    for (prompt, count, leave, *_), events in zip(story, asyncio.run(main()), strict=True):
        got = tokens(events)
        assert got == expected(prompt, count)[: len(got)]
        assert sum(isinstance(event, PrefillDone) for event in events) == (
            1 if got else len(events) > 0
        )
        ends = [event for event in events if not isinstance(event, PrefillDone | Token)]
        if leave is not None and len(got) == leave:
            assert ends in ([], [Done("length")])
        else:
            assert ends == [Done("length")] and len(got) == count
    wait_until(setup.is_free)
    ended = setup.engine.stats().finished
    assert sum(ended.values()) == len(story) and ended.keys() <= {"length", "cancelled"}
    setup.close()


def test_failure_that_loses_the_cache_starts_the_others_over(setup):
    """A failed call may have given the donated cache up; every running row then went wrong."""
    mock, engine = setup.mock, setup.engine
    mock.loses_its_cache = True
    mock.seconds = 0.005
    healthy = engine.generate(ask(3, 4, max_tokens=60))
    first = [next(healthy) for _ in range(3)]
    assert isinstance(list(engine.generate(ask(POISON)))[-1], Failed)
    events = first + list(healthy)
    assert tokens(events) == expected((3, 4), 60)
    assert events[-1] == Done("length")
