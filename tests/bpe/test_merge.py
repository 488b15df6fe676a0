"""The merge algorithm: examples, and both implementations compared with each other."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpe.merge import NO_MERGE, merge, merge_heap, merge_list

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [merge_list, merge_heap])


def of_pairs(*pairs):
    ranks = {pair: i for i, pair in enumerate(pairs)}
    return lambda left, right: ranks.get((left, right), NO_MERGE)


def of_tokens(*tokens):
    ranks = {token: i for i, token in enumerate(tokens)}
    return lambda left, right: ranks.get(left + right, NO_MERGE)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("piece", "rank", "expected"),
    [
        (b"", of_pairs(), []),
        (b"a", of_pairs((b"a", b"a")), [b"a"]),
        (b"abc", of_pairs(), [b"a", b"b", b"c"]),
        # The lowest rank first, at any position.
        (b"abc", of_tokens(b"bc", b"ab"), [b"a", b"bc"]),
        # The leftmost of equal ranks.
        (b"aaa", of_tokens(b"aa"), [b"aa", b"a"]),
        # The example of Wikipedia's article on byte-pair encoding.
        (b"aaabdaaabac", of_tokens(b"aa", b"ab", b"aaab"), [b"aaab", b"d", b"aaab", b"a", b"c"]),
        # The pair matters, not its result: ab + c is not a merge although abc is a token.
        (b"abc", of_pairs((b"a", b"b"), (b"b", b"c"), (b"a", b"bc")), [b"ab", b"c"]),
        (b"abc", of_tokens(b"ab", b"bc", b"abc"), [b"abc"]),
        # A merge may create a pair of lower rank, which is merged next.
        (b"abab", of_tokens(b"aba", b"ab"), [b"aba", b"b"]),
    ],
)
def test_merge_gives_expected_tokens(implementation, piece, rank, expected):
    assert implementation(piece, rank) == expected


@given(st.integers(0, 10**6), st.text("ab", max_size=60) | st.text("abcd", max_size=300))
def test_merge_list_and_merge_heap_give_same_tokens(seed, text):
    rng = random.Random(seed)
    tokens = [bytes([b]) for b in b"abcd"]
    pairs = {}
    for _ in range(rng.randint(1, 40)):
        left, right = rng.choice(tokens), rng.choice(tokens)
        pairs.setdefault((left, right), rng.randrange(1000) * 1000 + len(pairs))
        tokens.append(left + right)
    by_token = {left + right: rank for (left, right), rank in pairs.items()}
    for rank in (
        lambda a, b: pairs.get((a, b), NO_MERGE),
        lambda a, b: by_token.get(a + b, NO_MERGE),
    ):
        expected = merge_list(text.encode(), rank)
        assert merge_heap(text.encode(), rank) == expected
        assert merge(text.encode(), rank) == expected


def test_long_piece_takes_near_linear_time():
    """Sixteen times the input must take far less than 256 times the time."""
    rank = of_tokens(*(b"a" * 2**i for i in range(1, 8)))

    def seconds(n: int) -> float:
        start = time.thread_time()
        assert b"".join(merge(b"a" * n, rank)) == b"a" * n
        return time.thread_time() - start

    assert seconds(160_000) < 64 * max(seconds(10_000), 0.005)
