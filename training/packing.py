"""Sequence packing: examples of different lengths in batches of one shape, shuffled by a seed.

A batch holds `batch_size` examples. Several examples can share a row: each goes into the first row
with enough room (first fit). `segments` separates the examples of a row, so that they do not attend
to each other. All batches have the shape of the largest batch, so that the training step is
compiled once.

The width of the rows is chosen by estimated cost: wide rows waste less room on padding at their
ends, but the cost of attention per token grows with the width.

The batch of a step depends only on the data, the seed and the number of the step, so that a run can
resume from the number of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from training.examples import Example

WIDTH_MULTIPLE = 32  # row widths are multiples of this
MAX_WIDTH = 1024  # maximum tokens per row, unless an example is longer
ATTENTION_CROSSOVER = 4096  # width at which attention costs as much as the rest of a small model
MICRO_BATCH_TOKENS = 1024  # maximum tokens of a micro-batch, unless a row is longer


class Batches:
    """The batches of a training run: `batches(step)`, for steps from 0.

    Each epoch shuffles the examples anew. The last batch of an epoch holds the remaining examples.

    Attributes:
        examples: all examples.
        batch_size: examples per batch.
        seed: the seed of the order of examples.
        steps_per_epoch: number of batches per epoch.
        steps: number of batches in all epochs.
        shape: (rows, tokens per row) of every batch; `rows` is a multiple of `micro_batches`.
        micro_batches: the number of micro-batches to split a batch into.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        epochs: int,
        seed: int,
        longest: int = 0,
    ):
        """Choose the shape of the batches.

        Args:
            examples: all examples.
            batch_size: examples per batch.
            epochs: the number of epochs.
            seed: the seed of the order of examples.
            longest: a number of tokens that must also fit into a row, such as the length of the
                longest validation example.

        Raises:
            ValueError: `examples` is empty, or `batch_size` or `epochs` is below 1.
        """
        for name, value in (
            ("batch_size", batch_size),
            ("epochs", epochs),
            ("examples", len(examples)),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.examples = examples
        self.batch_size = min(batch_size, len(examples))
        self.seed = seed
        self.steps_per_epoch = -(-len(examples) // self.batch_size)
        self.steps = epochs * self.steps_per_epoch
        self._lengths = np.array([len(example) for example in examples])
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))  # cached: (epoch, order)
        width = self._best_width(max(longest, int(self._lengths.max())))
        rows = max(
            len(first_fit(self._lengths[group], width)) for group in self._groups(self.steps)
        )
        self.micro_batches = -(-rows // max(1, MICRO_BATCH_TOKENS // width))
        self.shape = (-(-rows // self.micro_batches) * self.micro_batches, width)

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Return the batch of a step; see `collate`."""
        group = self._group(step)
        rows = first_fit(self._lengths[group], self.shape[1])
        return collate([self.examples[i] for i in group], rows, self.shape)

    def _group(self, step: int) -> np.ndarray:
        """Return the indices of the examples in the batch of a step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.examples))
            self._order = (epoch, order)
        return self._order[1][index * self.batch_size : (index + 1) * self.batch_size]

    def _groups(self, steps: int) -> Iterator[np.ndarray]:
        return map(self._group, range(steps))

    def _best_width(self, longest: int) -> int:
        """Return the row width, at least `longest`, at which the first batches cost least."""
        groups = list(self._groups(min(self.steps_per_epoch, 50)))
        narrowest = -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        widths = [narrowest, *range(narrowest + WIDTH_MULTIPLE, MAX_WIDTH + 1, WIDTH_MULTIPLE)]

        def cost(width: int) -> float:
            rows = max(len(first_fit(self._lengths[group], width)) for group in groups)
            return rows * width * (1 + width / ATTENTION_CROSSOVER)

        return min(widths, key=cost)


def first_fit(lengths: Sequence[int] | np.ndarray, width: int) -> list[list[int]]:
    """Assign examples to rows by first fit.

    Args:
        lengths: the number of tokens of each example.
        width: the number of tokens per row.

    Returns:
        For each row, the indices of its examples.

    Raises:
        ValueError: an example is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i, length in enumerate(lengths):
        if length > width:
            raise ValueError(
                f"an example must fit into a row of {width} tokens, got {length} tokens"
            )
        row = next((row for row, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(i)
        room[row] -= length
    return rows


def collate(
    examples: Sequence[Example], rows: Sequence[Sequence[int]], shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Return a batch of packed examples.

    Args:
        examples: the examples.
        rows: for each row, the indices of its examples, from `first_fit`; remaining rows are
            padding.
        shape: (B, T), the number of rows and of tokens per row.

    Returns:
        "ids" int32 [B, T]; "segments" int32 [B, T], 1, 2, ... for the examples of a row and 0 for
        padding; "weights" float32 [B, T], the weight of predicting each token.
    """
    ids, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for r, row in enumerate(rows):
        start = 0
        for segment, i in enumerate(row, 1):
            end = start + len(examples[i])
            ids[r, start:end] = examples[i].ids
            segments[r, start:end] = segment
            weights[r, start:end] = examples[i].weights
            start = end
    return {"ids": ids, "segments": segments, "weights": weights}


def collate_all(examples: Sequence[Example], shape: tuple[int, int]) -> list[dict[str, np.ndarray]]:
    """Return batches with all examples, packed by first fit, for validation.

    Args:
        examples: the examples.
        shape: (B, T), the number of rows and of tokens per row in every batch.

    Raises:
        ValueError: an example is longer than a row.
    """
    rows = first_fit([len(example) for example in examples], shape[1])
    return [collate(examples, rows[i : i + shape[0]], shape) for i in range(0, len(rows), shape[0])]
