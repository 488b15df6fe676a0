"""Examples of many lengths into batches of one shape, in an order that a seed decides.

A step learns from `batch_size` examples. They share rows: each goes into the first row that has
room for it ("first fit"), and `segments` keeps those of a row apart, so that none reads another.
All steps have the same shape, that of the one that needs most: a compiler sees it once.

How wide a row should be is found by trying: a wide one leaves less room unused at its end, but
attention costs each token as many products as the row has tokens.

`Batches` is a function of the step alone. Who goes on after a stop needs no more than its number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from training.examples import Example

WIDTH_MULTIPLE = 32  # widths are multiples of it
MAX_WIDTH = 1024  # tokens of a row, unless one example is longer
ATTENTION_CROSSOVER = (
    4096  # the width at which attention costs a small model as much as all the rest
)
MICRO_BATCH_TOKENS = 1024  # of a batch that are computed at once; more are read in parts


class Batches:
    """The batches of a training run: `batches(step)`, for steps from 0.

    Each epoch takes all examples in a new order. The last step of an epoch takes those left over.

    Attributes:
        steps_per_epoch: how often `batch_size` goes into the examples, rounded up.
        steps: of all epochs.
        shape: (rows, tokens of a row) of every batch, the rows a multiple of `parts`.
        parts: in how many parts a batch is best read, so as not to hold too much at once.
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
        """Plans all batches.

        Args:
            longest: tokens of an example that rows must have room for beside these (of a
                validation set that is to have the same width).

        Raises:
            ValueError: there is no example, or a number is below one.
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
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))  # of the last epoch asked for
        width = self._best_width(max(longest, int(self._lengths.max())))
        rows = max(
            len(first_fit(self._lengths[group], width)) for group in self._groups(self.steps)
        )
        self.micro_batches = -(-rows // max(1, MICRO_BATCH_TOKENS // width))
        self.shape = (-(-rows // self.micro_batches) * self.micro_batches, width)

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step; see `fill`."""
        group = self._group(step)
        rows = first_fit(self._lengths[group], self.shape[1])
        return collate([self.examples[i] for i in group], rows, self.shape)

    def _group(self, step: int) -> np.ndarray:
        """Which examples a step learns from."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.examples))
            self._order = (epoch, order)
        return self._order[1][place * self.batch_size : (place + 1) * self.batch_size]

    def _groups(self, steps: int) -> Iterator[np.ndarray]:
        return map(self._group, range(steps))

    def _best_width(self, longest: int) -> int:
        """The width at which a batch costs least, as far as the first epoch tells."""
        groups = list(self._groups(min(self.steps_per_epoch, 50)))
        narrowest = -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        widths = [narrowest, *range(narrowest + WIDTH_MULTIPLE, MAX_WIDTH + 1, WIDTH_MULTIPLE)]

        def cost(width: int) -> float:
            rows = max(len(first_fit(self._lengths[group], width)) for group in groups)
            return rows * width * (1 + width / ATTENTION_CROSSOVER)

        return min(widths, key=cost)


def first_fit(lengths: Sequence[int] | np.ndarray, width: int) -> list[list[int]]:
    """Which share a row of `width` tokens: rows of indices into `lengths`.

    Raises:
        ValueError: one is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i, length in enumerate(lengths):
        if length > width:
            raise ValueError(f"an example of {length} tokens does not fit into rows of {width}")
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
    """A batch of examples side by side.

    Args:
        rows: which examples share a row, as `first_fit` says; rows that `shape` has beyond these
            stay empty.

    Returns:
        "ids" int32 [B, T]; "segments" int32 [B, T], 1, 2, ... for the examples of a row and 0 where
        there is none; "weights" float32 [B, T], how much it counts to predict each id.
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
    """All examples once, in as few batches of a shape as first fit makes of them; to validate."""
    rows = first_fit([len(example) for example in examples], shape[1])
    return [collate(examples, rows[i : i + shape[0]], shape) for i in range(0, len(rows), shape[0])]
