r"""Apply several split patterns in turn with array operations: the `Sequence` of Hugging Face.

DeepSeek LLM and Falcon split a text several times: at newlines, then around words, then around
punctuation. Most of these patterns match a run of characters of one class, with or without one
whitespace character before it: `[\r\n]`, `\p{N}+`, `\s?\p{L}+`, `[0-9][0-9][0-9]`. A run ends
where the next character is not in the class, or is in another piece of the previous pattern. So a
table of the characters of the class and the starts of the previous pieces give the new starts:

    text      a  b  .  .     1  2
    \p{P}+          ^     ^           the run, and the text after it
    \p{N}+                   ^        added to the starts before

The table of a class is computed with the `regex` module. A pattern of `FAST_PATTERNS` in a sequence
is applied to the text with a separator between the pieces.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import regex

from bpe.fast_pretokenizer import (
    END,
    FAST_PATTERNS,
    Bools,
    CodePoints,
    PieceOffsets,
    class_table,
    concat_aranges,
    to_byte_offsets,
)
from bpe.pretokenize import compile_pattern, split

_CLASS = r"\[(?:\\[^xuUNpP]|\\[xuU][0-9a-fA-F]+|\\[pP]\{\w+\}|[^\[\]\\])+\]|\\[pP]\{\w+\}|\\[sdw]"


class Run(NamedTuple):
    r"""A pattern that matches a run of characters of one class.

    Attributes:
        members: the class, a regular expression that matches one character.
        least: the minimum number of characters; 1, or the same as `most`.
        most: the maximum number; 0 for no maximum.
        space: whether one whitespace character before the run belongs to it (`\s?`).
        at_end: whether only a run at the end of the text matches (`$`).
    """

    members: str
    least: int = 1
    most: int = 0
    space: bool = False
    at_end: bool = False


@functools.cache
def parse_run(pattern: str) -> Run | None:
    """Return the run that a split pattern matches; None for other patterns."""
    if pattern == r"\s+$":
        return Run(r"\s", at_end=True)
    for members in regex.findall(rf"^(?:\\s\?)?({_CLASS})", pattern):
        rest = pattern.removeprefix(r"\s?")
        space = rest != pattern
        repeats = rest.removeprefix(members)
        limit = regex.fullmatch(r"\{1,([1-9])\}", repeats)
        if repeats == "+":
            return Run(members, space=space)
        if space:  # for a class with whitespace in it, `\s?[...]` is not the rule of a run
            return None
        if limit:
            return Run(members, most=int(limit[1]))
        count = len(rest) // len(members)
        if members * count == rest:
            return Run(members, least=count, most=count)
    return None


def supports_sequence(patterns: Sequence[str]) -> bool:
    """Return whether `pretokenize_sequence` can apply these patterns."""
    if not patterns or find_cut_pattern(patterns[0]) is None:
        return False
    return all(pattern in FAST_PATTERNS or parse_run(pattern) for pattern in patterns)


@functools.cache
def find_cut_pattern(first: str) -> regex.Pattern[str] | None:
    """Return a pattern that matches where a text can be cut without a change of its pieces.

    The start of a run of the first pattern starts a piece, and each side is split independently.

    Args:
        first: the first of several split patterns.

    Returns:
        None if the first pattern has no such positions.
    """
    run = parse_run(first)
    if run is None or run.space or run.at_end or run.least > 1:
        return None
    return regex.compile(f"(?<!{run.members})(?={run.members})")


def pretokenize_sequence(patterns: Sequence[str], texts: Sequence[str]) -> PieceOffsets:
    """Split several texts by patterns in turn, as `pretokenize.split` does.

    Args:
        patterns: the patterns; `supports_sequence` must be true.
        texts: strings without surrogates; they may be empty.
    """
    joined = "\n".join(["", *texts, ""])
    codes = np.frombuffer(joined.encode("utf-32-le"), "<u4")
    separators = np.cumsum([0, *(len(text) + 1 for text in texts)])
    start = np.zeros(len(codes), np.bool_)
    start[separators] = True
    start[separators[:-1] + 1] = True
    is_separator = np.zeros(len(codes), np.bool_)
    is_separator[separators] = True
    for pattern in patterns:
        if run := parse_run(pattern):
            _split_runs(run, codes, is_separator, start)
        elif not _split_pieces(pattern, codes, is_separator, start):
            return _by_regex(patterns, joined, texts)
    return to_byte_offsets(joined.encode(), np.flatnonzero(start), separators, len(joined))


def _split_runs(run: Run, codes: CodePoints, is_separator: Bools, start: Bools) -> None:
    """Add the starts of the matches of a run, and of the text after them, to `start` [n]."""
    member = _members(run.members).take(codes)
    member &= ~is_separator
    inside = member[1:] & member[:-1] & ~start[1:]  # continues the run of the previous character
    first = np.flatnonzero(member & ~np.append(False, inside))
    end = np.flatnonzero(member & ~np.append(inside, False)) + 1  # a separator follows every text
    if run.at_end:
        first = first[start[end]]
        start[first] = True
    elif run.most == 0:
        if run.space:  # unless the whitespace is in another piece, or separates the texts
            before = _members(r"\s").take(codes.take(first - 1)) & ~start[first]
            first = first - before
        start[first] = True
        start[end] = True
    else:
        # A remainder of less than `least` is not matched: it stays with the text after the run.
        length = end - first
        count = (length + run.most - run.least) // run.most
        first, length, count = first[count > 0], length[count > 0], count[count > 0]
        start[np.repeat(first, count) + run.most * concat_aranges(count)] = True
        start[first + np.minimum(run.most * count, length)] = True


def _split_pieces(pattern: str, codes: CodePoints, is_separator: Bools, start: Bools) -> bool:
    """Add the starts of a pattern of `FAST_PATTERNS` to `start`; False if it needs the regex."""
    positions = np.flatnonzero(start)
    inserted = positions + np.arange(len(positions))
    kept = np.ones(len(codes) + len(positions), np.bool_)
    kept[inserted] = False
    spaced = np.full(len(kept), ord("\n"), codes.dtype)
    spaced[kept] = codes
    classes = class_table(pattern).take(spaced)
    classes[inserted] = END
    classes[np.flatnonzero(kept)[is_separator]] = END
    if (found := FAST_PATTERNS[pattern].find_starts(classes, spaced)) is None:
        return False
    start |= found[kept]
    return True


def _by_regex(patterns: Sequence[str], joined: str, texts: Sequence[str]) -> PieceOffsets:
    compiled = [compile_pattern(pattern) for pattern in patterns]
    lengths = [n for text in texts for n in (1, *map(len, split(compiled, text)))]
    separators = np.cumsum([0, *(len(text) + 1 for text in texts)])
    return to_byte_offsets(joined.encode(), np.cumsum([0, *lengths]), separators, len(joined))


@functools.cache
def _members(members: str) -> Bools:
    """Return whether each character is in a class [0x110000]."""
    characters = np.arange(0x110000, dtype=np.uint32).tobytes().decode("utf-32-le", "surrogatepass")
    table = np.zeros(0x110000, np.bool_)
    for match in regex.finditer(f"{members}+", characters):
        table[match.start() : match.end()] = True
    return table
