"""Decode token ids incrementally, and find stop strings across tokens.

A token may end in the middle of a character (an emoji has four bytes, often in two or three
tokens), and a stop string may begin in one token and end in another. `StreamDecoder` and
`StopMatcher` buffer only incomplete characters and possible beginnings of stop strings. Their
concatenated output does not depend on how the input is divided into calls.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class _TokenDecoder(Protocol):
    @property
    def dummy_prefix(self) -> bool: ...

    def decode_single_token_bytes(self, token: int, /) -> bytes: ...


class StreamDecoder:
    """An incremental decoder from token ids to text that never returns half a character.

    The concatenated results of `push` and `flush` equal `encoding.decode(ids)`: U+FFFD replaces
    only bytes that are invalid UTF-8 in the complete text.
    """

    def __init__(self, encoding: _TokenDecoder, *, after_prompt: bool = False):
        """Create a decoder.

        Args:
            encoding: the vocabulary of the tokens.
            after_prompt: whether the tokens continue a prompt. Then a space at their start belongs
                to the text. Otherwise the space is removed if `encoding` puts a space before every
                text (`dummy_prefix`).
        """
        self._encoding = encoding
        self._drops_space = encoding.dummy_prefix and not after_prompt
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the text that `token` completes; empty if it ends inside a character.

        Raises:
            KeyError: if the encoding has no such token.
        """
        data = self._encoding.decode_single_token_bytes(token)
        if self._drops_space:
            data, self._drops_space = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """End the text: return U+FFFD if the last character is incomplete, else ""."""
        return self._utf8.decode(b"", final=True)


class StopMatcher:
    """A filter that passes text through up to the first stop string, which is not returned.

    The first stop string is the one that is complete first when the text is read character by
    character. If two stop strings end at the same character, the longer one counts.
    """

    def __init__(self, stop_strings: Sequence[str]):
        """Create a matcher.

        Args:
            stop_strings: the stop strings; none may be empty.

        Raises:
            ValueError: if a stop string is empty, or `stop_strings` is a string.
        """
        if isinstance(stop_strings, str):
            raise ValueError(
                f"stop_strings must be a sequence of strings, not the string {stop_strings!r}"
            )
        if not all(stop_strings):
            raise ValueError(f"stop strings must not be empty, got {list(stop_strings)}")
        self._stops = tuple(stop_strings)
        self._longest = max(map(len, self._stops), default=0)
        self._buffer = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Add `text`, and return the text that cannot be part of a stop string.

        Returns:
            The text to pass on, and whether a stop string was found. After a stop string, every
            call returns `("", True)`.
        """
        if self._stopped:
            return "", True
        text = self._buffer + text
        matches = [(start + len(s), start) for s in self._stops if (start := text.find(s)) >= 0]
        if matches:
            self._stopped = True
            self._buffer = ""
            _, start = min(matches)
            return text[:start], True
        safe = len(text) - self._partial_match_length(text)
        self._buffer = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """End the text: return the buffered text, which could have begun a stop string."""
        text, self._buffer = self._buffer, ""
        return text

    def _partial_match_length(self, text: str) -> int:
        """Return the length of the longest suffix of `text` that is a prefix of a stop string."""
        for n in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stops):
                return n
        return 0
