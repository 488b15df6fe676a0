"""Normalize text before it is tokenized: the steps of SentencePiece and of `tokenizer.json`.

A step is a function from a text, and the position of the text (`encoding.Position`), to a text.
`sequence` joins steps. Only steps that put a space before the first word depend on the position.
The steps of `tokenizers` are described in its documentation under "Normalizers".
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import regex

from bpe.charsmap import Charsmap
from bpe.pretokenize import compile_pattern, find_all

SPACE_SYMBOL = "\u2581"
"""The character that SentencePiece writes for a space."""

Step = Callable[[str, str], str]


@dataclass(frozen=True)
class Sequential:
    """Several steps, one after the other."""

    steps: tuple[Step, ...]

    def __call__(self, text: str, position: str) -> str:
        """Return the normalized text."""
        for step in self.steps:
            text = step(text, position)
        return text


@dataclass(frozen=True)
class Prepend:
    """Put a string before a text, unless the text is empty or follows ordinary text."""

    prefix: str

    def __call__(self, text: str, position: str) -> str:
        """Return the normalized text."""
        return self.prefix + text if text and position != "inside" else text


@dataclass(frozen=True)
class Replace:
    """Replace every occurrence of a string, or of a regular expression."""

    pattern: str
    content: str
    is_regex: bool = False

    def __call__(self, text: str, position: str) -> str:
        """Return the normalized text."""
        if not self.is_regex:
            return text.replace(self.pattern, self.content)
        parts, end = [], 0
        for start, stop in find_all(compile_pattern(self.pattern), text):
            parts += [text[end:start], self.content]
            end = stop
        return "".join([*parts, text[end:]])


@dataclass(frozen=True)
class SentencePieceNormalizer:
    """The normalizer of a `tokenizer.model` (`normalizer.cc` of SentencePiece).

    Attributes:
        charsmap: the replacements of characters, or None.
        kept: texts that are not changed, because they are user-defined tokens.
        add_dummy_prefix: whether to put a space before a text.
        after_tokens: whether to do so also for a text after an added token.
        remove_extra_whitespaces: whether to remove spaces at both ends and repeated ones.
        whitespace_as_suffix: whether the space is put after a text instead.
    """

    charsmap: Charsmap | None = None
    kept: tuple[str, ...] = ()
    add_dummy_prefix: bool = True
    after_tokens: bool = False
    remove_extra_whitespaces: bool = False
    whitespace_as_suffix: bool = False

    def __call__(self, text: str, position: str) -> str:
        """Return the normalized text."""
        if not text:
            return text
        if self.charsmap is not None:
            text = self._apply_charsmap(text)
        if self.remove_extra_whitespaces:
            text = regex.sub(" {2,}", " ", text)
            if position != "inside":
                text = text.lstrip(" ")
            text = text.replace(SPACE_SYMBOL, " ").rstrip(" ")
            if not text:
                return text
        text = text.replace(SPACE_SYMBOL, " ")
        is_first = position == "start" or (self.after_tokens and position == "after token")
        if self.add_dummy_prefix and is_first:
            text = text + " " if self.whitespace_as_suffix else " " + text
        return text

    def _apply_charsmap(self, text: str) -> str:
        assert self.charsmap is not None
        if not self.kept:
            return self.charsmap.replace(text)
        pattern = _any_of(self.kept)
        parts = pattern.split(text)
        parts[::2] = [self.charsmap.replace(part) for part in parts[::2]]
        return "".join(parts)


@functools.lru_cache(maxsize=16)
def _any_of(texts: tuple[str, ...]) -> regex.Pattern[str]:
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return regex.compile(f"({'|'.join(map(regex.escape, longest_first))})")


@dataclass(frozen=True)
class UnicodeForm:
    """Apply a Unicode normalization form."""

    form: Literal["NFC", "NFD", "NFKC", "NFKD"]

    def __call__(self, text: str, position: str) -> str:
        """Return the normalized text."""
        return text if text.isascii() else unicodedata.normalize(self.form, text)


def sequence(steps: Sequence[Step]) -> Step:
    """Return one step for several."""
    return steps[0] if len(steps) == 1 else Sequential(tuple(steps))
