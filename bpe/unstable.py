"""How a text that is not complete may go on: what `encode_with_unstable` needs.

It follows tiktoken, approximations and all.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from itertools import accumulate

import regex

from bpe.vocab import Vocab

_LAST_BLANK = regex.compile(r"\s\Z")


def completions(
    vocab: Vocab,
    tokens: list[bytes],
    begun: bytes,
    *,
    encode: Callable[[list[str]], list[list[int]]],
    decode: Callable[[int], bytes],
) -> set[tuple[int, ...]]:
    """Return the ids that cover the bytes `begun`, the last of them perhaps more than these.

    Args:
        tokens: the bytes of all ordinary tokens, sorted.
        encode: gives the ids of ordinary texts.
        decode: gives the bytes of an id.
    """
    if not begun:
        return set()
    found: set[tuple[int, ...]] = {(vocab.ranks[t],) for t in _starting_with(tokens, begun)}
    texts: list[str] = []
    encoded: list[list[int]] = []
    for i in range(1, len(begun)):
        for token in _starting_with(tokens, begun[i:]):
            try:
                texts.append((begun[:i] + token).decode())
            except UnicodeDecodeError:
                encoded.append(vocab.merge(begun[:i] + token))
    for ids in encoded + encode(texts):
        ends = accumulate(len(decode(id)) for id in ids)
        enough = next(i for i, end in enumerate(ends, 1) if end >= len(begun))
        found.add(tuple(ids[:enough]))
    # White space may be cut before its last character once something follows.
    if (last := _LAST_BLANK.search(begun.decode(errors="replace"))) and begun != (
        blank := last.group().encode()
    ):
        found.add(tuple(vocab.merge(begun[: -len(blank)]) + vocab.merge(blank)))
    return found


def _starting_with(tokens: list[bytes], prefix: bytes) -> list[bytes]:
    """The tokens that begin with `prefix`."""
    start = end = bisect.bisect_left(tokens, prefix)
    while end < len(tokens) and tokens[end].startswith(prefix):
        end += 1
    return tokens[start:end]
