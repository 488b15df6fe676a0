"""Texts of many lengths into rows of few: batches whose shapes a compiler has seen before.

A text shorter than its row would leave padding to be computed for nothing. So rows are shared:
texts are taken longest first, each goes where the least room is left over that still holds it
("best fit decreasing"; for language models Krell et al. 2021, arXiv:2107.02027), and opens a new
row, of the narrowest width that holds it, where there is none. `segments` keeps the texts of a row
apart. Rows of one width are then taken in batches of powers of two, so that a handful of shapes
serves every input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LENGTH_BUCKETS = (32, 64, 128, 256, 512)  # of rows, in tokens
BATCH_TOKENS = 1024  # in a batch, padding included; a wider row is a batch of its own
_MIN_TOKENS = 4  # a row holds at most a text for each four tokens of its width


@dataclass(frozen=True)
class PackedBatch:
    """Rows to be computed together.

    Attributes:
        ids: int32 [B, T], B a power of two and T one of the widths.
        segments: int32 [B, T], 1, 2, ... for the texts of a row; 0 for padding.
        texts: int32 [n], which texts of the input these are.
        rows: int32 [n], the row of each.
        slots: int32 [n], its segment less one.
    """

    ids: np.ndarray
    segments: np.ndarray
    text_indices: np.ndarray
    rows: np.ndarray
    slots: np.ndarray

    @property
    def max_texts(self) -> int:
        """How many texts a row of this width may hold."""
        return max_texts(self.ids.shape[1])


def max_texts(width: int) -> int:
    """How many texts a row may hold."""
    return width // _MIN_TOKENS


def length_buckets(longest: int) -> tuple[int, ...]:
    """The widths of rows for a model that reads at most `longest` tokens."""
    return (*(width for width in LENGTH_BUCKETS if width < longest), longest)


def batch_shapes(longest: int) -> list[tuple[int, int]]:
    """All shapes [B, T] that `pack` makes of texts up to `longest` tokens, the smallest first."""
    found = []
    for width in length_buckets(longest):
        rows = 1
        while rows == 1 or rows * width <= BATCH_TOKENS:
            found.append((rows, width))
            rows *= 2
    return sorted(found, key=lambda shape: (shape[0] * shape[1], shape))


def pack(texts: Sequence[Sequence[int]], longest: int) -> Iterator[PackedBatch]:
    """Batches that hold all texts, the widest rows first.

    Args:
        texts: the ids of each, special tokens included.
        longest: tokens a text may have; the widest row is as wide.

    Raises:
        ValueError: a text is empty, or longer.
    """
    for number, text in enumerate(texts):
        if not 1 <= len(text) <= longest:
            raise ValueError(
                f"text {number} has {len(text)} tokens: between 1 and {longest} can be packed"
            )
    rows = _best_fit([len(text) for text in texts], length_buckets(longest))
    for width in reversed(length_buckets(longest)):
        left = rows[width]
        while left:
            count = max(rows for rows, wide in batch_shapes(longest) if wide == width
                        and (rows == 1 or rows <= len(left)))  # fmt: skip
            yield _batch(texts, left[:count], width)
            left = left[count:]


def _best_fit(lengths: list[int], widths: tuple[int, ...]) -> dict[int, list[list[int]]]:
    """Which texts share a row: for each width, rows of indices into `lengths`."""
    rows: dict[int, list[list[int]]] = {width: [] for width in widths}
    # with_room[n]: rows in which n tokens are left, each with how many texts it may hold.
    with_room: list[list[tuple[list[int], int]]] = [[] for _ in range(widths[-1] + 1)]
    for text in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[text]
        room = next((n for n in range(length, len(with_room)) if with_room[n]), None)
        if room is None:
            room = next(width for width in widths if width >= length)
            row, most = [], max_texts(room)
            rows[room].append(row)
        else:
            row, most = with_room[room].pop()
        row.append(text)
        if len(row) < most:
            with_room[room - length].append((row, most))
    return rows


def _batch(texts: Sequence[Sequence[int]], rows: list[list[int]], width: int) -> PackedBatch:
    ids = np.zeros((len(rows), width), np.int32)
    segments = np.zeros((len(rows), width), np.int32)
    places = []
    for r, row in enumerate(rows):
        at = 0
        for slot, text in enumerate(row):
            end = at + len(texts[text])
            ids[r, at:end] = texts[text]
            segments[r, at:end] = slot + 1
            places.append((text, r, slot))
            at = end
    columns = np.array(places, np.int32).T
    return PackedBatch(ids, segments, *columns)
