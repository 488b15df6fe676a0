"""Seams: places within a piece that no token reaches across.

Scripts without spaces make long pieces: a Chinese sentence up to its next comma is one, and hardly
any occurs twice. But few tokens hold two Chinese characters, and only certain two. Where those to
the left and right of a place stand together in no token, no merge can ever join across it, for what
it made would be such a token. So the piece can be cut there, and the ids stay the same. What is
left is short, and comes again: it need not be merged, it is known.

Only characters from U+3000 on are looked at, where the scripts without spaces, Hangul and emoji
are; within a Latin or Cyrillic word there is a token for nearly any two letters.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from operator import add

import numpy as np
import numpy.typing as npt

from bpe.hash_table import HashTable, Ints, Uint64s
from bpe.vocab import Vocab

# The first bytes, in UTF-8, of the characters looked at: U+3000 to U+3FFFF.
_FIRST_LEAD_BYTE, _LAST_LEAD_BYTE = 0xE3, 0xF0
_MAX_CACHED_PAIRS = 1 << 16  # pairs of characters to remember


def _utf8_length(first: int) -> int:
    """How many bytes a character has, by its first."""
    return 4 if first >= 0xF0 else 3


def adjacent_characters(tokens: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """All two characters that stand side by side in a token.

    Yields:
        The bytes of both, and True; or, where the token holds only a part of one of them, the two
        bytes where they meet, and False.
    """
    for token in tokens:
        for i in range(1, len(token)):
            if not (
                _FIRST_LEAD_BYTE <= token[i] <= _LAST_LEAD_BYTE and 0x80 <= token[i - 1] < 0xC0
            ):
                continue
            begin = i - 1
            while begin > 0 and 0x80 <= token[begin] < 0xC0:
                begin -= 1
            end = i + _utf8_length(token[i])
            if end <= len(token) and token[begin] >= 0xC0:
                yield token[begin:end], True
            else:
                yield token[i - 1 : i + 1], False


class SplitPoints:
    """The seams of one vocabulary."""

    def __init__(self, vocab: Vocab):
        """
        Args:
            vocab: the vocabulary.
        """
        self._is_safe = _is_split_safe(vocab)
        found = set(adjacent_characters(vocab.ranks)) if self._is_safe else set()
        self._adjacent_pairs = {both for both, whole in found if whole}
        self._partial_pairs = {meet for meet, whole in found if not whole}
        self._cache: dict[str, bool] = {}  # two characters: whether there is a seam between them

    def split(self, piece: str) -> list[str]:
        """Cuts one piece at its seams."""
        if not self._is_safe:
            return [piece]
        is_seam, segments, begin = self._cache, [], 0
        for i, both in enumerate(map(add, piece, piece[1:]), 1):
            if (found := is_seam.get(both)) is None:
                if len(is_seam) >= _MAX_CACHED_PAIRS:
                    is_seam.clear()
                found = is_seam[both] = self._is_split_point(*both)
            if found:
                segments.append(piece[begin:i])
                begin = i
        return [*segments, piece[begin:]]

    def _is_split_point(self, left: str, right: str) -> bool:
        a, b = left.encode(), right.encode()
        looked_at = (
            _FIRST_LEAD_BYTE <= a[0] <= _LAST_LEAD_BYTE
            and _FIRST_LEAD_BYTE <= b[0] <= _LAST_LEAD_BYTE
        )
        return (
            looked_at
            and a + b not in self._adjacent_pairs
            and a[-1:] + b[:1] not in self._partial_pairs
        )

    def split_batch(
        self, data: bytes, eight: Uint64s, begin: Ints, ends: Ints
    ) -> tuple[Ints, Ints]:
        """Cuts many pieces at their seams.

        Args:
            data, begin, ends: as `boundaries.cut` returns them.
            eight: `eight_bytes` of the data.

        Returns:
            `begin` and `ends` with the new pieces.
        """
        byte = np.frombuffer(data, np.uint8)
        place = np.flatnonzero((byte >= _FIRST_LEAD_BYTE) & (byte <= _LAST_LEAD_BYTE))
        if not self._is_safe or len(place) < 2:
            return begin, ends
        together, partly = self._lookup_arrays
        size = np.where(byte.take(place) == 0xF0, 4, 3)
        first = np.flatnonzero(place[:-1] + size[:-1] == place[1:])  # of two side by side
        both = eight.take(place.take(first)) & _MASKS.take(size.take(first) + size.take(first + 1))
        second = place.take(first + 1)
        meet = eight.take(second - 1) & np.uint64(0xFFFF)
        joined = (together.find(both) >= 0) | partly.take(meet.view(np.intp))
        start = np.zeros(len(data), np.bool_)
        start[begin] = True
        start[second[~joined]] = True
        new = np.flatnonzero(start)
        return new, np.searchsorted(new, begin.take(ends))

    @functools.cached_property
    def _lookup_arrays(self) -> tuple[HashTable, npt.NDArray[np.bool_]]:
        """Two characters that stand together in a token, and two bytes that stand so in a part."""
        together = HashTable(words_per_key=1)
        numbers = [int.from_bytes(both, "little") for both in self._adjacent_pairs]
        together.add(np.array(numbers, np.uint64))
        partly = np.zeros(1 << 16, np.bool_)
        partly[[int.from_bytes(meet, "little") for meet in self._partial_pairs]] = True
        return together, partly


_MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)  # that many bytes


def _is_split_safe(vocab: Vocab) -> bool:
    """Whether the two sides of a seam have the ids that they have within the piece.

    Not so where a side by itself is a token, as a whole piece, that no merges make; nor where bytes
    of such characters are dropped, and what they stood between comes together.
    """
    if vocab.dropped_bytes.translate(None, _SAFE_BYTES):
        return False
    tokens = (token for token in vocab.ranks if max(token) >= _FIRST_LEAD_BYTE)
    return not vocab.ignore_merges or all(len(vocab.merge(token)) == 1 for token in tokens)


_SAFE_BYTES = bytes(byte for byte in range(256) if not 0x80 <= byte <= _LAST_LEAD_BYTE)
