"""The scheduler: examples of each rule, and invariants under random actions."""

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


NEXT_ID = itertools.count(1000)


def make_sequence(prompt=3, max_tokens=5, client="", ids=None, is_accepted=False, priority=0):
    """Return a sequence whose prompt is `ids`, or `prompt` ids that no other sequence has."""
    ids = tuple(ids or (next(NEXT_ID) for _ in range(prompt)))
    request = SequenceRequest(
        prompt=ids,
        max_tokens=max_tokens,
        sampling_params=SamplingParams(),
        client=client,
        is_accepted=is_accepted,
        priority=priority,
    )
    return Sequence(request, deliver=lambda event: None)


def make_scheduler(slots=4, blocks=20, waiting=200):
    return Scheduler(slots, blocks, BLOCK, CHUNK, waiting)


def run_work_item(scheduler, work):
    """Apply a work item as the engine and its runner do, and return the sequences that ended."""
    if isinstance(work, Prefill):
        sequence = work.sequence
        sequence.num_computed_tokens = min(
            sequence.num_computed_tokens + CHUNK, len(sequence.request.prompt)
        )
        scheduler.register(sequence)
        sequences = [] if sequence.is_prefilling else [sequence]
    else:
        sequences = list(work.sequences)
        for sequence in sequences:
            sequence.num_computed_tokens += 1
    ended = []
    for sequence in sequences:
        sequence.ids.append(sequence.num_generated)
        sequence.num_delivered = max(sequence.num_delivered, sequence.num_generated)
        if sequence.num_generated == sequence.request.max_tokens:
            scheduler.finish(sequence)
            ended.append(sequence)
    return ended


def check_invariants(scheduler, slots, blocks):
    """Assert that each slot has one sequence, and that reference counts match block tables."""
    all_blocks = range(1, blocks + 1)
    holders = Counter(block for sequence in scheduler.running for block in sequence.block_table)
    assert [scheduler.block_pool.ref_count(block) for block in all_blocks] == [
        holders[block] for block in all_blocks
    ]
    # Allocate all free blocks of a copy of the pool: each is returned once, and afterwards only
    # referenced blocks have cached chunks.
    spare = copy.deepcopy(scheduler.block_pool)
    allocated = [spare.allocate() for _ in range(spare.num_free_blocks)]
    assert sorted([*allocated, *holders]) == [*all_blocks]
    assert spare.num_cached_blocks == spare.num_free_blocks == 0
    for sequence in (*scheduler.waiting, *scheduler.running):
        for i in range(len(sequence.chunk_hashes)):
            match = spare.find_cached(sequence.chunk_hashes[i : i + 1])
            assert match is None or match[0] in holders
    assert sorted([*scheduler.free_slots, *(sequence.slot for sequence in scheduler.running)]) == [
        *range(slots)
    ]
    for sequence in scheduler.running:
        assert len(sequence.block_table) * BLOCK >= sequence.num_computed_tokens
    for sequence in scheduler.waiting:
        assert (
            not sequence.block_table
            and sequence.slot == -1
            and sequence.num_computed_tokens == 0
            and sequence.num_generated == 0
        )
    order = [(s.request.priority, s.admission_round) for s in scheduler.waiting]
    assert order == sorted(order)


def test_schedule_without_sequences_returns_none():
    idle = make_scheduler()
    assert idle.is_idle and idle.schedule() is None


def test_schedule_prompt_is_prefilled_in_chunks_then_decoded():
    s = make_scheduler()
    sequence = make_sequence(prompt=5, max_tokens=3)
    s.submit(sequence)
    for _ in range(3):
        assert s.schedule() == Prefill(sequence)
        run_work_item(s, Prefill(sequence))
    assert sequence.num_generated == 1
    for _ in range(2):
        assert s.schedule() == Decode((sequence,))
        run_work_item(s, Decode((sequence,)))
    assert s.is_idle and s.schedule() is None


def test_schedule_prefill_and_decode_alternate():
    s = make_scheduler()
    first, second = make_sequence(prompt=2, max_tokens=9), make_sequence(prompt=8)
    s.submit(first)
    run_work_item(s, s.schedule())
    s.submit(second)
    kinds = []
    for _ in range(8):
        work = s.schedule()
        kinds.append(type(work))
        run_work_item(s, work)
    assert kinds == [Decode, Prefill] * 4 or kinds == [Prefill, Decode] * 4


def test_schedule_prompts_of_equal_length_prefill_in_order():
    s = make_scheduler()
    sequences = [make_sequence(prompt=4) for _ in range(3)]
    for sequence in sequences:
        s.submit(sequence)
    prefilled = []
    while any(sequence.is_prefilling for sequence in sequences):
        work = s.schedule()
        prefilled += [work.sequence] if isinstance(work, Prefill) else []
        run_work_item(s, work)
    assert prefilled == [sequences[0]] * 2 + [sequences[1]] * 2 + [sequences[2]] * 2


def test_schedule_short_and_long_prompts_both_progress():
    s = make_scheduler()
    long, short = make_sequence(prompt=20), make_sequence(prompt=3, max_tokens=1)
    s.submit(long)
    run_work_item(s, s.schedule())
    s.submit(short)
    run_work_item(s, s.schedule())
    run_work_item(s, s.schedule())
    assert (long.num_computed_tokens, short.num_computed_tokens) in ((4, 2), (2, 4))
    while short in s.running:
        run_work_item(s, s.schedule())
    assert long.num_computed_tokens <= 8
    others = iter(lambda: make_sequence(prompt=2, max_tokens=1), None)
    while long.is_prefilling:  # short prompts keep coming
        if len(s.running) == 1:
            s.submit(next(others))
        work = s.schedule()
        assert isinstance(work, Prefill)
        run_work_item(s, work)


def test_admission_of_many_clients_is_round_robin():
    s = make_scheduler(slots=1)
    greedy = [make_sequence(client="greedy") for _ in range(4)]
    for sequence in greedy:
        s.submit(sequence)
    s.schedule()  # admits the first
    modest, other = make_sequence(client="modest"), make_sequence(client="other")
    s.submit(modest)
    s.submit(other)
    later = make_sequence(client="modest")
    s.submit(later)
    order = []
    while not s.is_idle:
        s.schedule()
        order.append(s.running[0])
        s.finish(s.running[0])
    assert order == [greedy[0], modest, other, greedy[1], later, greedy[2], greedy[3]]


def test_admission_other_clients_do_not_overtake_sequence_waiting_for_blocks():
    s = make_scheduler(blocks=4)
    first, long = make_sequence(prompt=7, client="a"), make_sequence(prompt=11, client="a")
    for sequence in (first, long):
        s.submit(sequence)
    s.schedule()
    others = [make_sequence(prompt=1, client=str(i)) for i in range(3)]
    for sequence in others:
        s.submit(sequence)
    s.schedule()
    assert s.running == [first] and s.waiting == [long, *others]


def test_admission_short_sequence_does_not_overtake_one_waiting_for_blocks():
    s = make_scheduler(blocks=4)
    first, long, short = make_sequence(prompt=7), make_sequence(prompt=11), make_sequence(prompt=1)
    for sequence in (first, long, short):
        s.submit(sequence)
    assert s.schedule() == Prefill(first)
    assert s.waiting == [long, short]
    s.finish(first)
    s.schedule()
    assert s.running == [long, short]


def test_admission_is_bounded_by_slots():
    s = make_scheduler(slots=2)
    sequences = [make_sequence() for _ in range(3)]
    for sequence in sequences:
        s.submit(sequence)
    s.schedule()
    assert s.running == sequences[:2] and s.waiting == sequences[2:]
    s.finish(sequences[0])
    s.schedule()
    assert s.running == sequences[1:]


def test_submit_to_full_queue_raises_busy():
    s = make_scheduler(waiting=1)
    s.submit(make_sequence())
    with pytest.raises(Busy) as busy:
        s.submit(make_sequence(client="another"))
    assert busy.value.num_waiting is None


def test_submit_beyond_quarter_of_queue_by_one_client_raises_busy():
    """Bug: one client could fill the queue, and all others got Busy."""
    s = make_scheduler(waiting=8)
    for _ in range(2):
        s.submit(make_sequence(client="greedy"))
    with pytest.raises(Busy) as busy:
        s.submit(make_sequence(client="greedy"))
    assert busy.value.num_waiting == 2
    s.submit(make_sequence(client="modest"))
    s.schedule()
    s.submit(make_sequence(client="greedy"))  # the client has no waiting sequences now


def test_submit_accepted_sequence_to_full_queue_is_queued():
    """Bug: a running request failed if the queue was full when its 17th choice was submitted."""
    s = make_scheduler(waiting=4)
    s.submit(make_sequence(client="a"))
    with pytest.raises(Busy):
        s.submit(make_sequence(client="a"))
    for _ in range(4):
        s.submit(make_sequence(client="a", is_accepted=True))
    with pytest.raises(Busy):
        s.submit(make_sequence(client="b"))


def test_finish_twice_frees_slot_and_blocks_once():
    s = make_scheduler(slots=2, blocks=3)
    running, waiting = make_sequence(prompt=7), make_sequence(prompt=7)
    s.submit(running)
    s.submit(waiting)
    s.schedule()
    for sequence in (waiting, running, running, waiting):
        s.finish(sequence)
        check_invariants(s, 2, 3)
    assert s.is_idle


def test_preemption_takes_youngest_and_readmits_it_first():
    s = make_scheduler(slots=3, blocks=3)
    old, young, late = (make_sequence(prompt=3, max_tokens=5) for _ in range(3))
    for sequence in (old, young, late):
        s.submit(sequence)
    preempted, ended = [], []
    while work := s.schedule():
        preempted += [
            sequence
            for sequence in s.waiting
            if sequence.num_delivered and sequence not in preempted
        ]
        ended += run_work_item(s, work)
        check_invariants(s, 3, 3)
    # Each sequence has one block. If one needs a second block, the youngest is preempted.
    assert preempted == [young, late]  # late is admitted when old has ended
    assert ended == [old, young, late]
    assert s.is_idle


def test_preemption_of_only_sequence_never_happens():
    s = make_scheduler(slots=1, blocks=3)
    sequence = make_sequence(prompt=3, max_tokens=9)
    s.submit(sequence)
    num_work_items = 0
    while not s.is_idle:
        run_work_item(s, s.schedule())
        num_work_items += 1
    assert sequence.num_generated == 9 and num_work_items == 2 + 8


def prefill_all(s, sequence):
    """Run work items until a prompt is prefilled, and return the block copies."""
    copies = []
    while sequence.is_prefilling:
        work = s.schedule()
        copies += [work.block_copy] if isinstance(work, Prefill) and work.block_copy else []
        run_work_item(s, work)
    return copies


def test_urgent_sequence_is_admitted_and_prefilled_before_those_that_can_wait():
    scheduler = make_scheduler(slots=2)
    waiting = [make_sequence(prompt=8, priority=1) for _ in range(4)]
    for sequence in waiting:
        scheduler.submit(sequence)
    run_work_item(scheduler, scheduler.schedule())
    assert scheduler.running == waiting[:2]
    urgent = make_sequence(prompt=8)
    scheduler.submit(urgent)
    # It takes the slot of the youngest at once, and none of its chunks waits for the others.
    for _ in range(4):
        work = scheduler.schedule()
        assert isinstance(work, Prefill) and work.sequence is urgent
        run_work_item(scheduler, work)
    assert scheduler.running == [waiting[0], urgent]
    assert scheduler.waiting == [waiting[1], *waiting[2:]]


def test_prefill_of_urgent_sequence_does_not_alternate_with_decoding_of_others():
    scheduler = make_scheduler()
    scheduler.submit(other := make_sequence(prompt=2, max_tokens=50, priority=1))
    run_work_item(scheduler, scheduler.schedule())
    assert isinstance(scheduler.schedule(), Decode)
    scheduler.submit(urgent := make_sequence(prompt=6))
    for _ in range(3):
        work = scheduler.schedule()
        assert isinstance(work, Prefill) and work.sequence is urgent
        run_work_item(scheduler, work)
    work = scheduler.schedule()
    assert isinstance(work, Decode) and set(work.sequences) == {other, urgent}


def test_sequences_that_can_wait_are_preempted_first():
    scheduler = make_scheduler(slots=3, blocks=4)
    scheduler.submit(first := make_sequence(prompt=3, priority=1))
    scheduler.submit(second := make_sequence(prompt=3, priority=1))
    scheduler.schedule()
    scheduler.submit(urgent := make_sequence(prompt=9))
    scheduler.schedule()
    assert scheduler.running == [first, urgent]
    assert scheduler.waiting == [second]


def test_prefix_cache_shares_whole_blocks_and_copies_partial_ones():
    s = make_scheduler(blocks=9)
    first = make_sequence(ids=range(11), max_tokens=6)  # blocks 0-3, 4-7, 8-10; chunks of 2
    s.submit(first)
    assert prefill_all(s, first) == []
    second = make_sequence(ids=[*range(10), 99, 98], max_tokens=6)
    s.submit(second)
    assert prefill_all(s, second) == [(first.block_table[2], second.block_table[2])]
    assert (
        second.block_table[:2] == first.block_table[:2]
        and second.block_table[2] != first.block_table[2]
    )
    assert second.num_cached_tokens == 10
    check_invariants(s, 4, 9)
    for sequence in (first, second):
        s.finish(sequence)
        check_invariants(s, 4, 9)
    # Cached: two shared whole blocks, and the third block of each sequence.
    assert (s.block_pool.num_free_blocks, s.block_pool.num_cached_blocks) == (9, 4)


def test_prefix_cache_full_match_still_computes_last_token():
    s = make_scheduler()
    first, second = make_sequence(ids=range(8)), make_sequence(ids=range(8))
    for sequence in (first, second):
        s.submit(sequence)
        prefill_all(s, sequence)
    assert second.num_cached_tokens == 6


def test_prefix_cache_filled_after_admission_is_used():
    s = make_scheduler()
    first, second = make_sequence(ids=range(12)), make_sequence(ids=[*range(11), 99])
    s.submit(first)
    s.submit(second)
    s.schedule()
    assert s.running == [first, second] and second.num_cached_tokens == 0
    allocated = list(second.block_table)
    prefill_all(s, first)
    prefill_all(s, second)
    assert second.num_cached_tokens >= 8 and second.block_table[:2] == first.block_table[:2]
    assert not set(allocated[:2]) & set(second.block_table)
    check_invariants(s, 4, 20)


@pytest.mark.parametrize("ids, blocks", [(range(9), 1), (range(100, 109), 2), (range(200, 205), 1)])
def test_eviction_is_least_recently_used_and_last_block_first(ids, blocks):
    s = make_scheduler(slots=1, blocks=5)
    for earlier in (range(8), range(100, 108), range(200, 204)):  # 3, 3 and 2 blocks
        sequence = make_sequence(ids=earlier, max_tokens=1)
        s.submit(sequence)
        prefill_all(s, sequence)
    sequence = make_sequence(ids=ids)
    s.submit(sequence)
    s.schedule()
    assert sequence.num_cached_tokens == blocks * BLOCK


def test_hash_chunks_covers_all_previous_tokens():
    assert hash_chunks(range(7), 2)[:2] == hash_chunks([0, 1, 2, 3], 2)
    assert len(hash_chunks(range(7), 2)) == 3
    assert hash_chunks([5, 1, 2, 3], 2)[1] != hash_chunks([0, 1, 2, 3], 2)[1]
    assert hash_chunks([], 2) == []


def test_reset_prefix_cache_then_nothing_is_cached():
    s = make_scheduler(blocks=6)
    sequence, finished = make_sequence(ids=range(8)), make_sequence(ids=range(50, 58))
    for each in (finished, sequence):
        s.submit(each)
        prefill_all(s, each)
    s.finish(finished)
    s.preempt(sequence)
    s.block_pool.reset_prefix_cache()
    check_invariants(s, 4, 6)
    s.schedule()
    assert sequence.num_cached_tokens == 0 and sequence.num_computed_tokens == 0


IDS = st.tuples(st.integers(0, 12), st.sampled_from([0, 1]), st.integers(0, 3)).map(
    lambda parts: (*range(parts[0]), *[50 + parts[1]] * parts[2], 99)
)


@settings(max_examples=200)
@given(st.integers(1, 4), st.integers(8, 11), st.integers(1, 4), st.data())
def test_random_actions_leak_no_slots_or_blocks_and_all_sequences_end(
    slots, blocks, max_batch_size, data
):
    """Submit, cancel and compute in random order; one sequence alone always fits."""
    s = make_scheduler(slots=slots, blocks=blocks, waiting=8)
    ended = Counter()
    accepted = []
    for action in data.draw(st.lists(st.sampled_from("sswwwwc"), max_size=60)):
        if action == "s":
            sequence = make_sequence(
                ids=data.draw(IDS),
                max_tokens=data.draw(st.integers(1, 12)),
                client=data.draw(st.sampled_from("abcdef")),
                priority=data.draw(st.integers(0, 1)),
            )
            try:
                s.submit(sequence)
                accepted.append(sequence)
            except Busy:
                same_client = [
                    other for other in s.waiting if other.request.client == sequence.request.client
                ]
                assert len(s.waiting) >= 8 or len(same_client) >= 2
        elif action == "c" and not s.is_idle:
            sequence = data.draw(st.sampled_from([*s.waiting, *s.running]))
            s.finish(sequence)
            ended[sequence] += 1
        elif action == "w" and (work := s.schedule(max_batch_size)):
            check_invariants(s, slots, blocks)
            if isinstance(work, Decode):
                assert len(work.sequences) <= max_batch_size
                assert all(
                    len(sequence.block_table) * BLOCK > sequence.num_computed_tokens
                    for sequence in work.sequences
                )
                # The next position is in a block that no other sequence holds.
                for sequence in work.sequences:
                    assert (
                        s.block_pool.ref_count(
                            sequence.block_table[sequence.num_computed_tokens // BLOCK]
                        )
                        == 1
                    )
            ended.update(run_work_item(s, work))
        check_invariants(s, slots, blocks)
    for _ in range(10_000):  # bounded: two sequences must not preempt each other for ever
        if s.is_idle:
            break
        work = s.schedule(max_batch_size)
        assert work is not None, "sequences wait but none is scheduled"
        ended.update(run_work_item(s, work))
        check_invariants(s, slots, blocks)
    assert ended == Counter(accepted)
    assert len(s.free_slots) == slots and s.block_pool.num_free_blocks == blocks
