"""Explain an encoding: list the merges of a word, and measure how much text a token covers.

`merge_steps` is `merge.merge_list` with a record of each merge: the pair that was merged, and the
ranks of the other pairs that could be merged. `merge_diagram` draws each merge as a line between
the bytes:

    l   o   w   e   r
    l   o───w   e   r     ow = o + w    rank 256, before 258
    l───o───w   e   r     low = l + ow  rank 257, before 258
    l───o───w   e───r     er = e + r    rank 258
    low 257     er 258

`lattice_diagram` does the same for Unigram: it lists the tokens of the lattice, and the best path.

`measure` computes the ratios of OpenAI's rule of thumb: a token is about 4 characters of English,
or three quarters of a word.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from itertools import pairwise

from bpe.encoding import Encoding
from bpe.merge import NO_MERGE
from bpe.pretokenize import compile_pattern, split
from bpe.sentencepiece import SentencePiece
from bpe.special_tokens import fix_surrogates
from bpe.unigram import Unigram
from bpe.vocab import Vocab

MAX_DRAWN_BYTES = 64  # longer pieces are not drawn
_COLUMN_WIDTH = 4  # characters for one byte and the line to the next


@dataclass(frozen=True, kw_only=True)
class MergeStep:
    """One merge of two adjacent tokens, and the pairs that could have been merged instead.

    Attributes:
        parts: the tokens of the piece after the merge.
        index: the index in `parts` of the new token.
        left: the left token of the merged pair.
        right: the right token of the merged pair.
        rank: the rank of the pair, the lowest of all.
        other_ranks: the ranks of the other mergeable pairs, ascending.
    """

    parts: tuple[bytes, ...]
    index: int
    left: bytes
    right: bytes
    rank: int
    other_ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Measures:
    """The size of a text in tokens, characters, words and bytes."""

    tokens: int
    characters: int
    words: int
    bytes: int

    def per_token(self, amount: int) -> float:
        """Return `amount`, such as `words`, divided by `tokens`; 0 without tokens."""
        return amount / self.tokens if self.tokens else 0.0


def measure(encoding: Encoding, text: str) -> Measures:
    """Count the tokens, characters, words (separated by whitespace) and bytes of a text.

    A special token in the text counts as one token.
    """
    return Measures(
        tokens=len(encoding.encode(text, allowed_special="all")),
        characters=len(text),
        words=len(text.split()),
        bytes=len(text.encode("utf-8", "surrogatepass")),
    )


def merge_steps(vocab: Vocab, piece: bytes) -> list[MergeStep]:
    """Return the merges that turn the bytes of a piece into tokens, in order."""
    parts = [bytes([byte]) for byte in piece.translate(None, vocab.dropped_bytes)]
    steps: list[MergeStep] = []
    while True:
        ranks = [vocab.rank(left, right) for left, right in pairwise(parts)]
        lowest = min(ranks, default=NO_MERGE)
        if lowest == NO_MERGE:
            return steps
        i = ranks.index(lowest)
        left, right = parts[i : i + 2]
        parts[i : i + 2] = [left + right]
        others = tuple(sorted(rank for rank in [*ranks[:i], *ranks[i + 1 :]] if rank != NO_MERGE))
        steps.append(
            MergeStep(
                parts=tuple(parts), index=i, left=left, right=right, rank=lowest, other_ranks=others
            )
        )


def explain(encoding: Encoding, text: str) -> str:
    """Describe the encoding of a text: its pieces, then a diagram of the merges of each.

    Special tokens are encoded as ordinary text, lone surrogates as U+FFFD.
    """
    text = fix_surrogates(text)
    ids = encoding.encode_ordinary(text)
    text = encoding.normalize(text)
    if isinstance(encoding, SentencePiece):
        pieces = encoding.segments(text)
    else:
        pieces = split([compile_pattern(pattern) for pattern in encoding.patterns], text)
    lines = [
        f"{text!r} is cut into {_plural(len(pieces), 'piece')} "
        f"and becomes {_plural(len(ids), 'token')}."
    ]
    for piece in dict.fromkeys(pieces):
        lines += ["", merge_diagram(encoding, piece)]
    return "\n".join(lines)


def merge_diagram(encoding: Encoding, piece: str) -> str:
    """Draw the merges of one piece, one per line, with its bytes in columns.

    For a Unigram vocabulary, draw the lattice of the piece instead: see `lattice_diagram`.
    """
    data = fix_surrogates(piece).encode().translate(None, encoding.dropped_bytes)
    vocab: Vocab = encoding
    if isinstance(encoding, SentencePiece):
        ids = encoding.encode_piece(data)
        if isinstance(encoding.model, Unigram):
            return lattice_diagram(encoding, data.decode())
        assert encoding.model.vocab is not None
        vocab = encoding.model.vocab
    else:
        ids = encoding.encode_ordinary(piece)
    tokens = encoding.decode_tokens_bytes(ids)
    if len(data) > MAX_DRAWN_BYTES:
        return f"{len(data)} bytes are too many to draw. They become:\n{_token_row(tokens, ids)}"
    steps = merge_steps(vocab, data)
    first = tuple(bytes([byte]) for byte in data)
    if vocab.ignore_merges and steps and tokens != list(steps[-1].parts):  # `ignore_merges`
        note = f"{render_token(data)} is the token {ids[0]}, which no sequence of merges makes"
        return f"{_columns(first)}\n{note}"

    rows = [(_columns(first), "", "")]
    for step in steps:
        merged, left, right = map(render_token, (step.parts[step.index], step.left, step.right))
        others = ""
        if step.other_ranks:
            others = ", before " + ", ".join(map(str, step.other_ranks[:3]))
            others += ", ..." if len(step.other_ranks) > 3 else ""
        equation = f"{merged} = {left} + {right}"
        rows.append((_columns(step.parts), equation, f"rank {step.rank}{others}"))
    columns_width = max(_width(columns) for columns, _, _ in rows) + 5
    equation_width = max(_width(equation) for _, equation, _ in rows) + 2
    lines = [
        (_pad(columns, columns_width) + _pad(equation, equation_width) + ranks).rstrip()
        for columns, equation, ranks in rows
    ]
    return "\n".join([*lines, _token_row(tokens, ids)])


def lattice_diagram(encoding: SentencePiece, text: str) -> str:
    """List all tokens that occur in a text, with their scores, and the best path.

    A token stands under its characters; `*` marks those of the best path. The score is the
    logarithm of the probability, and the last line is the sum over the best path.

    Args:
        encoding: the encoding, with a Unigram model.
        text: a normalized text.

    Raises:
        TypeError: if the model is not Unigram.
    """
    model = encoding.model
    if not isinstance(model, Unigram):
        raise TypeError(f"expected an encoding with a Unigram model, got {encoding!r}")
    ids = encoding.encode_piece(text.encode())
    tokens = encoding.decode_tokens_bytes(ids)
    if len(text) > MAX_DRAWN_BYTES:
        return f"{len(text)} characters are too many to draw.\n{_token_row(tokens, ids)}"
    cells = [render_token(character.encode()) for character in text]
    offsets = [sum(map(_width, cells[:i])) for i in range(len(cells) + 1)]
    best = {(begin, end) for begin, end, _ in model.best_path(text)}
    lines, total = ["  " + "".join(cells)], 0.0
    for edge in model.lattice(text):
        is_best = (edge.begin, edge.end) in best
        total += edge.score if is_best else 0.0
        token = " " * offsets[edge.begin] + "".join(cells[edge.begin : edge.end])
        note = "" if edge.is_known else "  not a token"
        lines.append(
            f"{'* ' if is_best else '  '}{_pad(token, offsets[-1])}  {edge.score:8.3f}{note}"
        )
    lines.append(f"  {_pad('', offsets[-1])}  {total:8.3f}  best path")
    return "\n".join([*lines, _token_row(tokens, ids)])


def _columns(parts: tuple[bytes, ...]) -> str:
    """Return a line of text with one column per byte, and a "─" between the bytes of one part."""
    row = ""
    for part in parts:
        cells = [render_token(bytes([byte])) for byte in part]
        row += (
            "".join(f"{cell:─<{_COLUMN_WIDTH}}" for cell in cells[:-1])
            + f"{cells[-1]:{_COLUMN_WIDTH}}"
        )
    return row.rstrip()


def _token_row(tokens: list[bytes], ids: list[int]) -> str:
    """Return the tokens with their ids in one line, under their bytes if the columns fit."""
    labels = [f"{render_token(token)} {id}" for token, id in zip(tokens, ids, strict=True)]
    widths = [_COLUMN_WIDTH * len(token) for token in tokens]
    if all(_width(label) < width for label, width in zip(labels[:-1], widths[:-1], strict=True)):
        return "".join(map(_pad, labels, widths)).rstrip()
    return "   ".join(labels)


def render_token(token: bytes) -> str:
    """Return a token as printable text: spaces as ·, incomplete UTF-8 in hexadecimal.

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
    """Return the width of a text in terminal columns: two for an emoji, none for an accent."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
