"""Find split points by pairs of characters, for vocabularies of characters instead of bytes.

A merge that crosses a position makes a token that contains the two characters around the position.
If these two characters are not adjacent in any token of the vocabulary, no merge crosses the
position, and no token of a Unigram lattice does. So a text can be encoded in segments, one by one:
nearly always words, because no token continues after a space. Segments repeat, and their ids are
cached.

`split_points` applies the same idea to byte-level vocabularies.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint32]

_BITS = 22  # 4 MB; about 1 in 20 pairs that occur in no token shares a slot with one that does
_FACTORS = np.array([0x9E3779B1, 0x85EBCA77], np.uint32)  # any odd numbers


class CharacterPairs:
    """The pairs of characters that are adjacent in any token, as a table indexed by their hash.

    A text can be split between two characters that are not such a pair. Two pairs can share a slot
    of the table. Then a split point is missed, which does not change the ids.
    """

    def __init__(self, tokens: Collection[str]):
        """Collect the pairs of adjacent characters in `tokens`."""
        codes = to_codes("\n".join(["", *tokens]))
        is_pair = (codes[:-1] != ord("\n")) & (codes[1:] != ord("\n"))
        slots = _slots(codes)
        self._is_adjacent = np.zeros(1 << _BITS, np.bool_)
        self._is_adjacent[slots[is_pair]] = True
        # Tokens with newlines, which the separator hides.
        for token in tokens:
            if "\n" in token:
                self._is_adjacent[_slots(to_codes(token))] = True

    def starts(self, codes: Codes) -> npt.NDArray[np.bool_]:
        """Return a mask [n]: True at the first character of the text and of each later segment."""
        is_start = np.ones(len(codes), np.bool_)
        np.logical_not(self._is_adjacent.take(_slots(codes), mode="clip"), out=is_start[1:])
        return is_start

    def split(self, text: str) -> list[str]:
        """Split a text at its split points, and return the segments."""
        offsets = np.flatnonzero(self.starts(to_codes(text))).tolist()
        return [text[i:j] for i, j in zip(offsets, [*offsets[1:], None], strict=True)]


def to_codes(text: str) -> Codes:
    """Return the code points [n] of a text, which must not contain surrogates."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _slots(codes: Codes) -> npt.NDArray[Any]:
    """Return the table index [n - 1] of each pair of adjacent characters."""
    slots = codes[:-1] * _FACTORS[0]
    slots += codes[1:] * _FACTORS[1]
    slots ^= slots >> np.uint32(15)
    slots *= _FACTORS[0]
    slots >>= np.uint32(32 - _BITS)
    return slots.astype(np.intp)
