r"""The cuts of `pretokenize`, for a whole text at once: NumPy instead of a regex engine.

A split pattern looks at a text one match after the other. But nearly all that decides where a piece
begins stands right beside the place: a digit after a letter, a word after a blank. So a pattern
becomes a few statements about the class of each character and of its neighbours, and a statement is
one operation on the arrays of all characters:

    text     I  '  m     1  2  3  4  !  \n
    class    W  O  W  B  N  N  N  N  O  L     word, other, blank, number, line end
    changes  ^  ^  ^  ^  ^           ^  ^     where the class is not that of the character before
    pieces   ^  ^     ^  ^        ^  ^        after contractions, blanks, digits and line ends

The few statements about runs of any length ("blanks between two line ends") look only at the places
concerned and find the ends of the run by binary search, so the time stays near linear.

The classes are read off the `regex` module, so they are the ones that the patterns see. Left out:
patterns that are not in `CUTS`; those take the regex engine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import regex

from bpe.pretokenize import CL100K, GPT2, LLAMA3, O200K, QWEN2, SMOLLM, compile_pattern, split

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.intp]
Classes = npt.NDArray[np.uint8]
CodePoints = npt.NDArray[Any]  # the characters: uint8 if all are ASCII, else uint32

# The classes of characters. END stands before and after every text and is no character of it.
# What words are made of differs in the lowest two bits only: where that doesn't matter, it is WORD.
LOWER, UPPER, CASELESS, MARK, NUMBER, OTHER, BLANK, NEWLINE, END = 0, 1, 2, 3, 7, 11, 15, 19, 23
WORD = MARK
_SPACE, _APOSTROPHE, _SLASH = b" '/"


class PieceOffsets(NamedTuple):
    """Where the pieces of some texts begin.

    Attributes:
        data: the texts in UTF-8, with one byte before, between and after them.
        begin: [pieces + texts + 1], offsets into `data`, those of the extra bytes among them.
        ends: [texts + 1], which items of `begin` are the extra bytes.
    """

    data: bytes
    offsets: Ints
    separators: Ints


def pretokenize_batch(pattern: str, texts: Sequence[str]) -> PieceOffsets:
    """Cuts texts into pieces, all at once.

    Args:
        pattern: a key of `CUTS`.
        texts: any strings without surrogates; empty ones too.
    """
    joined = "\n".join(["", *texts, ""])
    data = joined.encode()
    ends = np.cumsum([0, *(len(text) + 1 for text in texts)])
    if joined.isascii():
        codes = np.frombuffer(data, np.uint8)
        classes = np.frombuffer(bytearray(data.translate(_ascii_class_table(pattern))), np.uint8)
    else:
        codes = np.frombuffer(joined.encode("utf-32-le"), "<u4")
        classes = _class_table(pattern).take(codes)
    classes[ends] = END
    if (start := FAST_PATTERNS[pattern].find_starts(classes, codes)) is None:
        lengths = [
            n for text in texts for n in (1, *map(len, split([_compile_cached(pattern)], text)))
        ]
        begin = np.cumsum([0, *lengths])
    else:
        start[ends] = True  # also of empty texts
        begin = np.flatnonzero(start)
    ends_at = np.searchsorted(begin, ends) if len(ends) > 2 else np.array([0, len(begin) - 1])
    if len(data) != len(joined):
        first_byte = np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80)
        begin = first_byte.take(begin)
    return PieceOffsets(data, begin, ends_at)


def gpt2(classes: Classes, codes: CodePoints, *, individual_digits: bool = False) -> Bools:
    """Where pieces begin, as `pretokenize.GPT2` has it; with `lone_digits`, as `SMOLLM`.

    Args:
        classes: [n], END at both ends and between texts; LINE is BLANK here.
        codes: [n], the characters themselves.

    Returns:
        [n], True where a piece begins.
    """
    number, other = classes == NUMBER, classes == OTHER
    text = other | (classes == WORD)
    if not individual_digits:
        text |= number
    start = _changes(classes)
    start |= (classes == BLANK) & _next_items(
        text
    )  # `\s+(?!\S)` leaves the last one to what follows,
    _clear(start, text & _previous_items(codes == _SPACE))  # and if it is a space, that takes it
    if individual_digits:
        start |= number
    place = np.flatnonzero(start & other & (codes == _APOSTROPHE))
    place, end = _contractions(place, codes, fold=False)
    start[place + 1] = False
    start[end] = True
    return start


def cl100k(
    classes: Classes,
    codes: CodePoints,
    *,
    max_digits: int = 3,
    join_trailing_whitespace: bool = False,
) -> Bools:
    """Where pieces begin, as `pretokenize.CL100K` and its relatives have it.

    Args:
        classes: [n], END at both ends and between texts.
        codes: [n], the characters themselves.
        digits: how many digits a piece may have: 3, or 1 as in Qwen2.
        whole_tail: whether white space at the end of a text is one piece, line ends and all.

    Returns:
        [n], True where a piece begins.
    """
    start = _changes(classes)
    number, other = classes == NUMBER, classes == OTHER
    _white_space(start, classes, codes, other, join_trailing_whitespace)
    _attach_leading_character(start, classes, other)
    _digits(start, number, max_digits)
    place = np.flatnonzero(start & other & (codes == _APOSTROPHE))
    _, end = _contractions(place, codes)
    start[end] = True
    return start


def o200k(classes: Classes, codes: CodePoints) -> Bools | None:
    """Where pieces begin, as `pretokenize.O200K` has it.

    Words end where a capital follows a small letter; they take combining marks and contractions
    along. Slashes may stand among the line ends after symbols.

    Args:
        classes: [n], END at both ends and between texts.
        codes: [n], the characters themselves.

    Returns:
        [n], True where a piece begins. None if marks among symbols and slashes
        after line ends come together, which is too rare to sort out here.
    """
    marks = _marks_among_symbols(classes, codes)
    classes[marks] = OTHER
    if ((codes == _SLASH) & _previous_items(classes == NEWLINE)).any():
        if len(marks):
            return None
        classes[_slashes_among_lines(classes, codes)] = NEWLINE
    case, classes = classes, classes | np.uint8(WORD)

    start = _changes(classes)
    number, other, word = classes == NUMBER, classes == OTHER, classes == WORD
    _white_space(start, classes, codes, other, join_trailing_whitespace=False)
    _attach_leading_character(start, classes, other)
    _digits(start, number, 3)
    place = np.flatnonzero(_previous_items(word) & other & (codes == _APOSTROPHE))
    place, end = _contractions(place, codes)
    if len(place):
        # In "x's's" the second apostrophe begins a word of its own: every other one of a chain.
        first = np.r_[True, end[:-1] != place[1:]]
        index = np.arange(len(place))
        odd = (index - np.maximum.accumulate(np.where(first, index, 0))) % 2 == 1
        place, end = place[~odd], end[~odd]
    _split_at_case_changes(start, case, word, end)
    start[place] = False
    start[place + 2] = False  # 'lL is no place for a capital to begin
    start[end] = True
    return start


# What the patterns have in common. Each changes `start`.


def _white_space(
    start: Bools, classes: Classes, codes: CodePoints, other: Bools, join_trailing_whitespace: bool
) -> None:
    blank, line = classes == BLANK, classes == NEWLINE
    start |= blank & _next_items((classes >= WORD) & (classes <= OTHER))  # `\s+(?!\S)`
    _clear(start, other & _previous_items(codes == _SPACE))  # ` ?[^\s\p{L}\p{N}]+`
    _clear(
        start, line & _previous_items(other | blank)
    )  # `[\r\n]*` after symbols, and `\s*[\r\n]+`
    # Blanks between two line ends belong with them, unless symbols have taken the line ends before.
    close = _previous_items(blank) & (
        (line | (classes == END)) if join_trailing_whitespace else line
    )
    if close.any():
        close = np.flatnonzero(close)
        first_blank = _last_true(blank & ~_previous_items(blank), close)
        after_line = first_blank[line[first_blank - 1]]
        first_line = _last_true(line & ~_previous_items(line), after_line)
        start[after_line[~other[first_line - 1]]] = False


def _attach_leading_character(start: Bools, classes: Classes, other: Bools) -> None:
    r"""`[^\r\n\p{L}\p{N}]?\p{L}+`: a blank, or a symbol that no other piece has taken."""
    _clear(start, (classes == WORD) & _previous_items((classes == BLANK) | (other & start)))


def _digits(start: Bools, number: Bools, digits: int) -> None:
    r"""`\p{N}{1,digits}`"""
    if digits == 1:
        start |= number
        return
    edges = np.flatnonzero(_changes(number))[1:]  # without the first place, which is no number
    first, length = edges[::2], edges[1::2] - edges[::2]
    long = length > digits
    first, more = first[long], (length[long] - 1) // digits
    start[np.repeat(first, more) + digits * (_concat_aranges(more) + 1)] = True


def _contractions(place: Ints, codes: CodePoints, *, fold: bool = True) -> tuple[Ints, Ints]:
    """Which apostrophes begin 's 't 're 've 'm 'll or 'd, and where these end."""
    a, b = codes[place + 1].astype(np.intp), codes.take(place + 2, mode="clip").astype(np.intp)
    if fold:  # `(?i:s)` is also the long s, U+017F; no other of the letters has such a relative
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
    found = two | three
    return place[found], (place + 2 + three)[found]


def _is_character(codes: Ints, character: str) -> Bools:
    return codes == ord(character)


def _split_at_case_changes(start: Bools, case: Classes, word: Bools, restarts: Ints) -> None:
    r"""Within words: `[\p{Lu}..]*[\p{Ll}..]+`, else `[\p{Lu}..]+[\p{Ll}..]*`. The dots: no case.

    Args:
        restarts: where a word begins after a contraction.
    """
    lower, upper = case == LOWER, case == UPPER
    start |= upper & _previous_items(lower)
    place = upper & _previous_items(word & ~(lower | upper))
    if not place.any():
        return
    place = np.flatnonzero(place)
    # A capital after letters without case begins a piece if there is a small letter among these...
    halt = ~word | upper
    halt[restarts - 1] = True
    small = _last_true(lower, place) > _last_true(halt, place - 1)
    # ...or if nothing but capitals follows: then the first of the alternatives gives them back.
    last_capital = _next_true(upper & ~_next_items(upper), place)
    start[place] = small | ~word[last_capital + 1]


def _marks_among_symbols(classes: Classes, codes: CodePoints) -> Ints:
    r"""The combining marks that ` ?[^\s\p{L}\p{N}]+` takes.

    A mark after a symbol makes a word with it, unless two symbols in a row came before, or a space
    and a symbol: then all symbols and marks from there on are one piece.
    """
    mark = classes == MARK
    if not mark.any():
        return np.empty(0, np.intp)
    other = classes == OTHER
    place = np.flatnonzero(mark & _previous_items(other))
    if not len(place):
        return place
    both = mark | other
    begin = _last_true(other & (_next_items(other) | _previous_items(codes == _SPACE)), place)
    place = place[begin >= _last_true(both & ~_previous_items(both), place)]
    length = _next_true(mark & ~_next_items(mark), place) + 1 - place
    return np.repeat(place, length) + _concat_aranges(length)


def _slashes_among_lines(classes: Classes, codes: CodePoints) -> Ints:
    r"""The slashes that `[\r\n/]*` takes after symbols and a line end."""
    line, other, slash = classes == NEWLINE, classes == OTHER, codes == _SLASH
    both = line | slash
    place = np.flatnonzero(line & _previous_items(other))
    end, first = np.unique(_next_true(both & ~_next_items(both), place) + 1, return_index=True)
    place, length = place[first], end - place[first]  # those after such a slash begin nothing new
    taken = np.repeat(place, length) + _concat_aranges(length)
    return taken[slash[taken]]


# Arrays


def _changes(x: npt.NDArray[Any]) -> Bools:
    """Where an item differs from the one before; the first does."""
    changes = np.empty(len(x), np.bool_)
    changes[:1] = True
    np.not_equal(x[1:], x[:-1], out=changes[1:])
    return changes


def _previous_items(x: Bools) -> Bools:
    """At each place, what `x` has at the place before."""
    y = np.empty_like(x)
    y[:1] = False
    y[1:] = x[:-1]
    return y


def _next_items(x: Bools) -> Bools:
    """At each place, what `x` has at the next place."""
    y = np.empty_like(x)
    y[-1:] = False
    y[:-1] = x[1:]
    return y


def _clear(x: Bools, where: Bools) -> None:
    np.greater(x, where, out=x)  # x and not where


def _last_true(x: Bools, places: Ints) -> Ints:
    """The last True in `x` at or before each place; -1 if there is none."""
    true = np.flatnonzero(x)
    return np.r_[-1, true][np.searchsorted(true, places, side="right")]


def _next_true(x: Bools, places: Ints) -> Ints:
    """The first True in `x` at or after each place, where there must be one."""
    true = np.flatnonzero(x)
    return true[np.searchsorted(true, places)]


def _concat_aranges(lengths: Ints) -> Ints:
    """0, 1, ... up to each length: [2, 3] gives 0 1 0 1 2."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


# Classes of characters


class FastPattern(NamedTuple):
    """How to find the pieces of a pattern.

    Attributes:
        classes: what LOWER, UPPER, CASELESS, MARK, NUMBER, OTHER, BLANK and LINE count as.
        find: classes and characters to where pieces begin; None if it cannot tell.
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
    O200K: FastPattern(_O200K, o200k),
}


@functools.cache
def _kind_table() -> Classes:
    """[0x110000], for every character its place in `Cut.classes`."""
    everything = np.arange(0x110000, dtype=np.uint32).tobytes().decode("utf-32-le", "surrogatepass")
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
        for match in regex.finditer(f"{members}+", everything):
            table[match.start() : match.end()] = _KINDS.index(value)
    return table


@functools.cache
def _class_table(pattern: str) -> Classes:
    return np.array(FAST_PATTERNS[pattern].kind_classes, np.uint8).take(_kind_table())


@functools.cache
def _ascii_class_table(pattern: str) -> bytes:
    return _class_table(pattern)[:256].tobytes()


_compile_cached = functools.cache(compile_pattern)
