"""Checks of the notebooks' exercises: each raises AssertionError, saying what is wrong.

They are kept out of the notebooks so that a reader can run a check without reading the answer, and
so that a test can assert what a check is for: it fails on the empty stub and passes on the
solution (`tests/notebooks`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable


def report(check: Callable[..., None], answer: Callable) -> None:
    """Runs a check and prints how it went; an exercise not done yet does not stop the notebook."""
    try:
        check(answer)
    except AssertionError as error:
        print(f"not yet: {error}")
    else:
        print("right")


def tempered(answer: Callable[[list[float], float], list[float]]) -> None:
    """Log-probabilities and a temperature to probabilities."""
    logprobs = [math.log(p) for p in (0.6, 0.3, 0.1)]
    _close(answer(logprobs, 1.0), [0.6, 0.3, 0.1], "temperature 1 changes nothing")
    _close(answer(logprobs, 0.5), [0.36 / 0.46, 0.09 / 0.46, 0.01 / 0.46], "temperature 0.5")
    _close(answer(logprobs, 1e9), [1 / 3] * 3, "a huge temperature makes all alike")
    _close(answer([-1000.0, -1001.0], 0.5)[:1], [1 / (1 + math.exp(-2))], "small numbers")


def perplexity(answer: Callable[[list[float]], float]) -> None:
    """Log-probabilities of the tokens of a text to its perplexity."""
    for logprobs, expected in (
        ([math.log(1 / 8)] * 5, 8.0),
        ([0.0, 0.0], 1.0),
        ([math.log(0.5), math.log(0.125)], 4.0),
    ):
        _close([answer(logprobs)], [expected], f"of {logprobs}")


def whole_characters(answer: Callable[[list[bytes]], list[str]]) -> None:
    """The bytes of tokens, one by one, to what may be shown after each."""
    emoji, word = "🙂".encode(), "é".encode()
    for pieces, expected in (
        ([b"a", b" b"], ["a", " b"]),
        ([emoji[:1], emoji[1:3], emoji[3:] + b"!"], ["", "", "🙂!"]),
        ([b"caf" + word[:1], word[1:], b"."], ["caf", "é", "."]),
    ):
        got = answer(list(pieces))
        assert got == expected, f"of {pieces} expected {expected}, got {got}"


def count_pairs(
    answer: Callable[[dict[tuple[bytes, ...], int]], dict[tuple[bytes, bytes], int]],
) -> None:
    """Pieces and how often they occur to pairs and how often they do."""
    for pieces, expected in (
        ({(b"l", b"o", b"w"): 3}, {(b"l", b"o"): 3, (b"o", b"w"): 3}),
        ({(b"a", b"b"): 2, (b"b", b"a", b"b"): 5}, {(b"a", b"b"): 7, (b"b", b"a"): 5}),
        ({(b"a", b"a", b"a"): 1}, {(b"a", b"a"): 2}),
        ({(b"lo", b"w"): 1, (b"x",): 9}, {(b"lo", b"w"): 1}),
    ):
        got = answer(dict(pieces))
        assert got == expected, f"of {pieces} expected {expected}, got {got}"


def merge_piece(answer: Callable[[bytes, dict[bytes, int]], list[bytes]]) -> None:
    """The tokens of a piece, compared with the library's."""
    from bpe.merge import NEVER, merge

    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"ow", b"low", b"er", b"aa", b"aaa", b"we", b"rs", b"lo"]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    rng = random.Random(0)
    pieces = [b"lower", b"aaaaa", b"\xf0\x9f\x99\x82", b"x", b""]
    pieces += [bytes(rng.choices(b"lowersa", k=rng.randrange(12))) for _ in range(1000)]
    for piece in pieces:
        expected = merge(piece, lambda left, right: ranks.get(left + right, NEVER))
        got = answer(piece, dict(ranks))
        assert got == expected, f"of {piece} expected {expected}, got {got}"


def broken_tokens(answer: Callable[[list[bytes]], list[int]]) -> None:
    """The bytes of tokens to the positions of those that are no text."""
    emoji = "🙂".encode()
    for tokens, expected in (
        ([b"low", b" ", "é".encode()], []),
        ([b"a", emoji[:2], emoji[2:], b"b"], [1, 2]),
        ([emoji, b"\xff"], [1]),
        ([], []),
    ):
        got = answer(list(tokens))
        assert got == expected, f"of {tokens} expected {expected}, got {got}"


def _close(got: object, expected: list[float], what: str) -> None:
    is_list = isinstance(got, list | tuple) and len(got) == len(expected)
    near = is_list and all(
        isinstance(a, int | float) and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
        for a, b in zip(got, expected, strict=True)
    )
    assert near, f"{what}: expected {[round(x, 4) for x in expected]}, got {got}"
