"""Batches: every example once an epoch, apart from its neighbours, the same whenever asked."""

import numpy as np
import pytest

from tests.naming import naming
from training import packing
from training.examples import Example


def made(lengths) -> list[Example]:
    """Examples whose ids say which they are, and whose first half is not learned."""
    return [
        Example(np.full(n, i + 1, np.int32), (np.arange(n) >= n // 2).astype(np.float32))
        for i, n in enumerate(lengths)
    ]


def taken(batch) -> list[tuple[int, int]]:
    """Which examples a batch holds, and how many tokens of each."""
    found = []
    for ids, segments in zip(batch["ids"], batch["segments"], strict=True):
        for segment in range(1, segments.max() + 1):
            (own,) = set(ids[segments == segment].tolist())
            found.append((own, int((segments == segment).sum())))
    return sorted(found)


def test_first_fit_by_hand():
    assert packing.first_fit([5, 4, 3, 6, 2, 1], 8) == [[0, 2], [1, 4, 5], [3]]
    with pytest.raises(ValueError, match=naming(9, 8)):
        packing.first_fit([9], 8)


def test_a_row_by_hand():
    batch = packing.collate(made([3, 2, 4]), [[0, 1], [2]], (3, 6))
    assert batch["ids"].tolist() == [[1, 1, 1, 2, 2, 0], [3, 3, 3, 3, 0, 0], [0] * 6]
    assert batch["segments"].tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0], [0] * 6]
    assert batch["weights"].tolist() == [[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 0, 0], [0] * 6]


@pytest.mark.parametrize(("number", "size", "most"), [(1, 4, 9), (50, 8, 60), (33, 5, 700)])
def test_an_epoch_takes_every_example_once_in_batches_of_one_shape(number, size, most):
    lengths = np.random.default_rng(number).integers(1, most, number)
    batches = packing.Batches(made(lengths), batch_size=size, epochs=2, seed=7)
    assert batches.steps == 2 * batches.steps_per_epoch == 2 * -(-number // size)
    epochs = []
    for epoch in range(2):
        found = []
        for step in range(batches.steps_per_epoch):
            batch = batches(epoch * batches.steps_per_epoch + step)
            assert {array.shape for array in batch.values()} == {batches.shape}
            own = taken(batch)
            assert len(own) <= size
            found += own
        epochs.append(found)
        assert sorted(found) == [(i + 1, int(n)) for i, n in enumerate(lengths)]
    assert number == 1 or epochs[0] != epochs[1]
    assert not batches.shape[0] % batches.micro_batches
    assert batches.shape[0] // batches.micro_batches * batches.shape[1] <= max(
        packing.MICRO_BATCH_TOKENS, most
    )


def test_a_batch_is_a_function_of_seed_and_step():
    examples = made(range(3, 30))
    first, second = (packing.Batches(examples, batch_size=4, epochs=3, seed=1) for _ in range(2))
    steps = range(first.steps)
    forward = [first(step)["ids"].tobytes() for step in steps]
    assert forward == [second(step)["ids"].tobytes() for step in reversed(steps)][::-1]
    other = packing.Batches(examples, batch_size=4, epochs=3, seed=2)
    assert forward != [other(step)["ids"].tobytes() for step in steps]


def test_short_examples_share_rows():
    batches = packing.Batches(made([40] * 64), batch_size=16, epochs=1, seed=0)
    assert batches.shape[0] * batches.shape[1] <= 1.1 * 16 * 40


def test_rows_have_room_for_the_longest_of_a_validation_set():
    batches = packing.Batches(made([9, 9]), batch_size=2, epochs=1, seed=0, longest=100)
    assert batches.shape[1] >= 100
    (batch,) = packing.collate_all(made([100]), batches.shape)
    assert taken(batch) == [(1, 100)]


def test_validation_reads_all_once():
    found = packing.collate_all(made([5, 4, 3, 6, 2, 1]), (2, 8))
    assert [batch["ids"].shape for batch in found] == [(2, 8), (2, 8)]
    assert sorted(sum(map(taken, found), [])) == [(1, 5), (2, 4), (3, 3), (4, 6), (5, 2), (6, 1)]


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("epochs", 0)])
def test_numbers_below_one_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        packing.Batches(made([2]), **({"batch_size": 1, "epochs": 1} | {name: value}), seed=0)
    with pytest.raises(ValueError, match="examples"):
        packing.Batches([], batch_size=1, epochs=1, seed=0)
