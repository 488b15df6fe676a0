"""Find the possible continuations of an incomplete text, for `Encoding.encode_with_unstable`.

The results follow tiktoken, including its approximations.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from itertools import accumulate

import regex

from bpe.vocab import Vocab

_TRAILING_WHITESPACE = regex.compile(r"\s\Z")


def completions(
    vocab: Vocab,
    tokens: list[bytes],
    prefix: bytes,
    *,
    encode: Callable[[list[str]], list[list[int]]],
    decode: Callable[[int], bytes],
) -> set[tuple[int, ...]]:
    """Return all sequences of ids whose bytes begin with `prefix`.

    The bytes of a sequence without its last id are shorter than `prefix`.

    Args:
        vocab: the vocabulary.
        tokens: the bytes of all ordinary tokens, sorted.
        prefix: the bytes of the incomplete text.
        encode: function that returns the ids of ordinary texts.
        decode: function that returns the bytes of an id.
    """
    if not prefix:
        return set()
    sequences: set[tuple[int, ...]] = {(vocab.ranks[t],) for t in _starting_with(tokens, prefix)}
    texts: list[str] = []
    encoded: list[list[int]] = []
    for i in range(1, len(prefix)):
        for token in _starting_with(tokens, prefix[i:]):
            try:
                texts.append((prefix[:i] + token).decode())
            except UnicodeDecodeError:
                encoded.append(vocab.merge(prefix[:i] + token))
    for ids in encoded + encode(texts):
        ends = accumulate(len(decode(id)) for id in ids)
        length = next(i for i, end in enumerate(ends, 1) if end >= len(prefix))
        sequences.add(tuple(ids[:length]))
    # Whitespace may be split before its last character if more text follows.
    if (match := _TRAILING_WHITESPACE.search(prefix.decode(errors="replace"))) and prefix != (
        last := match.group().encode()
    ):
        sequences.add(tuple(vocab.merge(prefix[: -len(last)]) + vocab.merge(last)))
    return sequences


def _starting_with(tokens: list[bytes], prefix: bytes) -> list[bytes]:
    """Return the tokens that begin with `prefix`."""
    start = end = bisect.bisect_left(tokens, prefix)
    while end < len(tokens) and tokens[end].startswith(prefix):
        end += 1
    return tokens[start:end]
