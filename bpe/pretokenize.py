r"""Cutting text into pieces before any merge: the regular expressions of the tokenizers we know.

Byte-pair encoding never merges across the border of a piece, so these patterns decide that "dog",
" dog" and "dog!" share a token instead of each growing their own. Every pattern is an ordered
choice: at each position the first alternative that matches wins. They come from GPT-2's
`encoder.py`, from cl100k (Llama 3 took it over) and from Qwen2; each was compared with Hugging
Face's `tokenizers` on every assigned character of Unicode.

The `regex` module is needed because the standard library's `re` knows neither `\p{L}` (a letter of
any script) nor `\p{N}` (a number of any script: digits, but also ½, ² and Ⅷ).

Two things in them are not in every introduction to regular expressions:

- `(?!\S)` takes nothing, it looks ahead: the next character must not be one that is no white space.
  In "a   b", `\s+(?!\S)` first takes all three spaces, sees the b, gives one space back, and then
  sees that space. So it ends with two, and ` ?\p{L}++` takes the third along with the b.
- A second plus, as in `\p{L}++`, forbids that giving back (the repetition is *possessive*; so are
  `?+` and `{1,3}+`). Take `\s++$`, white space up to the end of the text. Where a b follows, fewer
  spaces do not reach the end either, and a plain `\s+$` would find that out for each shorter run,
  from each space on: on a million spaces, a trillion steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import regex

GPT2 = "|".join(
    [
        r"'(?:[sdmt]|ll|ve|re)",  # English contractions, lower case only: 's 'd 'm 't 'll 've 're
        r" ?\p{L}++",  # a word, taking one space in front of it along
        r" ?\p{N}++",  # a number of any length, likewise
        r" ?[^\s\p{L}\p{N}]++",  # a run of punctuation and symbols, likewise
        r"\s++$",  # white space at the end of the text
        r"\s+(?!\S)",  # white space, leaving its last character to the word that follows...
        r"\s",  # ...unless that character cannot lead a word (a newline or a tab before text)
    ]
)

# SmolLM2 (and StarCoder) first cut out every digit, then apply GPT-2's pattern to what lies
# between. One pass does both: a digit stands alone, so no other clause may hold one, and white
# space in front of a digit ends its stretch just as the end of the text would.
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
        r" ?[^\s\p{L}\p{N}]++[\r\n]*+",  # symbols with the line ends after them: ";\n"
        r"\s++$",  # white space at the end of the text
        r"\s*[\r\n]",  # line ends with the white space before and between them
        r"\s+(?!\S)",  # white space, leaving the last character to what follows
        r"\s",
    ]
)

# Llama 3 and Qwen2 have taken over an earlier form of it, which at the end of a text does not join
# line ends with the white space after them. In Qwen2 every digit stands alone.
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

# A word ends where a capital follows a small letter: "camelCase". Letters without case, and marks
# (the vowel signs of Hindi, accents written apart), go with either.
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

# What a pattern may take: seconds at least, and characters a second, of which our own do millions.
TIMEOUT_BASE_SECONDS = 5.0
TIMEOUT_CHARS_PER_SECOND = 100_000

PATTERNS = {
    "gpt2": GPT2,
    "smollm": SMOLLM,
    "cl100k": CL100K,
    "llama3": LLAMA3,
    "qwen2": QWEN2,
    "o200k": O200K,
}


_BUILTIN_PATTERNS = frozenset(PATTERNS.values())


def compile_pattern(pattern: str) -> regex.Pattern[str]:
    """Compiles one split pattern.

    Args:
        pattern: a regular expression in the dialect of the `regex` module.

    Raises:
        ValueError: if it is not one.
    """
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(
            f"split pattern {pattern!r} is not a regular expression: {error}"
        ) from None


def split(patterns: Sequence[regex.Pattern[str]], text: str) -> list[str]:
    """Cuts `text` into pieces; joined together they are `text` again.

    >>> split([compile_pattern(GPT2)], "I'm 12 dogs,   ok?")
    ['I', "'m", ' 12', ' dogs', ',', '  ', ' ok', '?']

    Several patterns are applied in turn, each to the pieces that the one before it left. What a
    pattern does not match becomes a piece of its own (Hugging Face calls it "isolated"), so that no
    pattern can lose text.

    Raises:
        ValueError: if a pattern takes far longer than scanning the text once does; one from a file
            may need time exponential in the length of the text.
    """
    pieces = [text]
    for pattern in patterns:
        if len(pieces) == 1:
            pieces = _split_one(pattern, pieces[0])
        else:
            pieces = [part for piece in pieces for part in _split_one(pattern, piece)]
    return pieces


def _split_one(pattern: regex.Pattern[str], text: str) -> list[str]:
    # Our own need no limit, and do without in half the time.
    seconds = (
        None
        if pattern.pattern in _BUILTIN_PATTERNS
        else TIMEOUT_BASE_SECONDS + len(text) / TIMEOUT_CHARS_PER_SECOND
    )
    try:
        if pattern.groups == 0:
            pieces = pattern.findall(text, timeout=seconds)
            if sum(map(len, pieces)) == len(text) and "" not in pieces:
                return pieces
        # Rare: gaps, empty matches, or capture groups, which `findall` would return instead.
        pieces, end = [], 0
        for match in pattern.finditer(text, timeout=seconds):
            pieces += [text[end : match.start()], match.group()]
            end = match.end()
    except TimeoutError:
        raise ValueError(
            f"split pattern {pattern.pattern!r} took more than {seconds:.1f} s "
            f"on {len(text)} characters"
        ) from None
    pieces.append(text[end:])
    return [piece for piece in pieces if piece]
