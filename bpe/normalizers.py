"""Normalize text before it is tokenized: the normalizers of SentencePiece and `tokenizer.json`.

A normalizer (`Step`) is a function of a text and its position (`encoding.Position`) that returns
the normalized text. `sequence` joins several normalizers into one. Only those that put a space
before the first word depend on the position. The normalizers of a `tokenizer.json` are described in
the documentation of `tokenizers` under "Normalizers".
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import regex

from bpe.added_tokens import WHITESPACE
from bpe.charsmap import Charsmap
from bpe.pretokenize import compile_pattern, find_all

SPACE_SYMBOL = "\u2581"
"""The character that SentencePiece writes for a space."""

Step = Callable[[str, str], str]


@dataclass(frozen=True)
class Sequential:
    """Apply several normalizers, one after the other."""

    steps: tuple[Step, ...]

    def __call__(self, text: str, position: str) -> str:
        """Return the normalized text, given its position in a longer text (`Position`)."""
        for step in self.steps:
            text = step(text, position)
        return text


@dataclass(frozen=True)
class Prepend:
    """Put a string before a text, unless the text is empty or follows ordinary text."""

    prefix: str

    def __call__(self, text: str, position: str) -> str:
        """Return the normalized text, given its position in a longer text (`Position`)."""
        return self.prefix + text if text and position != "inside" else text


@dataclass(frozen=True)
class Replace:
    """Replace every occurrence of a string, or of a regular expression."""

    pattern: str
    content: str
    is_regex: bool = False

    def __call__(self, text: str, position: str) -> str:
        """Return the normalized text, given its position in a longer text (`Position`)."""
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
        kept: the user-defined tokens, which the charsmap does not change.
        add_dummy_prefix: whether to put a space before a text.
        after_tokens: whether `add_dummy_prefix` also applies to a text after an added token.
        remove_extra_whitespaces: whether to remove spaces at both ends, and all but one of
            repeated spaces.
        whitespace_as_suffix: whether the space of `add_dummy_prefix` is put after a text instead.
    """

    charsmap: Charsmap | None = None
    kept: tuple[str, ...] = ()
    add_dummy_prefix: bool = True
    after_tokens: bool = False
    remove_extra_whitespaces: bool = False
    whitespace_as_suffix: bool = False

    def __call__(self, text: str, position: str) -> str:
        """Return the normalized text, given its position in a longer text (`Position`)."""
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
        """Return the normalized text, given its position in a longer text (`Position`)."""
        return text if text.isascii() else unicodedata.normalize(self.form, text)


@dataclass(frozen=True)
class Strip:
    """Remove whitespace at the ends of a text."""

    left: bool
    right: bool

    def __call__(self, text: str, position: str) -> str:
        """Return the normalized text, given its position in a longer text (`Position`)."""
        text = text.lstrip(WHITESPACE) if self.left else text
        return text.rstrip(WHITESPACE) if self.right else text


@dataclass(frozen=True)
class Lowercase:
    """Convert letters to lower case, each without regard to its neighbors."""

    def __call__(self, text: str, position: str) -> str:
        """Return the normalized text, given its position in a longer text (`Position`)."""
        return text.replace("\u03a3", "\u03c3").lower()  # Python's lower knows the final sigma


@dataclass(frozen=True)
class StripAccents:
    """Remove combining marks."""

    def __call__(self, text: str, position: str) -> str:
        """Return the normalized text, given its position in a longer text (`Position`)."""
        if text.isascii():
            return text
        # The tables of Python are as old as those of tokenizers, unlike those of `regex`.
        return "".join(c for c in text if not unicodedata.category(c).startswith("M"))


@dataclass(frozen=True)
class Precompiled:
    """Apply a precompiled charsmap by graphemes, as `tokenizers` does."""

    charsmap: Charsmap

    def __call__(self, text: str, position: str) -> str:
        """Return the normalized text, given its position in a longer text (`Position`)."""
        return self.charsmap.replace_graphemes(text)


@dataclass(frozen=True)
class Nmt:
    """Remove control characters and replace other whitespace by spaces (`Nmt` of tokenizers)."""

    def __call__(self, text: str, position: str) -> str:
        """Return the normalized text, given its position in a longer text (`Position`)."""
        return text.translate(_NMT)


_NMT = {code: None for code in [*range(1, 9), 0xB, *range(0xE, 0x20), 0x7F, 0x8F, 0x9F]} | {
    code: " "
    for code in [9, 0xA, 0xC, 0xD, 0x1680, *range(0x200B, 0x2010), 0x2028, 0x2029, 0x2581]
    + [0xFEFF, 0xFFFD]
}


@dataclass(frozen=True)
class JoinWords:
    """Put one space before every word and remove other whitespace (WhitespaceSplit, Metaspace)."""

    def __call__(self, text: str, position: str) -> str:
        """Return the normalized text, given its position in a longer text (`Position`)."""
        words = text.translate(_TO_SPACE).split(" ")
        return "".join(
            word if word.startswith(SPACE_SYMBOL) else " " + word for word in words if word
        )


_TO_SPACE = {ord(character): " " for character in WHITESPACE}


def sequence(steps: Sequence[Step]) -> Step:
    """Return one normalizer that applies all `steps`; without steps, it changes nothing."""
    return steps[0] if len(steps) == 1 else Sequential(tuple(steps))
