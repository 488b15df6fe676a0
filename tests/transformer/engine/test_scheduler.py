"""The scheduler's rules by hand, and what must hold whatever happens, by random stories."""

import copy
import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.engine import Busy, SequenceRequest
from transformer.engine.block_pool import hash_chunks
from transformer.engine.scheduler import Decode, Prefill, Scheduler, Sequence
from transformer.sampling import SamplingParams

BLOCK = 4
CHUNK = 2


UNIQUE = itertools.count(1000)


def sequence(prompt=3, max_tokens=5, client="", ids=None, is_later=False):
    """A prompt of so many ids that nobody else has, or of those given."""
    ids = tuple(ids or (next(UNIQUE) for _ in range(prompt)))
    request = SequenceRequest(
        prompt=ids,
        max_tokens=max_tokens,
        sampling_params=SamplingParams(),
        client=client,
        is_accepted=is_later,
    )
    return Sequence(request, deliver=lambda event: None)


def scheduler(slots=4, blocks=20, waiting=200):
    return Scheduler(slots, blocks, BLOCK, CHUNK, waiting)


def do(scheduler, work):
    """What the engine and its computer do with a piece of work; gives the rows that ended."""
    if isinstance(work, Prefill):
        row = work.sequence
        row.num_computed_tokens = min(row.num_computed_tokens + CHUNK, len(row.request.prompt))
        scheduler.file(row)
        rows = [] if row.is_prefilling else [row]
    else:
        rows = list(work.sequences)
        for row in rows:
            row.length += 1
    ended = []
    for row in rows:
        row.ids.append(row.num_generated)
        row.num_delivered = max(row.num_delivered, row.num_generated)
        if row.num_generated == row.request.max_tokens:
            scheduler.finish(row)
            ended.append(row)
    return ended


def check(scheduler, slots, blocks):
    """Nothing is lost: slots have one owner, blocks as many as hold them; rows have their room."""
    everything = range(1, blocks + 1)
    holders = Counter(block for row in scheduler.active for block in row.blocks)
    assert [scheduler.blocks.holders(block) for block in everything] == [
        holders[block] for block in everything
    ]
    # Take all there are from a copy: each is there once, and only those in use are remembered.
    spare = copy.deepcopy(scheduler.blocks)
    taken = [spare.take() for _ in range(spare.available)]
    assert sorted([*taken, *holders]) == [*everything]
    assert spare.num_cached_blocks == spare.available == 0
    for row in (*scheduler.waiting, *scheduler.active):
        for i in range(len(row.names)):
            found = spare.find(row.names[i : i + 1])
            assert found is None or found[0] in holders
    assert sorted([*scheduler.free_slots, *(row.slot for row in scheduler.active)]) == [
        *range(slots)
    ]
    for row in scheduler.active:
        assert len(row.blocks) * BLOCK >= row.length
    for row in scheduler.waiting:
        assert not row.blocks and row.slot == -1 and row.length == 0 and row.generated == 0
    turns = [row.turn for row in scheduler.waiting]
    assert turns == sorted(turns)


def test_nothing_to_do():
    idle = scheduler()
    assert idle.is_idle and idle.schedule() is None


def test_a_prompt_is_read_in_chunks_then_decoded():
    s = scheduler()
    row = sequence(prompt=5, max_tokens=3)
    s.submit(row)
    for _ in range(3):
        assert s.schedule() == Prefill(row)
        do(s, Prefill(row))
    assert row.num_generated == 1
    for _ in range(2):
        assert s.schedule() == Decode((row,))
        do(s, Decode((row,)))
    assert s.is_idle and s.schedule() is None


def test_prefill_and_decode_alternate():
    s = scheduler()
    first, second = sequence(prompt=2, max_tokens=9), sequence(prompt=8)
    s.submit(first)
    do(s, s.schedule())
    s.submit(second)
    kinds = []
    for _ in range(8):
        work = s.schedule()
        kinds.append(type(work))
        do(s, work)
    assert kinds == [Decode, Prefill] * 4 or kinds == [Prefill, Decode] * 4


def test_prompts_are_read_in_the_order_they_came():
    s = scheduler()
    rows = [sequence(prompt=4) for _ in range(3)]
    for row in rows:
        s.submit(row)
    read = []
    while any(row.is_prefilling for row in rows):
        work = s.schedule()
        read += [work.sequence] if isinstance(work, Prefill) else []
        do(s, work)
    assert read == [rows[0]] * 2 + [rows[1]] * 2 + [rows[2]] * 2


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_the_other_way_round():
    s = scheduler()
    long, short = sequence(prompt=20), sequence(prompt=3, max_tokens=1)
    s.submit(long)
    do(s, s.schedule())
    s.submit(short)
    do(s, s.schedule())
    do(s, s.schedule())
    assert (long.num_computed_tokens, short.num_computed_tokens) in ((4, 2), (2, 4))
    while short in s.running:
        do(s, s.schedule())
    assert long.num_computed_tokens <= 8
    others = iter(lambda: sequence(prompt=2, max_tokens=1), None)
    while long.is_prefilling:  # short ones keep coming
        if len(s.running) == 1:
            s.submit(next(others))
        work = s.schedule()
        assert isinstance(work, Prefill)
        do(s, work)


def test_clients_are_admitted_in_turn():
    s = scheduler(slots=1)
    greedy = [sequence(client="greedy") for _ in range(4)]
    for row in greedy:
        s.submit(row)
    s.schedule()  # the first is in
    modest, other = sequence(client="modest"), sequence(client="other")
    s.submit(modest)
    s.submit(other)
    later = sequence(client="modest")
    s.submit(later)
    order = []
    while not s.is_idle:
        s.schedule()
        order.append(s.running[0])
        s.finish(s.running[0])
    assert order == [greedy[0], modest, other, greedy[1], later, greedy[2], greedy[3]]


def test_nobody_new_overtakes_what_waits_for_blocks():
    s = scheduler(blocks=4)
    first, long = sequence(prompt=7, client="a"), sequence(prompt=11, client="a")
    for row in (first, long):
        s.submit(row)
    s.schedule()
    others = [sequence(prompt=1, client=str(i)) for i in range(3)]
    for row in others:
        s.submit(row)
    s.schedule()
    assert s.running == [first] and s.waiting == [long, *others]


def test_a_short_request_does_not_overtake_one_that_waits_for_blocks():
    s = scheduler(blocks=4)
    first, long, short = sequence(prompt=7), sequence(prompt=11), sequence(prompt=1)
    for row in (first, long, short):
        s.submit(row)
    assert s.schedule() == Prefill(first)
    assert s.waiting == [long, short]
    s.finish(first)
    s.schedule()
    assert s.running == [long, short]


def test_slots_bound_what_runs():
    s = scheduler(slots=2)
    rows = [sequence() for _ in range(3)]
    for row in rows:
        s.submit(row)
    s.schedule()
    assert s.running == rows[:2] and s.waiting == rows[2:]
    s.finish(rows[0])
    s.schedule()
    assert s.running == rows[1:]


def test_a_full_queue_is_busy():
    s = scheduler(waiting=1)
    s.submit(sequence())
    with pytest.raises(Busy) as busy:
        s.submit(sequence(client="another"))
    assert busy.value.num_waiting is None


def test_one_client_fills_a_quarter_of_the_queue():
    """A single client could fill it, and everybody else was turned away."""
    s = scheduler(waiting=8)
    for _ in range(2):
        s.submit(sequence(client="greedy"))
    with pytest.raises(Busy) as busy:
        s.submit(sequence(client="greedy"))
    assert busy.value.num_waiting == 2
    s.submit(sequence(client="modest"))
    s.schedule()
    s.submit(sequence(client="greedy"))  # none of its own waits any more


def test_what_belongs_to_a_request_that_was_let_in_is_not_turned_away():
    """A full queue ended a running request whose seventeenth choice found no room in it."""
    s = scheduler(waiting=4)
    s.submit(sequence(client="a"))
    with pytest.raises(Busy):
        s.submit(sequence(client="a"))
    for _ in range(4):
        s.submit(sequence(client="a", is_later=True))
    with pytest.raises(Busy):
        s.submit(sequence(client="b"))


def test_finish_frees_everything_and_may_be_called_again():
    s = scheduler(slots=2, blocks=3)
    running, waiting = sequence(prompt=7), sequence(prompt=7)
    s.submit(running)
    s.submit(waiting)
    s.schedule()
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
    while work := s.schedule():
        put_back += [row for row in s.waiting if row.num_delivered and row not in put_back]
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
        do(s, s.schedule())
        works += 1
    assert row.num_generated == 9 and works == 2 + 8


def read(s, row):
    """Reads a prompt to its end; gives what had to be copied."""
    copies = []
    while row.is_prefilling:
        work = s.next()
        copies += [work.block_copy] if isinstance(work, Prefill) and work.block_copy else []
        do(s, work)
    return copies


def test_whole_blocks_are_shared_and_parts_are_copied():
    s = scheduler(blocks=9)
    first = sequence(ids=range(11), max_tokens=6)  # blocks 0-3, 4-7, 8-10; chunks of 2
    s.submit(first)
    assert read(s, first) == []
    second = sequence(ids=[*range(10), 99, 98], max_tokens=6)
    s.submit(second)
    assert read(s, second) == [(first.block_table[2], second.block_table[2])]
    assert (
        second.block_table[:2] == first.block_table[:2]
        and second.block_table[2] != first.block_table[2]
    )
    assert second.num_cached_tokens == 10
    check(s, 4, 9)
    for row in (first, second):
        s.finish(row)
        check(s, 4, 9)
    # Remembered: two whole blocks, and the third of each, whose chunks go different ways.
    assert (s.block_pool.num_free_blocks, s.block_pool.num_cached_blocks) == (9, 4)


def test_the_last_token_is_always_read():
    s = scheduler()
    first, second = sequence(ids=range(8)), sequence(ids=range(8))
    for row in (first, second):
        s.submit(row)
        read(s, row)
    assert second.num_cached_tokens == 6


def test_what_is_read_while_it_waits_for_its_turn_is_used_too():
    s = scheduler()
    first, second = sequence(ids=range(12)), sequence(ids=[*range(11), 99])
    s.submit(first)
    s.submit(second)
    s.schedule()
    assert s.running == [first, second] and second.num_cached_tokens == 0
    own = list(second.block_table)
    read(s, first)
    read(s, second)
    assert second.num_cached_tokens >= 8 and second.block_table[:2] == first.block_table[:2]
    assert not set(own[:2]) & set(second.block_table)
    check(s, 4, 20)


@pytest.mark.parametrize("ids, blocks", [(range(9), 1), (range(100, 109), 2), (range(200, 205), 1)])
def test_the_longest_unused_goes_first_and_ends_before_beginnings(ids, blocks):
    s = scheduler(slots=1, blocks=5)
    for earlier in (range(8), range(100, 108), range(200, 204)):  # 3, 3 and 2 blocks
        row = sequence(ids=earlier, max_tokens=1)
        s.submit(row)
        read(s, row)
    row = sequence(ids=ids)
    s.submit(row)
    s.schedule()
    assert row.num_cached_tokens == blocks * BLOCK


def test_names_stand_for_all_before_them():
    assert hash_chunks(range(7), 2)[:2] == hash_chunks([0, 1, 2, 3], 2)
    assert len(hash_chunks(range(7), 2)) == 3
    assert hash_chunks([5, 1, 2, 3], 2)[1] != hash_chunks([0, 1, 2, 3], 2)[1]
    assert hash_chunks([], 2) == []


def test_a_lost_cache_is_not_remembered():
    s = scheduler(blocks=6)
    row, gone = sequence(ids=range(8)), sequence(ids=range(50, 58))
    for each in (gone, row):
        s.submit(each)
        read(s, each)
    s.finish(gone)
    s.preempt(row)
    s.block_pool.reset_prefix_cache()
    check(s, 4, 6)
    s.schedule()
    assert row.num_cached_tokens == 0 and row.num_computed_tokens == 0


IDS = st.tuples(st.integers(0, 12), st.sampled_from([0, 1]), st.integers(0, 3)).map(
    lambda parts: (*range(parts[0]), *[50 + parts[1]] * parts[2], 99)
)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.integers(8, 11), st.integers(1, 4), st.data())
def test_whatever_happens_nothing_leaks_and_everybody_ends(slots, blocks, max_rows, data):
    """Requests come, are cancelled and run in a random order; a row alone always fits."""
    s = scheduler(slots=slots, blocks=blocks, waiting=8)
    ended = Counter()
    accepted = []
    for action in data.draw(st.lists(st.sampled_from("sswwwwc"), max_size=60)):
        if action == "s":
            row = sequence(
                ids=data.draw(IDS),
                max_tokens=data.draw(st.integers(1, 12)),
                client=data.draw(st.sampled_from("abcdef")),
            )
            try:
                s.submit(row)
                accepted.append(row)
            except Busy:
                own = [other for other in s.waiting if other.request.client == row.request.client]
                assert len(s.waiting) >= 8 or len(own) >= 2
        elif action == "c" and not s.is_idle:
            row = data.draw(st.sampled_from([*s.waiting, *s.running]))
            s.finish(row)
            ended[row] += 1
        elif action == "w" and (work := s.schedule(max_rows)):
            check(s, slots, blocks)
            if isinstance(work, Decode):
                assert len(work.sequences) <= max_rows
                assert all(
                    len(row.block_table) * BLOCK > row.num_computed_tokens for row in work.sequences
                )
                # Nobody writes where others read: the next position is in a block of one's own.
                for row in work.sequences:
                    assert (
                        s.block_pool.ref_count(row.block_table[row.num_computed_tokens // BLOCK])
                        == 1
                    )
            ended.update(do(s, work))
        check(s, slots, blocks)
    for _ in range(10_000):  # an end is in sight: no two rows chase each other for ever
        if s.is_idle:
            break
        work = s.schedule(max_rows)
        assert work is not None, "somebody waits and nobody works"
        ended.update(do(s, work))
        check(s, slots, blocks)
    assert ended == Counter(accepted)
    assert len(s.free_slots) == slots and s.block_pool.num_free_blocks == blocks
