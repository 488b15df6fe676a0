"""Array-based containers: growable arrays, and a hash table that looks up many keys at once.

A key is one or two numbers of 64 bits. The table numbers keys in the order of insertion; its slots
store these numbers. The hash of a key selects two adjacent slots, and the key is stored in the
first free slot. The few keys for which both slots are occupied are stored in a dict and looked up
one by one, which costs less than more passes over the arrays.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.intp]
Uint64s = npt.NDArray[np.uint64]


class GrowableArray:
    """An array of numbers [size], or of rows [size, width], that can grow at its end."""

    def __init__(self, dtype: npt.DTypeLike, width: int | None = None):
        """Create an empty array; `width` is the length of a row, None for numbers."""
        self._data = np.empty(1 if width is None else (1, width), dtype)
        self.size = 0

    def append(self, items: npt.NDArray[Any]) -> None:
        """Append items, an array [n] or [n, width]."""
        begin, self.size = self.size, self.size + len(items)
        if self.size > len(self._data):
            spare = np.empty((2 * self.size, *self._data.shape[1:]), self._data.dtype)
            self._data = np.concatenate([self._data, spare])
        self._data[begin : self.size] = items

    def take(self, indices: Ints) -> npt.NDArray[Any]:
        """Return the items at `indices`, which must be less than `size`."""
        return self._data.take(indices, axis=0, mode="clip")  # NumPy's fastest mode


class HashTable:
    """A hash table that numbers keys 0, 1, ... in the order in which they are added.

    A key is one or two 64-bit words.
    """

    def __init__(self, *, words_per_key: int):
        """Create an empty table for keys of `words_per_key` words, 1 or 2."""
        # The words of a key are adjacent, so that a lookup causes one cache miss.
        self._keys = GrowableArray(np.uint64, words_per_key)
        self._bits = 1  # there are 2^bits slots
        self._slots = np.full(2, -1, np.int32)  # the number of a key; -1: free
        self._overflow: dict[tuple[int, ...], int] = {}  # keys without a slot

    def find(self, *keys: Uint64s) -> Ints:
        """Return the numbers [n] of keys, -1 for a key that is not in the table.

        Args:
            keys: an array [n] with the first word of each key, and one with the second if any.
        """
        slot = self._slot(keys)
        number = self._slots.take(slot, mode="clip").astype(np.intp)
        retry = self._mismatches(number, keys)
        if len(retry):
            slot, keys = slot.take(retry) ^ 1, tuple(key.take(retry) for key in keys)
            second = self._slots.take(slot, mode="clip").astype(np.intp)
            overflow = self._mismatches(second, keys)
            if len(overflow):
                rest = zip(*(key.take(overflow).tolist() for key in keys), strict=True)
                second[overflow] = [self._overflow.get(key, -1) for key in rest]
            number[retry] = second
        return number

    def add(self, *keys: Uint64s) -> None:
        """Add keys, which must differ from each other and from the keys in the table.

        Args:
            keys: as in `find`.
        """
        size = self._keys.size + len(keys[0])
        number = np.arange(self._keys.size, size)
        self._keys.append(np.stack(keys, axis=1))
        if 4 * size > len(self._slots):
            self._bits = (8 * size).bit_length()
            self._slots = np.full(1 << self._bits, -1, np.int32)
            self._overflow.clear()
            number = np.arange(size)
        slot = self._slot(tuple(self._keys.take(number).T))
        for _ in range(2):
            free = np.flatnonzero(self._slots[slot] < 0)[::-1]
            self._slots[slot[free]] = number[free]  # reversed, so that the first key of a slot wins
            unplaced = self._slots[slot] != number
            number, slot = number[unplaced], slot[unplaced] ^ 1
        rest = map(tuple, self._keys.take(number).tolist())
        self._overflow.update(zip(rest, number.tolist(), strict=True))

    def _slot(self, keys: tuple[Uint64s, ...]) -> Ints:
        """Return the first slot of each key: the high bits of a multiplicative hash."""
        total = keys[0] * _FACTORS[0]
        for key, factor in zip(keys[1:], _FACTORS[1:], strict=False):
            total += key * factor
        total >>= np.uint64(64 - self._bits)
        return total.view(np.intp)

    def _mismatches(self, number: Ints, keys: tuple[Uint64s, ...]) -> Ints:
        """Return the indices at which `number` is the number of another key than that in `keys`.

        Free slots (number -1) do not count.
        """
        differs = number >= 0
        equal = [stored == key for stored, key in zip(self._keys.take(number).T, keys, strict=True)]
        differs &= ~functools.reduce(operator.and_, equal)
        return np.flatnonzero(differs)


_FACTORS = np.array([0x9E3779B97F4A7C15, 0xD1B54A32D192ED03], np.uint64)  # any odd numbers


def sliding_uint64(data: bytes) -> Uint64s:
    """Return, for each offset in `data`, the next 8 bytes as a little-endian number (uint64).

    Zeros follow the data. The array has len(data) + 9 items, so that offsets up to 8 bytes after
    the end are valid.
    """
    shifted = np.ndarray(len(data) + 9, "<u8", data + bytes(16), strides=(1,))
    return np.ascontiguousarray(shifted, np.uint64)


def concat_ranges(first: Ints, count: Ints) -> Ints:
    """Return the concatenated ranges of `count` integers from `first`.

    For example, first [5, 2] and count [2, 3] give [5, 6, 2, 3, 4].
    """
    shift = first + count
    shift -= np.cumsum(count)
    indices = np.repeat(shift, count)
    indices += np.arange(len(indices))
    return indices
