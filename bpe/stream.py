"""Text that arrives in pieces: whole characters out of token ids, and stop strings across them.

A token may end in the middle of a character (an emoji takes four bytes, often in two or three
tokens), and a stop string may begin in one token and end in another. Both classes hold back only
what is still undecided, and what they return in total never depends on how the input was cut.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class _TokenDecoder(Protocol):
    def decode_single_token_bytes(self, token: int, /) -> bytes: ...


class StreamDecoder:
    """Turns token ids into text, never returning half a character.

    All that `push` and `flush` return, joined, equals `encoding.decode(ids)`: U+FFFD stands only
    for bytes that are no UTF-8 in the whole text either.
    """

    def __init__(self, encoding: _TokenDecoder):
        self._encoding = encoding
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that `token` completes; empty if it ends inside a character.

        Raises:
            KeyError: if the encoding has no such token.
        """
        return self._utf8.decode(self._encoding.decode_single_token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character is unfinished, else nothing."""
        return self._utf8.decode(b"", final=True)


class StopMatcher:
    """Passes text through up to the first stop string, which is never emitted, nor any part of it.

    First means: completed first, as a reader going character by character would find it. Where two
    stop strings end at the same character, the one that began earlier (the longer) counts.
    """

    def __init__(self, stop_strings: Sequence[str]):
        """
        Args:
            stops: the stop strings; none of them may be empty.

        Raises:
            ValueError: if one is empty (it would match before the first character).
        """
        if isinstance(stop_strings, str):
            raise ValueError(
                f"stops must be a sequence of strings, not the string {stop_strings!r}"
            )
        if not all(stop_strings):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stop_strings)
        self._longest = max(map(len, self._stops), default=0)
        self._buffer = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Adds `text`.

        Returns:
            What can be emitted now, and whether a stop string has been found (from then on, every
            call returns `("", True)`).
        """
        if self._stopped:
            return "", True
        text = self._buffer + text
        found = [(start + len(s), start) for s in self._stops if (start := text.find(s)) >= 0]
        if found:
            self._stopped = True
            self._buffer = ""
            _, start = min(found)
            return text[:start], True
        safe = len(text) - self._partial_match_length(text)
        self._buffer = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """What was held back: at the end of the text, an unfinished stop string is just text."""
        held, self._buffer = self._buffer, ""
        return held

    def _partial_match_length(self, text: str) -> int:
        """Length of the longest end of `text` with which some stop string begins."""
        for n in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stops):
                return n
        return 0
