"""Pack texts of many lengths into batches of few shapes, so that few programs are compiled.

To avoid padding, several texts share a row. Texts are processed in descending order of length. Each
text is put into the row with the least sufficient free space ("best fit decreasing"; for language
models Krell et al. 2021, arXiv:2107.02027), or into a new row of the smallest sufficient width.
`segments` separates the texts of a row. Rows of one width are then grouped into batches whose sizes
are powers of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LENGTH_BUCKETS = (32, 64, 128, 256, 512)  # row widths, in tokens
BATCH_TOKENS = 1024  # maximum of a batch, including padding; a wider row is a batch by itself
_MIN_TOKENS = 4  # a row has at most one text per four tokens of its width


@dataclass(frozen=True)
class PackedBatch:
    """A batch of rows, each with one or several of the n texts of the batch.

    Attributes:
        ids: Token ids, int32 [B, T]; B is a power of two, and T is one of the row widths.
        segments: Number of the text of each token within its row, int32 [B, T]: 1, 2, ..., and 0
            for padding.
        text_indices: Index of each text in the argument of `pack`, int32 [n].
        rows: Row of each text, int32 [n].
        slots: Segment number of each text minus one, int32 [n].
    """

    ids: np.ndarray
    segments: np.ndarray
    text_indices: np.ndarray
    rows: np.ndarray
    slots: np.ndarray

    @property
    def max_texts(self) -> int:
        """Maximum number of texts in a row of this width."""
        return max_texts(self.ids.shape[1])

    def fill(self, values: Sequence[Sequence[int]]) -> np.ndarray:
        """Arrange per-token values, such as token types, like `ids`: int32 [B, T], 0 for padding.

        Args:
            values: One sequence per text of the argument of `pack`, with one integer per token.
        """
        filled = np.zeros_like(self.ids)
        for text, row, slot in zip(self.text_indices, self.rows, self.slots, strict=True):
            filled[row, self.segments[row] == slot + 1] = values[text]
        return filled


def max_texts(width: int) -> int:
    """Return the maximum number of texts in a row of `width` tokens."""
    return width // _MIN_TOKENS


def length_buckets(longest: int) -> tuple[int, ...]:
    """Return the row widths (in tokens) that `pack` uses for `longest`, in ascending order."""
    return (*(width for width in LENGTH_BUCKETS if width < longest), longest)


def batch_shapes(longest: int) -> list[tuple[int, int]]:
    """Return all batch shapes (B, T) of `pack` for texts of at most `longest` tokens.

    They are sorted by the number of tokens B * T, ascending.
    """
    shapes = []
    for width in length_buckets(longest):
        num_rows = 1
        while num_rows == 1 or num_rows * width <= BATCH_TOKENS:
            shapes.append((num_rows, width))
            num_rows *= 2
    return sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape))


def pack(texts: Sequence[Sequence[int]], longest: int) -> Iterator[PackedBatch]:
    """Pack all texts into batches, the widest rows first.

    Args:
        texts: Token ids of each text, including special tokens.
        longest: Maximum number of tokens of a text, which is also the width of the widest row.

    Yields:
        Batches; each text is in exactly one of them.

    Raises:
        ValueError: A text is empty or longer than `longest`.
    """
    for number, text in enumerate(texts):
        if not 1 <= len(text) <= longest:
            raise ValueError(
                f"a text must have from 1 to {longest} tokens, but text {number} has "
                f"{len(text)} tokens"
            )
    rows = _best_fit([len(text) for text in texts], length_buckets(longest))
    for width in reversed(length_buckets(longest)):
        remaining = rows[width]
        while remaining:
            count = max(rows for rows, wide in batch_shapes(longest) if wide == width
                        and (rows == 1 or rows <= len(remaining)))  # fmt: skip
            yield _make_batch(texts, remaining[:count], width)
            remaining = remaining[count:]


def _best_fit(lengths: list[int], widths: tuple[int, ...]) -> dict[int, list[list[int]]]:
    """Assign texts to rows, each to the row with the least free space that is sufficient.

    Args:
        lengths: Number of tokens of each text.
        widths: The row widths, ascending.

    Returns:
        Row width -> rows of this width; a row is a list of the indices of its texts.
    """
    rows: dict[int, list[list[int]]] = {width: [] for width in widths}
    # by_space[n]: rows with n free tokens, each with its maximum number of texts.
    by_space: list[list[tuple[list[int], int]]] = [[] for _ in range(widths[-1] + 1)]
    for text in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[text]
        space = next((n for n in range(length, len(by_space)) if by_space[n]), None)
        if space is None:
            space = next(width for width in widths if width >= length)
            row, capacity = [], max_texts(space)
            rows[space].append(row)
        else:
            row, capacity = by_space[space].pop()
        row.append(text)
        if len(row) < capacity:
            by_space[space - length].append((row, capacity))
    return rows


def _make_batch(texts: Sequence[Sequence[int]], rows: list[list[int]], width: int) -> PackedBatch:
    ids = np.zeros((len(rows), width), np.int32)
    segments = np.zeros((len(rows), width), np.int32)
    assignments = []  # (text, row, slot)
    for r, row in enumerate(rows):
        start = 0
        for slot, text in enumerate(row):
            end = start + len(texts[text])
            ids[r, start:end] = texts[text]
            segments[r, start:end] = slot + 1
            assignments.append((text, r, slot))
            start = end
    return PackedBatch(ids, segments, *np.array(assignments, np.int32).T)
