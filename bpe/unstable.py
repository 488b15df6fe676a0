"""How a text that is not complete may go on: what `Encoding.encode_with_unstable` needs.

It follows tiktoken, approximations and all.
"""

from __future__ import annotations

import bisect
from itertools import accumulate
from typing import TYPE_CHECKING

import regex

if TYPE_CHECKING:
    from bpe.encoding import Encoding

_LAST_BLANK = regex.compile(r"\s\Z")


def completions(encoding: Encoding, tokens: list[bytes], begun: bytes) -> set[tuple[int, ...]]:
    """Return the ids that cover the bytes `begun`, the last of them perhaps more than these.

    Args:
        tokens: the bytes of all ordinary tokens, sorted.
    """
    if not begun:
        return set()
    found: set[tuple[int, ...]] = {(encoding.ranks[t],) for t in _starting_with(tokens, begun)}
    texts: list[str] = []
    encoded: list[list[int]] = []
    for i in range(1, len(begun)):
        for token in _starting_with(tokens, begun[i:]):
            try:
                texts.append((begun[:i] + token).decode())
            except UnicodeDecodeError:
                encoded.append(encoding.merge(begun[:i] + token))
    for ids in encoded + encoding.encode_ordinary_batch(texts):
        ends = accumulate(len(encoding.decode_single_token_bytes(id)) for id in ids)
        enough = next(i for i, end in enumerate(ends, 1) if end >= len(begun))
        found.add(tuple(ids[:enough]))
    # White space may be cut before its last character once something follows.
    if (last := _LAST_BLANK.search(begun.decode(errors="replace"))) and begun != (
        blank := last.group().encode()
    ):
        found.add(tuple(encoding.merge(begun[: -len(blank)]) + encoding.merge(blank)))
    return found


def _starting_with(tokens: list[bytes], prefix: bytes) -> list[bytes]:
    """The tokens that begin with `prefix`."""
    start = end = bisect.bisect_left(tokens, prefix)
    while end < len(tokens) and tokens[end].startswith(prefix):
        end += 1
    return tokens[start:end]
