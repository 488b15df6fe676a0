"""Tables of arrays: columns that grow, and a hash table that looks up a million keys at once.

A key is one or two numbers of 64 bits. The table keeps keys in the order in which they came and
numbers them so; its slots hold only those numbers. The hash of a key leads to two slots, next to
each other, of which it takes the first that is free. The few that find both taken stand in a dict:
they are looked up one by one, which costs less than more passes over arrays.
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
    """An array of numbers, or of rows of `width` numbers, that can grow at its end."""

    def __init__(self, dtype: npt.DTypeLike, width: int | None = None):
        self._data = np.empty(1 if width is None else (1, width), dtype)
        self.size = 0

    def append(self, items: npt.NDArray[Any]) -> None:
        begin, self.size = self.size, self.size + len(items)
        if self.size > len(self._data):
            room = np.empty((2 * self.size, *self._data.shape[1:]), self._data.dtype)
            self._data = np.concatenate([self._data, room])
        self._data[begin : self.size] = items

    def take(self, places: Ints) -> npt.NDArray[Any]:
        return self._data.take(places, axis=0, mode="clip")  # NumPy's fastest mode


class HashTable:
    """A hash table that numbers keys of one or two words from 0 on."""

    def __init__(self, *, words_per_key: int):
        self._keys = GrowableArray(
            np.uint64, words_per_key
        )  # all of a key in one place: one wait for memory
        self._bits = 1  # there are 2^bits slots
        self._slots = np.full(2, -1, np.int32)  # the number of a key; -1: free
        self._overflow: dict[tuple[int, ...], int] = {}  # the keys that found no slot

    def find(self, *keys: Uint64s) -> Ints:
        """The number of each key, -1 where there is none."""
        slot = self._slot(keys)
        number = self._slots.take(slot, mode="clip").astype(np.intp)
        other = self._mismatches(number, keys)
        if len(other):
            slot, keys = slot.take(other) ^ 1, tuple(key.take(other) for key in keys)
            second = self._slots.take(slot, mode="clip").astype(np.intp)
            third = self._mismatches(second, keys)
            if len(third):
                rest = zip(*(key.take(third).tolist() for key in keys), strict=True)
                second[third] = [self._overflow.get(key, -1) for key in rest]
            number[other] = second
        return number

    def add(self, *keys: Uint64s) -> None:
        """Adds keys that are different from each other and from those that the table has."""
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
            self._slots[slot[free]] = number[free]  # of several for one slot, the first stays
            left = self._slots[slot] != number
            number, slot = number[left], slot[left] ^ 1
        rest = map(tuple, self._keys.take(number).tolist())
        self._overflow.update(zip(rest, number.tolist(), strict=True))

    def _slot(self, keys: tuple[Uint64s, ...]) -> Ints:
        """The slot at which to look first: the high bits of a sum of products."""
        total = keys[0] * _FACTORS[0]
        for key, factor in zip(keys[1:], _FACTORS[1:], strict=False):
            total += key * factor
        total >>= np.uint64(64 - self._bits)
        return total.view(np.intp)

    def _mismatches(self, number: Ints, keys: tuple[Uint64s, ...]) -> Ints:
        """At which places `number` is that of another key."""
        differs = number >= 0
        same = [own == key for own, key in zip(self._keys.take(number).T, keys, strict=True)]
        differs &= ~functools.reduce(operator.and_, same)
        return np.flatnonzero(differs)


_FACTORS = np.array([0x9E3779B97F4A7C15, 0xD1B54A32D192ED03], np.uint64)  # any odd numbers


def sliding_uint64(data: bytes) -> Uint64s:
    """[i]: the eight bytes from i on, the first of them the lowest; zeros after the end."""
    shifted = np.ndarray(len(data) + 9, "<u8", data + bytes(16), strides=(1,))
    return np.ascontiguousarray(shifted, np.uint64)


def concat_ranges(first: Ints, count: Ints) -> Ints:
    """The places of ranges, one after the other: ([5, 2], [2, 3]) gives 5 6 2 3 4."""
    shift = first + count
    shift -= np.cumsum(count)
    at = np.repeat(shift, count)
    at += np.arange(len(at))
    return at
