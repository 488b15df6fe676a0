"""Train a byte-pair encoding: learn the list of merges from text.

After Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units"
(2016), over bytes as in GPT-2. Split the text into pieces (`pretokenize`) and count them. Every
piece starts as single bytes. Then repeat: find the most frequent pair of adjacent tokens, add a new
token for it, and replace the pair everywhere. The result is the ordered list of merges, which
`merge` applies to new text.

`learn_merges` is a short implementation of this loop. The functions after it count the pieces and
build a vocabulary from the merges. `learn_merges` processes every piece for every merge, which is
fast enough for short texts only. `bpe.train_fast` learns the same merges from 50 megabytes in
seconds, and `bpe.trainer` uses it.

Ties: of several pairs with the same count, the one with the smallest ids (left, then right) is
merged. Bytes have ids in GPT-2's order, printable bytes first. Hugging Face's `tokenizers` breaks
ties in the same way, so the same pieces give exactly the same merges.

Two different merges never make the same bytes. As long as no token crosses the two ends of a
section of text, the tokens within the section depend on its bytes only. So all sections "low"
become one token at the same merge, from the same two tokens. Therefore a trained vocabulary can be
saved without merges, as tiktoken does: the bytes and the rank of each token are sufficient.

Not implemented: a maximum token length, characters instead of bytes, dropout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from bpe.formats import bytes_to_unicode
from bpe.pretokenize import GPT2, compile_pattern, split
from bpe.special_tokens import fix_surrogates, special_token_regex

BYTE_ORDER = tuple(bytes_to_unicode())
"""The byte of each of the ids 0 to 255: printable bytes first, as in GPT-2."""

Pair = tuple[int, int]
"""The ids of two adjacent tokens."""

Progress = Callable[[str, int, int | None], None]
"""A callback with the current stage, the amount done, and the total amount (None if unknown)."""


def learn_merges(
    counts: Mapping[bytes, int], num_merges: int, min_frequency: int = 2
) -> list[Pair]:
    """Learn merges from the counts of pieces.

    If "low" occurs five times and "lower" twice, "lo" and "ow" both occur seven times. The pair of
    smaller ids is merged first:

    >>> merges = learn_merges({b"low": 5, b"lower": 2}, 2)
    >>> merges, list(build_vocab(merges))[256:]
    ([(75, 78), (256, 86)], [b'lo', b'low'])

    Args:
        counts: piece to count.
        num_merges: the maximum number of merges.
        min_frequency: the minimum count of a pair to be merged.

    Returns:
        Pairs of ids. Ids up to 255 are bytes, in `BYTE_ORDER`; merge i makes the id 256 + i.
    """
    byte_id = {byte: id for id, byte in enumerate(BYTE_ORDER)}
    words = [([byte_id[byte] for byte in piece], count) for piece, count in counts.items()]
    merges: list[Pair] = []
    while len(merges) < num_merges:
        frequency: Counter[Pair] = Counter()
        for word, count in words:
            for pair in pairwise(word):
                frequency[pair] += count
        best = min(frequency, key=lambda pair: (-frequency[pair], pair), default=None)
        if best is None or frequency[best] < min_frequency:
            break
        words = [(merge_pair(word, best, 256 + len(merges)), count) for word, count in words]
        merges.append(best)
    return merges


def merge_pair(word: Sequence[int], pair: Pair, new: int) -> list[int]:
    """Return the ids of a word with each occurrence of `pair` replaced by the id `new`.

    Occurrences are replaced from left to right, without overlaps.

    >>> merge_pair([5, 7, 7, 7], (7, 7), 300)
    [5, 300, 7]
    """
    merged, i = [], 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def count_pieces(
    texts: Iterable[str],
    pattern: str | Sequence[str] = GPT2,
    special_tokens: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[bytes, int]:
    """Split texts into pieces and count them.

    Training on counts is much faster than on text, because most pieces repeat: 50 megabytes of
    English have 12 million pieces, of which 300 thousand are distinct.

    Args:
        texts: the texts; no piece spans two of them.
        pattern: the split pattern, or several to apply in turn.
        special_tokens: the tokens at which texts are split; they are not counted.
        progress: called about every million pieces, see `Progress`.
    """
    patterns = [compile_pattern(p) for p in ([pattern] if isinstance(pattern, str) else pattern)]
    special = special_token_regex(frozenset(special_tokens)) if special_tokens else None
    counts: Counter[str] = Counter()
    pieces: list[str] = []
    characters = 0
    for text in texts:
        text = fix_surrogates(text)
        for part in special.split(text)[::2] if special else [text]:
            pieces += split(patterns, part)
        characters += len(text)
        if len(pieces) > 1 << 20:  # counting in large batches is faster
            counts.update(pieces)
            pieces.clear()
            if progress:
                progress("counting pieces", characters, None)
    counts.update(pieces)
    return {piece.encode(): count for piece, count in counts.items()}


def build_vocab(merges: Iterable[Pair]) -> dict[bytes, int]:
    """Return a mapping of token bytes to id: the 256 bytes, then the token of each merge."""
    tokens = [bytes([byte]) for byte in BYTE_ORDER]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return {token: id for id, token in enumerate(tokens)}


def read_files(paths: Iterable[str | Path]) -> Iterator[str]:
    """Yield the text of each file.

    Raises:
        ValueError: if a file is not UTF-8; the message names the line.
    """
    for path in paths:
        data = Path(path).read_bytes()
        try:
            yield data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise ValueError(
                f"{path}: line {line} is not UTF-8: byte 0x{data[error.start]:02x}"
            ) from None
