"""Seams: places within a piece that no token reaches across.

Scripts without spaces make long pieces: a Chinese sentence up to its next comma is one, and hardly
any occurs twice. But few tokens hold two Chinese characters, and only certain two. Where those to
the left and right of a place stand together in no token, no merge can ever join across it, for what
it made would be such a token. So the piece can be cut there, and the ids stay the same. What is
left is short, and comes again: it need not be merged, it is known.

Only characters from U+3000 on are looked at, which is where the scripts without spaces, Hangul and
emoji are; within a Latin or Cyrillic word there is a token for nearly any two letters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from bpe.tables import Ints, Table, Words

if TYPE_CHECKING:
    from bpe.encoding import Encoding

# The first bytes, in UTF-8, of the characters looked at: U+3000 to U+3FFFF.
_FIRST, _LAST = 0xE3, 0xF0


def _size(first: int) -> int:
    """How many bytes a character has, by its first."""
    return 4 if first >= 0xF0 else 3


def neighbours(tokens: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """All two characters that stand side by side in a token.

    Yields:
        The bytes of both, and True; or, where the token holds only a part of one of them, the two
        bytes where they meet, and False.
    """
    for token in tokens:
        for i in range(1, len(token)):
            if not (_FIRST <= token[i] <= _LAST and 0x80 <= token[i - 1] < 0xC0):
                continue
            begin = i - 1
            while begin > 0 and 0x80 <= token[begin] < 0xC0:
                begin -= 1
            end = i + _size(token[i])
            if end <= len(token) and token[begin] >= 0xC0:
                yield token[begin:end], True
            else:
                yield token[i - 1 : i + 1], False


class Seams:
    """The seams of one vocabulary."""

    def __init__(self, encoding: Encoding):
        """
        Args:
            encoding: the vocabulary.
        """
        together: set[int] = set()
        self._partly = np.zeros(1 << 16, np.bool_)  # by the two bytes that meet
        for both, whole in neighbours(encoding.ranks):
            if whole:
                together.add(int.from_bytes(both, "little"))
            else:
                self._partly[int.from_bytes(both, "little")] = True
        self._together = Table(words=1)
        self._together.add(np.fromiter(together, np.uint64, len(together)))
        self._exact = _is_exact(encoding)

    def cut(self, data: bytes, eight: Words, begin: Ints, ends: Ints) -> tuple[Ints, Ints]:
        """Cuts pieces at their seams.

        Args:
            data, begin, ends: as `boundaries.cut` returns them.
            eight: `eight_bytes` of the data.

        Returns:
            `begin` and `ends` with the new pieces.
        """
        byte = np.frombuffer(data, np.uint8)
        place = np.flatnonzero((byte >= _FIRST) & (byte <= _LAST))
        if not self._exact or len(place) < 2:
            return begin, ends
        size = np.where(byte.take(place) == 0xF0, 4, 3)
        first = np.flatnonzero(place[:-1] + size[:-1] == place[1:])  # of two side by side
        key = eight.take(place.take(first)) & _MASKS.take(size.take(first) + size.take(first + 1))
        second = place.take(first + 1)
        meet = eight.take(second - 1) & np.uint64(0xFFFF)
        joined = (self._together.find(key) >= 0) | self._partly.take(meet.view(np.intp))
        start = np.zeros(len(data), np.bool_)
        start[begin] = True
        start[second[~joined]] = True
        new = np.flatnonzero(start)
        return new, np.searchsorted(new, begin.take(ends))


_MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)  # that many bytes


def _is_exact(encoding: Encoding) -> bool:
    """Whether the two sides of a seam have the ids that they have within the piece.

    Not so where a side by itself is a token, as a whole piece, that no merges make; nor where bytes
    of such characters are dropped, and what they stood between comes together.
    """
    if encoding.dropped_bytes.translate(None, _NO_BYTE):
        return False
    tokens = (token for token in encoding.ranks if max(token) >= _FIRST)
    return not encoding.whole_pieces or all(len(encoding._merge(token)) == 1 for token in tokens)


_NO_BYTE = bytes(byte for byte in range(256) if not 0x80 <= byte <= _LAST)
