r"""Split text into pieces as `pretokenize` does, with NumPy array operations instead of a regex.

A regex engine finds one match after the other. But the start of a piece is nearly always determined
by adjacent characters: a digit after a letter, a word after a blank. So a split pattern is
expressed as a few rules about the class of each character and of its neighbors, and each rule is
one operation on the arrays of all characters:

    text     I  '  m     1  2  3  4  !  \n
    class    W  O  W  B  N  N  N  N  O  L     word, other, blank, number, newline
    changes  ^  ^  ^  ^  ^           ^  ^     the class differs from that of the previous character
    pieces   ^  ^     ^  ^        ^  ^        after contractions, blanks, digits and newlines

A few rules concern runs of any length ("blanks between two newlines"). They are evaluated only
where such a run occurs and find its ends by binary search, so the time stays near linear.

The character classes are computed with the `regex` module, so they are those of the patterns.
`fast_splits` applies several patterns in turn. Other patterns need the regex engine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import regex

from bpe.pretokenize import (
    CL100K,
    GPT2,
    LLAMA3,
    O200K,
    QWEN2,
    QWEN35,
    SMOLLM,
    compile_pattern,
    split,
)

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.intp]
Classes = npt.NDArray[np.uint8]
CodePoints = npt.NDArray[Any]  # the characters: uint8 if all are ASCII, else uint32

# The character classes. END is the class of the separators before, between and after texts.
# The classes of word characters differ in the lowest two bits only; WORD has both bits set.
LOWER, UPPER, CASELESS, MARK, NUMBER, OTHER, BLANK, NEWLINE, END = 0, 1, 2, 3, 7, 11, 15, 19, 23
WORD = MARK
_SPACE, _APOSTROPHE, _SLASH = b" '/"


class PieceOffsets(NamedTuple):
    """The offsets of the pieces of several texts.

    Attributes:
        data: the texts in UTF-8, with a separator byte before, between and after them.
        offsets: [pieces + texts + 1], the offset in `data` of each piece and separator.
        separators: [texts + 1], the indices in `offsets` of the separators.
    """

    data: bytes
    offsets: Ints
    separators: Ints


def pretokenize_batch(pattern: str, texts: Sequence[str]) -> PieceOffsets:
    """Split several texts with array operations, and return the offsets of their pieces.

    Args:
        pattern: a key of `FAST_PATTERNS`.
        texts: strings without surrogates; they may be empty.
    """
    joined = "\n".join(["", *texts, ""])
    data = joined.encode()
    separators = np.cumsum([0, *(len(text) + 1 for text in texts)])
    if joined.isascii():
        codes = np.frombuffer(data, np.uint8)
        classes = np.frombuffer(bytearray(data.translate(_ascii_class_table(pattern))), np.uint8)
    else:
        codes = np.frombuffer(joined.encode("utf-32-le"), "<u4")
        classes = class_table(pattern).take(codes)
    classes[separators] = END
    if (start := FAST_PATTERNS[pattern].find_starts(classes, codes)) is None:
        lengths = [
            n for text in texts for n in (1, *map(len, split([_compile_cached(pattern)], text)))
        ]
        offsets = np.cumsum([0, *lengths])
    else:
        start[separators] = True  # also of empty texts
        offsets = np.flatnonzero(start)
    return to_byte_offsets(data, offsets, separators, len(joined))


def to_byte_offsets(data: bytes, offsets: Ints, separators: Ints, num_chars: int) -> PieceOffsets:
    """Return `PieceOffsets`, in bytes of UTF-8, from offsets in characters.

    Args:
        data: the texts in UTF-8, with a separator byte before, between and after them.
        offsets: the offset in characters of each piece and of each separator.
        separators: the offset in characters of each separator.
        num_chars: the number of characters of `data`, separators included.
    """
    if len(separators) > 2:
        indices = np.searchsorted(offsets, separators)
    else:
        indices = np.array([0, len(offsets) - 1])
    if len(data) != num_chars:
        first_byte = np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80)
        offsets = first_byte.take(offsets)
    return PieceOffsets(data, offsets, indices)


def gpt2(classes: Classes, codes: CodePoints, *, individual_digits: bool = False) -> Bools:
    """Find the starts of the pieces of `pretokenize.GPT2`, or of `SMOLLM`.

    Args:
        classes: [n], the class of each character; END for the separators before, between and after
            texts. Newlines have the class BLANK here.
        codes: [n], the code points of the characters.
        individual_digits: whether every digit is a piece, as in `SMOLLM`.

    Returns:
        [n], True where a piece begins.
    """
    number, other = classes == NUMBER, classes == OTHER
    text = other | (classes == WORD)
    if not individual_digits:
        text |= number
    start = _changes(classes)
    start |= (classes == BLANK) & _next_items(text)  # `\s+(?!\S)` does not take the last blank
    _clear(start, text & _previous_items(codes == _SPACE))  # a word takes a space before it
    if individual_digits:
        start |= number
    position = np.flatnonzero(start & other & (codes == _APOSTROPHE))
    position, end = _contractions(position, codes, fold=False)
    start[position + 1] = False
    start[end] = True
    return start


def cl100k(
    classes: Classes,
    codes: CodePoints,
    *,
    max_digits: int = 3,
    join_trailing_whitespace: bool = False,
) -> Bools:
    """Find the starts of the pieces of `pretokenize.CL100K`, `LLAMA3` or `QWEN2`.

    Args:
        classes: [n], the class of each character; END for the separators before, between and after
            texts.
        codes: [n], the code points of the characters.
        max_digits: the maximum number of digits in a piece: 3, or 1 for Qwen2.
        join_trailing_whitespace: whether whitespace at the end of a text, including newlines, is
            one piece.

    Returns:
        [n], True where a piece begins.
    """
    start = _changes(classes)
    number, other = classes == NUMBER, classes == OTHER
    _whitespace(start, classes, codes, other, join_trailing_whitespace)
    _attach_leading_character(start, classes, other)
    _digits(start, number, max_digits)
    position = np.flatnonzero(start & other & (codes == _APOSTROPHE))
    _, end = _contractions(position, codes)
    start[end] = True
    return start


def o200k(classes: Classes, codes: CodePoints) -> Bools | None:
    """Find the starts of the pieces of `pretokenize.O200K`.

    A word ends where a capital follows a small letter, and includes combining marks and
    contractions. Slashes may occur among the newlines after symbols.

    Args:
        classes: [n], the class of each character; END for the separators before, between and after
            texts. Modified.
        codes: [n], the code points of the characters.

    Returns:
        [n], True where a piece begins. None if a text has both marks among symbols and slashes
        after newlines, a rare combination that is not implemented here.
    """
    marks = _marks_among_symbols(classes, codes)
    classes[marks] = OTHER
    if ((codes == _SLASH) & _previous_items(classes == NEWLINE)).any():
        if len(marks):
            return None
        classes[_slashes_among_newlines(classes, codes)] = NEWLINE
    case, classes = classes, classes | np.uint8(WORD)

    start = _changes(classes)
    number, other, word = classes == NUMBER, classes == OTHER, classes == WORD
    _whitespace(start, classes, codes, other, join_trailing_whitespace=False)
    _attach_leading_character(start, classes, other)
    _digits(start, number, 3)
    position = np.flatnonzero(_previous_items(word) & other & (codes == _APOSTROPHE))
    position, end = _contractions(position, codes)
    if len(position):
        # In "x's's" the second apostrophe begins a new word: only every other contraction of a
        # chain belongs to the word before it.
        first = np.r_[True, end[:-1] != position[1:]]
        index = np.arange(len(position))
        odd = (index - np.maximum.accumulate(np.where(first, index, 0))) % 2 == 1
        position, end = position[~odd], end[~odd]
    _split_at_case_changes(start, case, word, end)
    start[position] = False
    start[position + 2] = False  # no case change within 'lL
    start[end] = True
    return start


# Rules that several patterns share. Each rule modifies `start`.


def _whitespace(
    start: Bools, classes: Classes, codes: CodePoints, other: Bools, join_trailing_whitespace: bool
) -> None:
    blank, newline = classes == BLANK, classes == NEWLINE
    start |= blank & _next_items((classes >= WORD) & (classes <= OTHER))  # `\s+(?!\S)`
    _clear(start, other & _previous_items(codes == _SPACE))  # ` ?[^\s\p{L}\p{N}]+`
    # `[\r\n]*` after symbols, and `\s*[\r\n]+`
    _clear(start, newline & _previous_items(other | blank))
    # Blanks between two newlines are in one piece with them, unless the newlines before them belong
    # to symbols.
    blank_end = _previous_items(blank) & (
        (newline | (classes == END)) if join_trailing_whitespace else newline
    )
    if blank_end.any():
        blank_end = np.flatnonzero(blank_end)
        first_blank = _last_true(blank & ~_previous_items(blank), blank_end)
        after_newline = first_blank[newline[first_blank - 1]]
        first_newline = _last_true(newline & ~_previous_items(newline), after_newline)
        start[after_newline[~other[first_newline - 1]]] = False


def _attach_leading_character(start: Bools, classes: Classes, other: Bools) -> None:
    r"""Apply `[^\r\n\p{L}\p{N}]?\p{L}+` to `start`: clear the starts of words after a blank.

    A word after a symbol that starts a piece does not start a piece either.
    """
    _clear(start, (classes == WORD) & _previous_items((classes == BLANK) | (other & start)))


def _digits(start: Bools, number: Bools, max_digits: int) -> None:
    r"""Apply `\p{N}{1,max_digits}`: set `start` within runs of more than `max_digits` digits."""
    if max_digits == 1:
        start |= number
        return
    edges = np.flatnonzero(_changes(number))[1:]  # without position 0, a separator
    first, length = edges[::2], edges[1::2] - edges[::2]
    long = length > max_digits
    first, num_splits = first[long], (length[long] - 1) // max_digits
    start[np.repeat(first, num_splits) + max_digits * (concat_aranges(num_splits) + 1)] = True


def _contractions(position: Ints, codes: CodePoints, *, fold: bool = True) -> tuple[Ints, Ints]:
    """Return the positions of apostrophes that begin 's 't 're 've 'm 'll 'd, and their ends."""
    a, b = (
        codes[position + 1].astype(np.intp),
        codes.take(position + 2, mode="clip").astype(np.intp),
    )
    if fold:  # `(?i:s)` also matches the long s, U+017F; the other letters have no such variant
        a, b = np.where(a == 0x17F, ord("s"), a | 32), b | 32
    two = (
        _is_character(a, "s")
        | _is_character(a, "d")
        | _is_character(a, "m")
        | _is_character(a, "t")
    )
    three = (_is_character(a, "l") & _is_character(b, "l")) | (
        (_is_character(a, "v") | _is_character(a, "r")) & _is_character(b, "e")
    )
    matches = two | three
    return position[matches], (position + 2 + three)[matches]


def _is_character(codes: Ints, character: str) -> Bools:
    return codes == ord(character)


def _split_at_case_changes(start: Bools, case: Classes, word: Bools, restarts: Ints) -> None:
    r"""Split words as `[\p{Lu}..]*[\p{Ll}..]+|[\p{Lu}..]+[\p{Ll}..]*`; the dots are caseless.

    Args:
        start: [n], True where a piece begins; modified.
        case: [n], the classes of the characters.
        word: [n], whether a character belongs to a word.
        restarts: the positions after contractions, where a word begins.
    """
    lower, upper = case == LOWER, case == UPPER
    start |= upper & _previous_items(lower)
    position = upper & _previous_items(word & ~(lower | upper))
    if not position.any():
        return
    position = np.flatnonzero(position)
    # A capital after caseless letters begins a piece if there is a small letter among these...
    stop = ~word | upper
    stop[restarts - 1] = True
    small = _last_true(lower, position) > _last_true(stop, position - 1)
    # ...or if only capitals follow: then the first alternative backtracks before them.
    last_capital = _next_true(upper & ~_next_items(upper), position)
    start[position] = small | ~word[last_capital + 1]


def _marks_among_symbols(classes: Classes, codes: CodePoints) -> Ints:
    r"""Return the positions of the combining marks that ` ?[^\s\p{L}\p{N}]+` matches.

    A mark after a symbol forms a word with it, unless two symbols, or a space and a symbol, come
    before: then all following symbols and marks are one piece.
    """
    mark = classes == MARK
    if not mark.any():
        return np.empty(0, np.intp)
    other = classes == OTHER
    position = np.flatnonzero(mark & _previous_items(other))
    if not len(position):
        return position
    both = mark | other
    begin = _last_true(other & (_next_items(other) | _previous_items(codes == _SPACE)), position)
    position = position[begin >= _last_true(both & ~_previous_items(both), position)]
    length = _next_true(mark & ~_next_items(mark), position) + 1 - position
    return np.repeat(position, length) + concat_aranges(length)


def _slashes_among_newlines(classes: Classes, codes: CodePoints) -> Ints:
    r"""Return the positions of the slashes that `[\r\n/]*` matches after symbols and a newline."""
    newline, other, slash = classes == NEWLINE, classes == OTHER, codes == _SLASH
    both = newline | slash
    position = np.flatnonzero(newline & _previous_items(other))
    end, first = np.unique(_next_true(both & ~_next_items(both), position) + 1, return_index=True)
    position, length = (
        position[first],
        end - position[first],
    )  # of several starts in one run, the first
    run = np.repeat(position, length) + concat_aranges(length)
    return run[slash[run]]


# Arrays


def _changes(x: npt.NDArray[Any]) -> Bools:
    """Return whether each item differs from the previous one; True for the first."""
    changes = np.empty(len(x), np.bool_)
    changes[:1] = True
    np.not_equal(x[1:], x[:-1], out=changes[1:])
    return changes


def _previous_items(x: Bools) -> Bools:
    """Return `x` shifted right by one, with False at the start."""
    y = np.empty_like(x)
    y[:1] = False
    y[1:] = x[:-1]
    return y


def _next_items(x: Bools) -> Bools:
    """Return `x` shifted left by one, with False at the end."""
    y = np.empty_like(x)
    y[-1:] = False
    y[:-1] = x[1:]
    return y


def _clear(x: Bools, mask: Bools) -> None:
    np.greater(x, mask, out=x)  # x and not mask


def _last_true(x: Bools, positions: Ints) -> Ints:
    """Return the last True in `x` at or before each position; -1 if there is none."""
    true = np.flatnonzero(x)
    return np.r_[-1, true][np.searchsorted(true, positions, side="right")]


def _next_true(x: Bools, positions: Ints) -> Ints:
    """Return the first True in `x` at or after each position; it must exist."""
    true = np.flatnonzero(x)
    return true[np.searchsorted(true, positions)]


def concat_aranges(lengths: Ints) -> Ints:
    """Return the concatenated ranges 0, 1, ... of each length: [2, 3] gives 0 1 0 1 2."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


# Classes of characters


class FastPattern(NamedTuple):
    """The implementation of a split pattern with arrays.

    Attributes:
        kind_classes: the character classes that the pattern uses for LOWER, UPPER, CASELESS, MARK,
            NUMBER, OTHER, BLANK and NEWLINE, in this order; a pattern that ignores case uses WORD
            for the first three.
        find_starts: function of character classes [n] and code points [n] that returns a mask [n],
            True where a piece begins, or None if the regex engine is needed.
    """

    kind_classes: tuple[int, ...]
    find_starts: Callable[[Classes, CodePoints], Bools | None]


_KINDS = (LOWER, UPPER, CASELESS, MARK, NUMBER, OTHER, BLANK, NEWLINE)
_GPT2 = (WORD, WORD, WORD, OTHER, NUMBER, OTHER, BLANK, BLANK)
_CL100K = (WORD, WORD, WORD, OTHER, NUMBER, OTHER, BLANK, NEWLINE)
_O200K = _KINDS

FAST_PATTERNS = {
    GPT2: FastPattern(_GPT2, gpt2),
    SMOLLM: FastPattern(_GPT2, functools.partial(gpt2, individual_digits=True)),
    CL100K: FastPattern(_CL100K, functools.partial(cl100k, join_trailing_whitespace=True)),
    LLAMA3: FastPattern(_CL100K, cl100k),
    QWEN2: FastPattern(_CL100K, functools.partial(cl100k, max_digits=1)),
    # As Qwen2, but a combining mark is part of a word.
    QWEN35: FastPattern(
        (WORD, WORD, WORD, WORD, NUMBER, OTHER, BLANK, NEWLINE),
        functools.partial(cl100k, max_digits=1),
    ),
    O200K: FastPattern(_O200K, o200k),
}


@functools.cache
def _kind_table() -> Classes:
    """Return the index in `FastPattern.kind_classes` of every character [0x110000]."""
    characters = np.arange(0x110000, dtype=np.uint32).tobytes().decode("utf-32-le", "surrogatepass")
    table = np.full(0x110000, _KINDS.index(OTHER), np.uint8)
    for value, members in {
        CASELESS: r"\p{L}",
        UPPER: r"[\p{Lu}\p{Lt}]",
        LOWER: r"\p{Ll}",
        MARK: r"\p{M}",
        NUMBER: r"\p{N}",
        BLANK: r"\s",
        NEWLINE: r"[\r\n]",
    }.items():
        for match in regex.finditer(f"{members}+", characters):
            table[match.start() : match.end()] = _KINDS.index(value)
    return table


@functools.cache
def class_table(pattern: str) -> Classes:
    """Return the class of every character [0x110000] in a key of `FAST_PATTERNS`."""
    return np.array(FAST_PATTERNS[pattern].kind_classes, np.uint8).take(_kind_table())


@functools.cache
def _ascii_class_table(pattern: str) -> bytes:
    return class_table(pattern)[:256].tobytes()


_compile_cached = functools.cache(compile_pattern)
