"""The array-based hash table, compared with a dict."""

import random

import numpy as np
import pytest

from bpe.hash_table import GrowableArray, HashTable, concat_ranges, sliding_uint64


@pytest.mark.parametrize("words", [1, 2])
@pytest.mark.parametrize("spread", [1, 1 << 20, 1 << 44])
def test_find_returns_numbers_of_added_keys(words, spread):
    """The keys are adjacent numbers, or numbers that differ only in high bits."""
    rng = np.random.default_rng(0)
    table, expected = HashTable(words_per_key=words), {}
    for size in (0, 1, 3, 500, 4000, 20_000):
        rows = {tuple(row) for row in (rng.integers(0, 16 * size + 1, (size, words))).tolist()}
        rows = [row for row in sorted(rows) if row not in expected]
        random.Random(size).shuffle(rows)
        expected |= {row: len(expected) + i for i, row in enumerate(rows)}
        table.add(*(np.array(rows, np.uint64).reshape(-1, words) * np.uint64(spread)).T)
        queries = rng.integers(0, 16 * size + 1, (3 * size, words))
        numbers = table.find(*(queries.astype(np.uint64) * np.uint64(spread)).T)
        assert numbers.tolist() == [expected.get(tuple(row), -1) for row in queries.tolist()]


def test_colliding_keys_are_found_in_overflow(monkeypatch):
    """If all keys have the same hash, two get slots, and the others are found in the overflow."""
    table = HashTable(words_per_key=1)
    monkeypatch.setattr(table, "_slot", lambda keys: np.zeros(len(keys[0]), np.intp))
    keys = np.arange(5, 25, dtype=np.uint64)
    table.add(keys[:7])
    table.add(keys[7:])
    assert table.find(np.arange(40, dtype=np.uint64)).tolist() == [
        i - 5 if 5 <= i < 25 else -1 for i in range(40)
    ]
    assert len(table._overflow) == 18


def test_growable_array_returns_all_appended_items():
    array, expected = GrowableArray(np.int32), []
    for size in (0, 1, 2, 10, 100):
        array.append(np.arange(size))
        expected += range(size)
        assert array.size == len(expected)
        assert array.take(np.arange(array.size)).tolist() == expected


def test_concat_ranges_of_counts_with_zero_and_of_nothing():
    assert concat_ranges(np.array([5, 2, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert concat_ranges(np.array([], np.intp), np.array([], np.intp)).tolist() == []


def test_sliding_uint64_is_little_endian():
    assert sliding_uint64(b"\x01\x02")[:3].tolist() == [0x0201, 0x02, 0]
