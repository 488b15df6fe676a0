r"""Split text into pieces before merging: the regular expressions of common tokenizers.

Byte-pair encoding never merges across piece boundaries. Because of these patterns, "dog" and "dog!"
share a token instead of each becoming a separate one. Every pattern is an ordered choice: at each
position, the first alternative that matches is used. The patterns come from GPT-2's `encoder.py`,
from cl100k (also used by Llama 3) and from Qwen2. Each was compared with Hugging Face's
`tokenizers` on every assigned character of Unicode.

The `regex` module is needed because `re` of the standard library supports neither `\p{L}` (a letter
of any script) nor `\p{N}` (a number of any script: digits, but also ½, ² and Ⅷ).

The patterns use two less common features of regular expressions:

- `(?!\S)` is a lookahead, which matches no characters: the next character must be whitespace, or
  the text must end. In "a   b", `\s+(?!\S)` first matches all three spaces. The next character is
  the b, so the engine backtracks by one space, and the next character is that space. The match is
  two spaces, and ` ?\p{L}++` matches the third space and the b.
- A second plus, as in `\p{L}++`, makes the repetition *possessive*: it does not backtrack (also
  `?+` and `{1,3}+`). An example is `\s++$`, whitespace up to the end of the text. If a b follows,
  no shorter run can reach the end. A plain `\s+$` would try each shorter run from each space: a
  trillion steps for a million spaces.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import regex

GPT2 = "|".join(
    [
        r"'(?:[sdmt]|ll|ve|re)",  # English contractions, lower case only: 's 'd 'm 't 'll 've 're
        r" ?\p{L}++",  # a word, with the space before it
        r" ?\p{N}++",  # a number of any length, with the space before it
        r" ?[^\s\p{L}\p{N}]++",  # punctuation and symbols, with the space before them
        r"\s++$",  # whitespace at the end of the text
        r"\s+(?!\S)",  # whitespace, without the last character before a word...
        r"\s",  # ...which is a piece if it cannot begin a word (a newline or a tab)
    ]
)

# SmolLM2 and StarCoder first isolate every digit, then apply GPT-2's pattern to the text between
# digits. This pattern does both in one pass: no other alternative may contain a digit, and a digit
# after whitespace acts like the end of the text.
SMOLLM = "|".join(
    [
        r"\p{N}",
        r"'(?:[sdmt]|ll|ve|re)",
        r" ?\p{L}+",
        r" ?[^\s\p{L}\p{N}]+",
        r"\s+(?![^\s\p{N}])",
        r"\s+",
    ]
)

CL100K = "|".join(
    [
        r"'(?i:[sdmt]|ll|ve|re)",  # contractions in either case
        r"[^\r\n\p{L}\p{N}]?+\p{L}++",  # a word, with one leading space *or* symbol: "(word"
        r"\p{N}{1,3}+",  # at most three digits, without the space in front
        r" ?[^\s\p{L}\p{N}]++[\r\n]*+",  # symbols with the newlines after them: ";\n"
        r"\s++$",  # whitespace at the end of the text
        r"\s*[\r\n]",  # newlines with the whitespace before and between them
        r"\s+(?!\S)",  # whitespace, without the last character before other text
        r"\s",
    ]
)

# Llama 3 and Qwen2 use an earlier version of cl100k. At the end of a text, it separates newlines
# from the whitespace after them. In Qwen2 every digit is a piece.
_LLAMA3 = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,DIGITS}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
LLAMA3 = _LLAMA3.replace("DIGITS", "3")
QWEN2 = _LLAMA3.replace(r"{1,DIGITS}", "")

# In Qwen3.5 a combining mark is part of a word, as a letter is.
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
    r" ?[^\s\p{L}\p{N}]", r" ?[^\s\p{L}\p{M}\p{N}]"
)

# A word ends where a capital follows a small letter: "camelCase". Caseless letters and marks (vowel
# signs of Hindi, combining accents) can occur with both.
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",  # "Don't"
        rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",  # "NATO"
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",  # the slash for lines of "//"
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# The time limit of a pattern. The built-in patterns process millions of characters per second.
TIMEOUT_BASE_SECONDS = 5.0
TIMEOUT_CHARS_PER_SECOND = 100_000

PATTERNS = {
    "gpt2": GPT2,
    "smollm": SMOLLM,
    "cl100k": CL100K,
    "llama3": LLAMA3,
    "qwen2": QWEN2,
    "qwen35": QWEN35,
    "o200k": O200K,
}


NormalizationForm = Literal["NFC", "NFD", "NFKC", "NFKD"]

_BUILTIN_PATTERNS = frozenset(PATTERNS.values())
# The characters of \w in Oniguruma. The `regex` module counts the joiners U+200C and U+200D too.
_WORD = r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}"
_ESCAPE_OR_BRACKET = regex.compile(r"\\.|[\[\]]", regex.DOTALL)


def compile_pattern(pattern: str) -> regex.Pattern[str]:
    """Compile one split pattern, with the word characters of Oniguruma, which tokenizers uses.

    Args:
        pattern: a regular expression in the dialect of the `regex` module.

    Raises:
        ValueError: if the pattern is not a valid regular expression.
    """
    depth = 0

    def replace(match: regex.Match[str]) -> str:
        nonlocal depth
        token = match[0]
        depth = max(depth + (token == "[") - (token == "]"), 0)
        if token == r"\w":
            return _WORD if depth else f"[{_WORD}]"
        return token

    try:
        return regex.compile(_ESCAPE_OR_BRACKET.sub(replace, pattern))
    except regex.error as error:
        raise ValueError(
            f"split pattern {pattern!r} is not a valid regular expression: {error}"
        ) from None


def split(patterns: Sequence[regex.Pattern[str]], text: str) -> list[str]:
    """Split `text` into pieces, whose concatenation is `text`.

    >>> split([compile_pattern(GPT2)], "I'm 12 dogs,   ok?")
    ['I', "'m", ' 12', ' dogs', ',', '  ', ' ok', '?']

    Several patterns are applied in turn, each to the pieces of the previous one. Text that a
    pattern does not match becomes a separate piece (the behavior "isolated" of Hugging Face), so no
    pattern can lose text.

    Args:
        patterns: the compiled split patterns, see `compile_pattern`.
        text: the text.

    Raises:
        ValueError: if a pattern exceeds its time limit; a pattern from a file may need time
            exponential in the length of the text.
    """
    pieces = [text]
    if len(patterns) == 1:
        return _split_one(patterns[0], text)
    for pattern in patterns:
        pieces = [
            part
            for piece in pieces
            for part in (
                _split_short(pattern, piece)
                if len(piece) <= _MAX_SHORT
                else _isolate(pattern, piece)
            )
        ]
    return pieces


# After the first patterns the pieces are words, which repeat. A call of a regular expression takes
# microseconds, a lookup a tenth of that.
_MAX_SHORT = 32  # characters


@functools.lru_cache(maxsize=2**16)
def _split_short(pattern: regex.Pattern[str], text: str) -> list[str]:
    return _isolate(pattern, text)


def _split_one(pattern: regex.Pattern[str], text: str) -> list[str]:
    """Split a text by a pattern that is likely to match all of it."""
    seconds = _time_limit(pattern, text)
    if pattern.groups == 0:
        try:
            pieces = pattern.findall(text, timeout=seconds)
        except TimeoutError:
            raise _timeout_error(pattern, text) from None
        if sum(map(len, pieces)) == len(text) and "" not in pieces:
            return pieces
    # Rare: gaps, empty matches, or capture groups, which `findall` would return instead.
    return _isolate(pattern, text)


def _isolate(pattern: regex.Pattern[str], text: str) -> list[str]:
    """Split a text into the matches of a pattern and the text between them."""
    pieces, end = [], 0
    for start, stop in find_all(pattern, text):
        pieces += [text[end:start], text[start:stop]]
        end = stop
    pieces.append(text[end:])
    return [piece for piece in pieces if piece]


def find_all(pattern: regex.Pattern[str], text: str) -> list[tuple[int, int]]:
    """Return the (start, end) of every match of a pattern.

    Raises:
        ValueError: if the pattern exceeds its time limit.
    """
    try:
        return [
            match.span() for match in pattern.finditer(text, timeout=_time_limit(pattern, text))
        ]
    except TimeoutError:
        raise _timeout_error(pattern, text) from None


def _time_limit(pattern: regex.Pattern[str], text: str) -> float | None:
    # The built-in patterns need no time limit, which would double their time.
    if pattern.pattern in _BUILTIN_PATTERNS:
        return None
    return TIMEOUT_BASE_SECONDS + len(text) / TIMEOUT_CHARS_PER_SECOND


def _timeout_error(pattern: regex.Pattern[str], text: str) -> ValueError:
    return ValueError(
        f"split pattern {pattern.pattern!r} took more than {_time_limit(pattern, text):.1f} s "
        f"on {len(text)} characters; simplify the pattern"
    )
