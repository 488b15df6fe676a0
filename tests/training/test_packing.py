"""Packed batches: each example once per epoch, separated by segments, determined by the step."""

import numpy as np
import pytest

from tests.naming import naming
from training import packing
from training.examples import Example


def make_examples(lengths) -> list[Example]:
    """Return examples of these lengths; all ids of example i are i + 1, half have weight 0."""
    return [
        Example(np.full(n, i + 1, np.int32), (np.arange(n) >= n // 2).astype(np.float32))
        for i, n in enumerate(lengths)
    ]


def unpack(batch) -> list[tuple[int, int]]:
    """Return (id, length) of each example in a batch of `make_examples`."""
    found = []
    for ids, segments in zip(batch["ids"], batch["segments"], strict=True):
        for segment in range(1, segments.max() + 1):
            (number,) = set(ids[segments == segment].tolist())
            found.append((number, int((segments == segment).sum())))
    return sorted(found)


def test_first_fit_assigns_examples_to_first_row_with_room():
    assert packing.first_fit([5, 4, 3, 6, 2, 1], 8) == [[0, 2], [1, 4, 5], [3]]
    with pytest.raises(ValueError, match=naming(9, 8)):
        packing.first_fit([9], 8)


def test_collate_packs_examples_into_given_rows():
    batch = packing.collate(make_examples([3, 2, 4]), [[0, 1], [2]], (3, 6))
    assert batch["ids"].tolist() == [[1, 1, 1, 2, 2, 0], [3, 3, 3, 3, 0, 0], [0] * 6]
    assert batch["segments"].tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0], [0] * 6]
    assert batch["weights"].tolist() == [[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 0, 0], [0] * 6]


@pytest.mark.parametrize(("number", "size", "most"), [(1, 4, 9), (50, 8, 60), (33, 5, 700)])
def test_epoch_has_each_example_once_in_batches_of_one_shape(number, size, most):
    lengths = np.random.default_rng(number).integers(1, most, number)
    batches = packing.Batches(make_examples(lengths), batch_size=size, epochs=2, seed=7)
    assert batches.steps == 2 * batches.steps_per_epoch == 2 * -(-number // size)
    epochs = []
    for epoch in range(2):
        found = []
        for step in range(batches.steps_per_epoch):
            batch = batches(epoch * batches.steps_per_epoch + step)
            assert {array.shape for array in batch.values()} == {batches.shape}
            unpacked = unpack(batch)
            assert len(unpacked) <= size
            found += unpacked
        epochs.append(found)
        assert sorted(found) == [(i + 1, int(n)) for i, n in enumerate(lengths)]
    assert number == 1 or epochs[0] != epochs[1]
    assert not batches.shape[0] % batches.micro_batches
    assert batches.shape[0] // batches.micro_batches * batches.shape[1] <= max(
        packing.MICRO_BATCH_TOKENS, most
    )


def test_batch_depends_on_seed_and_step_only():
    examples = make_examples(range(3, 30))
    first, second = (packing.Batches(examples, batch_size=4, epochs=3, seed=1) for _ in range(2))
    steps = range(first.steps)
    forward = [first(step)["ids"].tobytes() for step in steps]
    assert forward == [second(step)["ids"].tobytes() for step in reversed(steps)][::-1]
    other = packing.Batches(examples, batch_size=4, epochs=3, seed=2)
    assert forward != [other(step)["ids"].tobytes() for step in steps]


def test_short_examples_share_rows():
    batches = packing.Batches(make_examples([40] * 64), batch_size=16, epochs=1, seed=0)
    assert batches.shape[0] * batches.shape[1] <= 1.1 * 16 * 40


def test_rows_fit_the_longest_validation_example():
    batches = packing.Batches(make_examples([9, 9]), batch_size=2, epochs=1, seed=0, longest=100)
    assert batches.shape[1] >= 100
    (batch,) = packing.collate_all(make_examples([100]), batches.shape)
    assert unpack(batch) == [(1, 100)]


def test_collate_all_has_each_example_once():
    found = packing.collate_all(make_examples([5, 4, 3, 6, 2, 1]), (2, 8))
    assert [batch["ids"].shape for batch in found] == [(2, 8), (2, 8)]
    assert sorted(sum(map(unpack, found), [])) == [(1, 5), (2, 4), (3, 3), (4, 6), (5, 2), (6, 1)]


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("epochs", 0)])
def test_batches_with_argument_below_one_raises(name, value):
    with pytest.raises(ValueError, match=name):
        packing.Batches(
            make_examples([2]), **({"batch_size": 1, "epochs": 1} | {name: value}), seed=0
        )
    with pytest.raises(ValueError, match="examples"):
        packing.Batches([], batch_size=1, epochs=1, seed=0)
