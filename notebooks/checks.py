"""Check the solutions of the notebooks' exercises; each check raises AssertionError with a message.

The checks are outside the notebooks so that readers do not see the expected results. A test asserts
that each check fails for the empty stub and passes for the solution (`tests/notebooks`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable


def report(check: Callable[..., None], answer: Callable) -> None:
    """Run a check and print the result; a failed check does not stop the notebook."""
    try:
        check(answer)
    except AssertionError as error:
        print(f"not yet: {error}")
    else:
        print("right")


def tempered(answer: Callable[[list[float], float], list[float]]) -> None:
    """Check a solution that maps log-probabilities and a temperature to probabilities."""
    logprobs = [math.log(p) for p in (0.6, 0.3, 0.1)]
    _close(answer(logprobs, 1.0), [0.6, 0.3, 0.1], "temperature 1 changes nothing")
    _close(answer(logprobs, 0.5), [0.36 / 0.46, 0.09 / 0.46, 0.01 / 0.46], "temperature 0.5")
    _close(answer(logprobs, 1e9), [1 / 3] * 3, "a huge temperature makes all equal")
    _close(answer([-1000.0, -1001.0], 0.5)[:1], [1 / (1 + math.exp(-2))], "small numbers")


def perplexity(answer: Callable[[list[float]], float]) -> None:
    """Check a solution that maps the log-probabilities of a text to its perplexity."""
    for logprobs, expected in (
        ([math.log(1 / 8)] * 5, 8.0),
        ([0.0, 0.0], 1.0),
        ([math.log(0.5), math.log(0.125)], 4.0),
    ):
        _close([answer(logprobs)], [expected], f"for {logprobs}")


def whole_characters(answer: Callable[[list[bytes]], list[str]]) -> None:
    """Check a solution that maps the bytes of tokens to the text to show after each token."""
    emoji, letter = "🙂".encode(), "é".encode()
    for tokens, expected in (
        ([b"a", b" b"], ["a", " b"]),
        ([emoji[:1], emoji[1:3], emoji[3:] + b"!"], ["", "", "🙂!"]),
        ([b"caf" + letter[:1], letter[1:], b"."], ["caf", "é", "."]),
    ):
        got = answer(list(tokens))
        assert got == expected, f"for {tokens} expected {expected}, got {got}"


def count_pairs(
    answer: Callable[[dict[tuple[bytes, ...], int]], dict[tuple[bytes, bytes], int]],
) -> None:
    """Check a solution that maps the counts of pre-tokens to the counts of adjacent token pairs."""
    for pretokens, expected in (
        ({(b"l", b"o", b"w"): 3}, {(b"l", b"o"): 3, (b"o", b"w"): 3}),
        ({(b"a", b"b"): 2, (b"b", b"a", b"b"): 5}, {(b"a", b"b"): 7, (b"b", b"a"): 5}),
        ({(b"a", b"a", b"a"): 1}, {(b"a", b"a"): 2}),
        ({(b"lo", b"w"): 1, (b"x",): 9}, {(b"lo", b"w"): 1}),
    ):
        got = answer(dict(pretokens))
        assert got == expected, f"for {pretokens} expected {expected}, got {got}"


def merge_piece(answer: Callable[[bytes, dict[bytes, int]], list[bytes]]) -> None:
    """Check a solution that maps a pre-token and token ranks to tokens against `bpe.merge`."""
    from bpe.merge import NO_MERGE, merge

    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"ow", b"low", b"er", b"aa", b"aaa", b"we", b"rs", b"lo"]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    rng = random.Random(0)
    pretokens = [b"lower", b"aaaaa", b"\xf0\x9f\x99\x82", b"x", b""]
    pretokens += [bytes(rng.choices(b"lowersa", k=rng.randrange(12))) for _ in range(1000)]
    for pretoken in pretokens:
        expected = merge(pretoken, lambda left, right: ranks.get(left + right, NO_MERGE))
        got = answer(pretoken, dict(ranks))
        assert got == expected, f"for {pretoken} expected {expected}, got {got}"


def broken_tokens(answer: Callable[[list[bytes]], list[int]]) -> None:
    """Check a solution that returns the indices of tokens whose bytes are not whole characters."""
    emoji = "🙂".encode()
    for tokens, expected in (
        ([b"low", b" ", "é".encode()], []),
        ([b"a", emoji[:2], emoji[2:], b"b"], [1, 2]),
        ([emoji, b"\xff"], [1]),
        ([], []),
    ):
        got = answer(list(tokens))
        assert got == expected, f"for {tokens} expected {expected}, got {got}"


def window_mask(answer: Callable[[int, int], list[list[bool]]]) -> None:
    """Check a solution that maps a length and a window to the mask of sliding-window attention."""
    y, n = True, False
    for length, window, expected in (
        (1, 1, [[y]]),
        (3, 5, [[y, n, n], [y, y, n], [y, y, y]]),
        (4, 2, [[y, n, n, n], [y, y, n, n], [n, y, y, n], [n, n, y, y]]),
    ):
        got = answer(length, window)
        assert got == expected, f"for {length} and {window} expected {expected}, got {got}"


def online_average(answer: Callable[[list[tuple[list[float], list[float]]]], float]) -> None:
    """Check a solution that maps blocks of scores and values to the softmax-weighted average."""
    rng = random.Random(0)
    for _ in range(20):
        blocks = []
        for _ in range(rng.randrange(1, 6)):
            size = rng.randrange(1, 5)
            scores = [rng.gauss(0, 3) for _ in range(size)]
            blocks.append((scores, [rng.gauss(0, 1) for _ in range(size)]))
        flat = [pair for block in blocks for pair in zip(*block, strict=True)]
        total = sum(math.exp(score) for score, _ in flat)
        expected = sum(math.exp(score) * value for score, value in flat) / total
        _close([answer(blocks)], [expected], "the average")
    huge = [([1000.0], [1.0]), ([1001.0], [2.0])]
    _close([answer(huge)], [(1 + 2 * math.e) / (1 + math.e)], "large scores")


def cache_bytes(answer: Callable[[int, int, int, int, int], int]) -> None:
    """Check a solution that returns the size of a key-value cache in bytes."""
    for sizes, expected in (((1, 1, 1, 1, 1), 2), ((8192, 30, 3, 64, 2), 188_743_680)):
        got = answer(*sizes)
        assert got == expected, f"for {sizes} expected {expected}, got {got}"


def rms_norm(answer: Callable[[list[float], list[float], float], list[float]]) -> None:
    """Check a solution that maps a vector, a scale and eps to the normalized vector."""
    _close(answer([3.0, 4.0], [1.0, 2.0], 0.0), [3 / 12.5**0.5, 8 / 12.5**0.5], "3 and 4")
    _close(answer([0.0, 0.0], [1.0, 1.0], 1e-6), [0.0, 0.0], "zeros")
    _close(answer([1.0], [1.0], 3.0), [0.5], "a large eps")


def cosine(answer: Callable[[list[float], list[float]], float]) -> None:
    """Check a solution that maps two vectors to their cosine."""
    for a, b, expected in (
        ([1.0, 0.0], [0.0, 2.0], 0.0),
        ([1.0, 1.0], [3.0, 3.0], 1.0),
        ([1.0, 0.0], [-5.0, 0.0], -1.0),
        ([3.0, 4.0], [4.0, 3.0], 0.96),
        ([0.0, 0.0], [1.0, 0.0], 0.0),
    ):
        _close([answer(a, b)], [expected], f"for {a} and {b}")


def mean_pool(
    answer: Callable[[list[list[list[float]]], list[list[int]]], list[list[float]]],
) -> None:
    """Check a solution that maps token vectors and a mask to the mean vector of each row."""
    rows = [[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]], [[5.0, 6.0], [7.0, 7.0], [8.0, 8.0]]]
    got = answer(rows, [[1, 1, 0], [1, 0, 0]])
    assert isinstance(got, list) and len(got) == 2, f"expected two rows, got {got}"
    _close(got[0], [2.0, 3.0], "the first row")
    _close(got[1], [5.0, 6.0], "the second row")


def recall(answer: Callable[[list[list[int]], list[int], int], float]) -> None:
    """Check a solution that maps results, correct answers and k to recall at k."""
    results = [[1, 2, 3], [3, 1, 2], [2, 3, 1], [1, 3, 2]]
    for k, expected in ((1, 0.5), (2, 0.5), (3, 1.0)):
        _close([answer(results, [1, 2, 1, 1], k)], [expected], f"at {k}")


def loss_mask(answer: Callable[[int, list[tuple[int, int]], list[int]], list[int]]) -> None:
    """Check a solution that maps the token spans of the assistant and weights to the loss mask."""
    for length, spans, weights, expected in (
        (5, [(2, 4)], [1], [0, 0, 1, 1, 0]),
        (6, [(1, 2), (4, 6)], [0, 1], [0, 0, 0, 0, 1, 1]),
        (3, [(0, 3)], [1], [0, 1, 1]),
        (2, [], [], [0, 0]),
    ):
        got = answer(length, spans, weights)
        assert got == expected, f"for {length}, {spans}, {weights} expected {expected}, got {got}"


def first_fit(answer: Callable[[list[int], int], list[list[int]]]) -> None:
    """Check a solution that packs examples into rows against `training.packing.first_fit`."""
    from training.packing import first_fit as library_first_fit

    rng = random.Random(0)
    cases = [[5, 4, 3, 6, 2, 1], [8], []]
    for lengths in cases + [[rng.randrange(1, 9) for _ in range(30)] for _ in range(20)]:
        got = answer(list(lengths), 8)
        expected = library_first_fit(lengths, 8)
        assert got == expected, f"for {lengths} expected {expected}, got {got}"


def adam(answer: Callable[[list[float], float, float, float], float]) -> None:
    """Check a solution that maps gradients to the weight after Adam's updates against optax."""
    import jax.numpy as jnp
    import optax

    for gradients in ([3.0], [1.0, -1.0, 1.0], [0.1, 0.2, 4.0, -2.0]):
        optimizer = optax.adam(0.1, b1=0.8, b2=0.9, eps=0.0)
        weight = jnp.zeros(())
        state = optimizer.init(weight)
        for gradient in gradients:
            update, state = optimizer.update(jnp.asarray(gradient), state)
            weight = weight + update
        got = answer(list(gradients), 0.1, 0.8, 0.9)
        is_close = isinstance(got, float) and math.isclose(got, float(weight), rel_tol=1e-4)
        assert is_close, f"for {gradients} expected {float(weight):.5f}, got {got}"


def mels(answer: Callable[[float], float]) -> None:
    """Check a solution that maps a frequency to Slaney's mel scale."""
    for hertz, expected in ((0.0, 0.0), (500.0, 7.5), (1000.0, 15.0), (6400.0, 42.0)):
        _close([answer(hertz)], [expected], f"for {hertz} Hz")


def cheapest_path(answer: Callable[[list[list[float]]], float]) -> None:
    """Check a solution that maps a matrix of costs to the cost of the cheapest path."""
    for cost, expected in (
        ([[3.0]], 3.0),
        ([[1.0, 2.0, 3.0]], 6.0),
        ([[1.0], [2.0]], 3.0),
        ([[1.0, 9.0], [9.0, 1.0]], 2.0),
        ([[0.0, 5.0, 5.0], [1.0, 1.0, 5.0], [5.0, 1.0, -2.0]], -1.0),
        ([[2.0, -1.0, -1.0], [0.0, 0.0, 1.0]], 1.0),
    ):
        _close([answer([list(row) for row in cost])], [expected], f"for {cost}")


def word_error_rate(answer: Callable[[str, str], float]) -> None:
    """Check a solution that maps a transcript and a reference to the word error rate."""
    for transcript, reference, expected in (
        ("to be or not", "to be or not", 0.0),
        ("", "to be", 1.0),
        ("to bee or not", "to be or not", 0.25),
        ("be or not to", "to be or not", 0.5),
        ("to be or or not", "to be or not", 0.25),
        ("a b c d", "e", 4.0),
    ):
        _close([answer(transcript, reference)], [expected], f"for {transcript!r} and {reference!r}")


def flow_time(answer: Callable[[float], float]) -> None:
    """Check a solution that maps DDPM's alpha-bar to the time of a flow."""
    for alpha_bar, expected in ((1.0, 1.0), (0.5, 0.5), (0.64, 4 / 7), (0.0, 0.0)):
        _close([answer(alpha_bar)], [expected], f"for {alpha_bar}")


def posterior_mean(answer: Callable[[float, float, list[float]], float]) -> None:
    """Check a solution that maps a noisy number, a time and candidates to the posterior mean."""
    odds = math.exp(2.0)  # of 1 to -1, at z = 0.5, t = 0.5: (1 - 0) / (2 * 0.25)
    for z, t, candidates, expected in (
        (3.0, 0.2, [7.0], 7.0),
        (5.0, 0.0, [1.0, 2.0, 6.0], 3.0),
        (0.5, 0.5, [-1.0, 1.0], (odds - 1) / (odds + 1)),
        (0.9, 0.999, [0.0, 1.0], 1.0),
    ):
        _close([answer(z, t, list(candidates))], [expected], f"for {z} at {t} among {candidates}")


def heun(answer: Callable[[Callable[[float, float], float], float, int], float]) -> None:
    """Check a solution that maps a velocity, a start and a number of steps to the end point."""
    for velocity, z, steps, expected in (
        (lambda z, t: 2.0, 1.0, 3, 3.0),
        (lambda z, t: 2 * t, 1.0, 4, 2.0),
        (lambda z, t: z, 1.0, 1, 2.5),
        (lambda z, t: z, 1.0, 2, 1.625**2),
        (lambda z, t: z * t, 1.0, 1, 1.5),
    ):
        _close([answer(velocity, z, steps)], [expected], f"from {z} in {steps} steps")


def _close(got: object, expected: list[float], case: str) -> None:
    is_list = isinstance(got, list | tuple) and len(got) == len(expected)
    is_close = is_list and all(
        isinstance(a, int | float) and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
        for a, b in zip(got, expected, strict=True)
    )
    assert is_close, f"{case}: expected {[round(x, 4) for x in expected]}, got {got}"
