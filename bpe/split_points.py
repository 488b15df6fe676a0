"""Find split points: positions within a piece that no token crosses.

Scripts without spaces have long pieces. A Chinese sentence up to the next comma is one piece, and
such pieces rarely repeat, so a cache of pieces does not help. But few pairs of Chinese characters
are adjacent in any token. If no token contains the two characters around a position, no merge can
cross it, because the merged token would contain them. Therefore splitting the piece at this
position does not change its ids. The resulting segments are short, repeat often, and are cached.

Only characters from U+3000 on are considered: the scripts without spaces, Hangul and emoji. For
Latin or Cyrillic, nearly every pair of letters is adjacent in some token.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from operator import add

import numpy as np
import numpy.typing as npt

from bpe.hash_table import HashTable, Ints, Uint64s
from bpe.vocab import Vocab

# The first UTF-8 bytes of the characters U+3000 to U+3FFFF.
_FIRST_LEAD_BYTE, _LAST_LEAD_BYTE = 0xE3, 0xF0
_MAX_CACHED_PAIRS = 1 << 16


def _utf8_length(lead_byte: int) -> int:
    """Return the length in bytes of a character of U+3000 to U+3FFFF from its first byte."""
    return 4 if lead_byte >= 0xF0 else 3


def adjacent_characters(tokens: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yield all pairs of characters that are adjacent in a token.

    Yields:
        The bytes of both characters, and True. If the token contains only a part of one of them:
        the last byte of the first and the first byte of the second, and False.
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
    """Finds the split points of texts: positions that no token of a vocabulary can cross."""

    def __init__(self, vocab: Vocab):
        """Collect the adjacent characters of all tokens of `vocab`."""
        self._is_safe = _is_split_safe(vocab)
        pairs = set(adjacent_characters(vocab.ranks)) if self._is_safe else set()
        self._adjacent_pairs = {both for both, complete in pairs if complete}
        self._partial_pairs = {both for both, complete in pairs if not complete}
        self._cache: dict[str, bool] = {}  # two characters -> whether to split between them

    def split(self, piece: str) -> list[str]:
        """Split one piece at its split points."""
        if not self._is_safe:
            return [piece]
        cache, segments, begin = self._cache, [], 0
        for i, both in enumerate(map(add, piece, piece[1:]), 1):
            if (is_split_point := cache.get(both)) is None:
                if len(cache) >= _MAX_CACHED_PAIRS:
                    cache.clear()
                is_split_point = cache[both] = self._is_split_point(*both)
            if is_split_point:
                segments.append(piece[begin:i])
                begin = i
        return [*segments, piece[begin:]]

    def _is_split_point(self, left: str, right: str) -> bool:
        a, b = left.encode(), right.encode()
        in_range = (
            _FIRST_LEAD_BYTE <= a[0] <= _LAST_LEAD_BYTE
            and _FIRST_LEAD_BYTE <= b[0] <= _LAST_LEAD_BYTE
        )
        return (
            in_range
            and a + b not in self._adjacent_pairs
            and a[-1:] + b[:1] not in self._partial_pairs
        )

    def split_batch(
        self, data: bytes, uint64s: Uint64s, offsets: Ints, separators: Ints
    ) -> tuple[Ints, Ints]:
        """Split many pieces at their split points.

        Args:
            data: as in `fast_pretokenizer.PieceOffsets`.
            uint64s: `sliding_uint64` of the data.
            offsets: as in `fast_pretokenizer.PieceOffsets`.
            separators: as in `fast_pretokenizer.PieceOffsets`.

        Returns:
            `offsets` and `separators` of the resulting pieces.
        """
        byte = np.frombuffer(data, np.uint8)
        position = np.flatnonzero((byte >= _FIRST_LEAD_BYTE) & (byte <= _LAST_LEAD_BYTE))
        if not self._is_safe or len(position) < 2:
            return offsets, separators
        adjacent_pairs, partial_pairs = self._lookup_arrays
        size = np.where(byte.take(position) == 0xF0, 4, 3)
        first = np.flatnonzero(position[:-1] + size[:-1] == position[1:])  # of adjacent characters
        mask = _MASKS.take(size.take(first) + size.take(first + 1))
        both = uint64s.take(position.take(first)) & mask
        second = position.take(first + 1)
        boundary_bytes = uint64s.take(second - 1) & np.uint64(0xFFFF)
        is_joined = adjacent_pairs.find(both) >= 0
        is_joined |= partial_pairs.take(boundary_bytes.view(np.intp))
        is_start = np.zeros(len(data), np.bool_)
        is_start[offsets] = True
        is_start[second[~is_joined]] = True
        new_offsets = np.flatnonzero(is_start)
        return new_offsets, np.searchsorted(new_offsets, offsets.take(separators))

    @functools.cached_property
    def _lookup_arrays(self) -> tuple[HashTable, npt.NDArray[np.bool_]]:
        """The complete pairs of `adjacent_characters` as a table, the others as a mask [65536].

        Both are indexed by the bytes of a pair as a little-endian number.
        """
        adjacent_pairs = HashTable(words_per_key=1)
        keys = [int.from_bytes(both, "little") for both in self._adjacent_pairs]
        adjacent_pairs.add(np.array(keys, np.uint64))
        partial_pairs = np.zeros(1 << 16, np.bool_)
        partial_pairs[[int.from_bytes(both, "little") for both in self._partial_pairs]] = True
        return adjacent_pairs, partial_pairs


_MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)  # by number of bytes


def _is_split_safe(vocab: Vocab) -> bool:
    """Return whether splitting a piece at a split point never changes its ids.

    Splitting can change the ids in two cases: with `ignore_merges`, a segment can be a token that
    no sequence of merges makes; and if bytes of a character are dropped, the characters before and
    after it become adjacent.
    """
    if vocab.dropped_bytes.translate(None, _SAFE_BYTES):
        return False
    tokens = (token for token in vocab.ranks if max(token) >= _FIRST_LEAD_BYTE)
    return not vocab.ignore_merges or all(len(vocab.merge(token)) == 1 for token in tokens)


_SAFE_BYTES = bytes(byte for byte in range(256) if not 0x80 <= byte <= _LAST_LEAD_BYTE)
