"""Looking inside an encoding: the merges of a word one by one, and how far a token reaches.

`steps` is `merge.merge_list` again, but it tells what it does: which pairs may be joined, and which
of them is. `drawing` shows that as lines that grow between the bytes:

    l   o   w   e   r
    l   o───w   e   r     ow = o + w    rank 256, before 258
    l───o───w   e   r     low = l + ow  rank 257, before 258
    l───o───w   e───r     er = e + r    rank 258
    low 257     er 258

`measure` counts what OpenAI's rule of thumb is about: a token is some 4 characters of English, or
three quarters of a word.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from itertools import pairwise

from bpe.encoding import Encoding
from bpe.merge import NO_MERGE
from bpe.pretokenize import compile_pattern, split
from bpe.special_tokens import fix_surrogates

MAX_DRAWN_BYTES = 64  # bytes of a piece to draw
_COLUMN_WIDTH = 4  # characters: one byte and what joins it to the next


@dataclass(frozen=True, kw_only=True)
class MergeStep:
    """One join.

    Attributes:
        parts: the piece after it.
        at: which of `parts` was made.
        left, right: what was joined.
        rank: the priority of that pair, the lowest of all.
        others: the ranks of the other pairs that could have been joined, ascending.
    """

    parts: tuple[bytes, ...]
    index: int
    left: bytes
    right: bytes
    rank: int
    other_ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Measures:
    """How much text some tokens are."""

    tokens: int
    characters: int
    words: int
    bytes: int

    def per_token(self, amount: int) -> float:
        """`amount` a token; 0 if there are none."""
        return amount / self.tokens if self.tokens else 0.0


def measure(encoding: Encoding, text: str) -> Measures:
    """Counts tokens, characters, words (what stands between white space) and bytes of a text.

    Special tokens spelled in it count as one token each.
    """
    return Measures(
        tokens=len(encoding.encode(text, allowed_special="all")),
        characters=len(text),
        words=len(text.split()),
        bytes=len(text.encode("utf-8", "surrogatepass")),
    )


def merge_steps(encoding: Encoding, piece: bytes) -> list[MergeStep]:
    """The joins that turn the bytes of a piece into tokens, in order."""
    merges, ranks_of_tokens = encoding.merges, encoding.ranks
    parts = [bytes([byte]) for byte in piece.translate(None, encoding.dropped_bytes)]
    found: list[MergeStep] = []
    while True:
        if merges is None:  # two tokens may be joined if that makes a third
            ranks = [ranks_of_tokens.get(left + right, NO_MERGE) for left, right in pairwise(parts)]
        else:
            ranks = [merges.get(pair, NO_MERGE) for pair in pairwise(parts)]
        lowest = min(ranks, default=NO_MERGE)
        if lowest == NO_MERGE:
            return found
        i = ranks.index(lowest)
        left, right = parts[i : i + 2]
        parts[i : i + 2] = [left + right]
        others = tuple(sorted(rank for rank in [*ranks[:i], *ranks[i + 1 :]] if rank != NO_MERGE))
        found.append(
            MergeStep(
                parts=tuple(parts), index=i, left=left, right=right, rank=lowest, other_ranks=others
            )
        )


def explain(encoding: Encoding, text: str) -> str:
    """Text to tokens in words and pictures: the pieces of a text, then the merges of each.

    Special tokens are read as the ordinary text they are spelled with, lone surrogates as U+FFFD.
    """
    text = fix_surrogates(text)
    if encoding.normalization:
        text = unicodedata.normalize(encoding.normalization, text)
    ids = encoding.encode_ordinary(text)
    pieces = split([compile_pattern(pattern) for pattern in encoding.patterns], text)
    lines = [
        f"{text!r} is cut into {_plural(len(pieces), 'piece')} "
        f"and becomes {_plural(len(ids), 'token')}."
    ]
    seen = set()
    for piece in pieces:
        if piece not in seen:
            lines += ["", merge_diagram(encoding, piece)]
        seen.add(piece)
    return "\n".join(lines)


def merge_diagram(encoding: Encoding, piece: str) -> str:
    """The merges of one piece: a line each, its bytes in columns."""
    data = fix_surrogates(piece).encode().translate(None, encoding.dropped_bytes)
    ids = encoding.encode_ordinary(piece)
    tokens = encoding.decode_tokens_bytes(ids)
    if len(data) > MAX_DRAWN_BYTES:
        return f"{len(data)} bytes are too many to draw. They become:\n{_token_row(tokens, ids)}"
    taken = merge_steps(encoding, data)
    first = tuple(bytes([byte]) for byte in data)
    if taken and tokens != list(taken[-1].parts):  # `ignore_merges`
        why = f"{render_token(data)} is a token, {ids[0]}, though no merges lead to it"
        return f"{_columns(first)}\n{why}"

    rows = [(_columns(first), "", "")]
    for step in taken:
        made, left, right = map(render_token, (step.parts[step.index], step.left, step.right))
        others = ""
        if step.other_ranks:
            others = ", before " + ", ".join(map(str, step.other_ranks[:3]))
            others += ", ..." if len(step.other_ranks) > 3 else ""
        join = f"{made} = {left} + {right}"
        rows.append((_columns(step.parts), join, f"rank {step.rank}{others}"))
    width = max(_width(row) for row, _, _ in rows) + 5
    join_width = max(_width(join) for _, join, _ in rows) + 2
    lines = [(_pad(row, width) + _pad(join, join_width) + why).rstrip() for row, join, why in rows]
    return "\n".join([*lines, _token_row(tokens, ids)])


def _columns(parts: tuple[bytes, ...]) -> str:
    """The bytes, each in its column, with lines within a part."""
    row = ""
    for part in parts:
        cells = [render_token(bytes([byte])) for byte in part]
        row += (
            "".join(f"{cell:─<{_COLUMN_WIDTH}}" for cell in cells[:-1])
            + f"{cells[-1]:{_COLUMN_WIDTH}}"
        )
    return row.rstrip()


def _token_row(tokens: list[bytes], ids: list[int]) -> str:
    """The tokens and their ids: under their columns if they fit, else one after the other."""
    labels = [f"{render_token(token)} {id}" for token, id in zip(tokens, ids, strict=True)]
    widths = [_COLUMN_WIDTH * len(token) for token in tokens]
    if all(_width(label) < width for label, width in zip(labels[:-1], widths[:-1], strict=True)):
        return "".join(map(_pad, labels, widths)).rstrip()
    return "   ".join(labels)


def render_token(token: bytes) -> str:
    """A token on one line: spaces as ·, bytes that are no text in hexadecimal.

    >>> render_token(b" low"), render_token("é".encode()), render_token("é".encode()[:1])
    ('·low', 'é', 'C3')
    """
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return token.hex().upper()
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character == " ":
        return "·"
    return character if character.isprintable() else repr(character)[1:-1]


def _width(text: str) -> int:
    """The columns of a terminal that a text takes: two for an emoji, none for an accent."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
