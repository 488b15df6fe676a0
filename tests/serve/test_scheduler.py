"""The scheduler's rules by hand, and what must hold whatever happens, by random stories."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine import Busy, Request
from serve.engine.scheduler import Decode, Prefill, Scheduler, Sequence
from transformer.sampling import Sampling

BLOCK = 4
CHUNK = 2


def sequence(prompt=3, max_tokens=5):
    request = Request(prompt=(0,) * prompt, max_tokens=max_tokens, sampling=Sampling())
    return Sequence(request, deliver=lambda event: None)


def scheduler(slots=4, blocks=20, waiting=50):
    return Scheduler(slots, blocks, BLOCK, waiting)


def do(scheduler, work):
    """What the engine and its computer do with a piece of work; gives the rows that ended."""
    if isinstance(work, Prefill):
        row = work.sequence
        row.length = min(row.length + CHUNK, len(row.request.prompt))
        rows = [] if row.is_reading else [row]
    else:
        rows = list(work.sequences)
        for row in rows:
            row.length += 1
    ended = []
    for row in rows:
        row.ids.append(row.generated)
        row.delivered = max(row.delivered, row.generated)
        if row.generated == row.request.max_tokens:
            scheduler.finish(row)
            ended.append(row)
    return ended


def check(scheduler, slots, blocks):
    """Each slot and block has exactly one owner; a row has room for what it holds."""
    owned = [*scheduler.free_blocks, *(b for row in scheduler.active for b in row.blocks)]
    assert sorted(owned) == list(range(1, blocks + 1))
    assert sorted([*scheduler.free_slots, *(row.slot for row in scheduler.active)]) == [
        *range(slots)
    ]
    for row in scheduler.active:
        assert len(row.blocks) * BLOCK >= row.length
    for row in scheduler.waiting:
        assert not row.blocks and row.slot == -1 and row.length == 0 and row.generated == 0


def test_nothing_to_do():
    idle = scheduler()
    assert idle.is_idle and idle.next() is None


def test_a_prompt_is_read_in_chunks_then_decoded():
    s = scheduler()
    row = sequence(prompt=5, max_tokens=3)
    s.submit(row)
    for _ in range(3):
        assert s.next() == Prefill(row)
        do(s, Prefill(row))
    assert row.generated == 1
    for _ in range(2):
        assert s.next() == Decode((row,))
        do(s, Decode((row,)))
    assert s.is_idle and s.next() is None


def test_prefill_and_decode_alternate():
    s = scheduler()
    first, second = sequence(prompt=2, max_tokens=9), sequence(prompt=8)
    s.submit(first)
    do(s, s.next())
    s.submit(second)
    kinds = []
    for _ in range(8):
        work = s.next()
        kinds.append(type(work))
        do(s, work)
    assert kinds == [Decode, Prefill] * 4 or kinds == [Prefill, Decode] * 4


def test_prompts_are_read_in_the_order_they_came():
    s = scheduler()
    rows = [sequence(prompt=4) for _ in range(3)]
    for row in rows:
        s.submit(row)
    read = []
    while any(row.is_reading for row in rows):
        work = s.next()
        read += [work.sequence] if isinstance(work, Prefill) else []
        do(s, work)
    assert read == [rows[0]] * 2 + [rows[1]] * 2 + [rows[2]] * 2


def test_a_short_request_does_not_overtake_one_that_waits_for_blocks():
    s = scheduler(blocks=4)
    first, long, short = sequence(prompt=7), sequence(prompt=11), sequence(prompt=1)
    for row in (first, long, short):
        s.submit(row)
    assert s.next() == Prefill(first)
    assert list(s.waiting) == [long, short]
    s.finish(first)
    assert s.next() == Prefill(long)
    assert s.active == [long, short]


def test_slots_bound_what_runs():
    s = scheduler(slots=2)
    rows = [sequence() for _ in range(3)]
    for row in rows:
        s.submit(row)
    s.next()
    assert s.active == rows[:2] and list(s.waiting) == rows[2:]
    s.finish(rows[0])
    s.next()
    assert s.active == rows[1:]


def test_a_full_queue_is_busy():
    s = scheduler(waiting=1)
    s.submit(sequence())
    with pytest.raises(Busy):
        s.submit(sequence())


def test_finish_frees_everything_and_may_be_called_again():
    s = scheduler(slots=2, blocks=3)
    running, waiting = sequence(prompt=7), sequence(prompt=7)
    s.submit(running)
    s.submit(waiting)
    s.next()
    for row in (waiting, running, running, waiting):
        s.finish(row)
        check(s, 2, 3)
    assert s.is_idle


def test_the_youngest_gives_way_when_blocks_run_out_and_comes_back_first():
    s = scheduler(slots=3, blocks=3)
    old, young, late = (sequence(prompt=3, max_tokens=5) for _ in range(3))
    for row in (old, young, late):
        s.submit(row)
    put_back, ended = [], []
    while work := s.next():
        put_back += [row for row in s.waiting if row.delivered and row not in put_back]
        ended += do(s, work)
        check(s, 3, 3)
    # One block each: the first to need a second takes that of the youngest, and so on.
    assert put_back == [late, young] or put_back == [young, late] or put_back == [late]
    assert ended == [old, young, late]
    assert s.is_idle


def test_a_sequence_alone_never_gives_way():
    s = scheduler(slots=1, blocks=3)
    row = sequence(prompt=3, max_tokens=9)
    s.submit(row)
    works = 0
    while not s.is_idle:
        do(s, s.next())
        works += 1
    assert row.generated == 9 and works == 2 + 8


ROWS = st.tuples(st.integers(1, 12), st.integers(1, 12))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.integers(6, 9), st.data())
def test_whatever_happens_nothing_leaks_and_everybody_ends(slots, blocks, data):
    """Requests come, are cancelled and run in a random order; a row alone always fits."""
    s = scheduler(slots=slots, blocks=blocks, waiting=6)
    ended = Counter()
    accepted = []
    for action in data.draw(st.lists(st.sampled_from("swwwwc"), max_size=60)):
        if action == "s":
            row = sequence(*data.draw(ROWS))
            try:
                s.submit(row)
                accepted.append(row)
            except Busy:
                assert len(s.waiting) >= 6
        elif action == "c" and not s.is_idle:
            row = data.draw(st.sampled_from([*s.waiting, *s.active]))
            s.finish(row)
            ended[row] += 1
        elif action == "w" and (work := s.next()):
            check(s, slots, blocks)
            if isinstance(work, Decode):
                assert all(len(row.blocks) * BLOCK > row.length for row in work.sequences)
            ended.update(do(s, work))
        check(s, slots, blocks)
    for _ in range(10_000):  # an end is in sight: no two rows chase each other for ever
        if s.is_idle:
            break
        work = s.next()
        assert work is not None, "somebody waits and nobody works"
        ended.update(do(s, work))
        check(s, slots, blocks)
    assert ended == Counter(accepted)
    assert len(s.free_slots) == slots and len(s.free_blocks) == blocks
