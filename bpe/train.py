"""Training: which merges a text asks for, and in which order.

After Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units"
(2016), over bytes as in GPT-2. Cut the text into pieces (`pretokenize`) and count them. Every piece
starts as single bytes. Then, again and again: find the two neighbours that occur most often, give
them a new token, and put it in their place everywhere. The list of merges, in order, is the whole
result: `merge` repeats it on new text.

`learn` is that in half a page; what comes after it, in the order of reading, gives it pieces to
learn from and makes a vocabulary of what it learned. `learn` and `count_pieces` look at every piece
for every merge, which is fine for a poem; those of `bpe.train_fast` give the same merges from 50
megabytes in seconds, and `bpe.trainer` uses them.

Ties: of several pairs that occur equally often, the one with the smallest ids (left, then right) is
merged. Ids of bytes are in GPT-2's order, the printable ones first. Hugging Face's `tokenizers`
decides the same way, so that the same pieces give the same merges, to the last.

One fact worth knowing: two different merges never make the same bytes. Whether a stretch of text
becomes one token depends, as long as no token crosses its ends, on its own bytes alone; so all such
stretches that read "low" turn into a token at the same merge, from the same two parts. That is why
a trained vocabulary can be written without its pairs, as tiktoken does: bytes and rank are enough.

Leaves out: limits on the length of a token, characters instead of bytes, dropout.
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
"""The byte that each of the ids 0 to 255 stands for: printable ones first, as in GPT-2."""

Pair = tuple[int, int]
"""Two neighbouring tokens, by id."""

Progress = Callable[[str, int, int | None], None]
"""Called now and then with what is being done, how much of it is, and of how much (if known)."""


def learn_merges(
    counts: Mapping[bytes, int], num_merges: int, min_frequency: int = 2
) -> list[Pair]:
    """The merges, from how often each piece occurs.

    In "low" five times and "lower" twice, "lo" and "ow" both occur seven times. The smaller ids are
    merged, then what has become of the other pair:

    >>> merges = learn_merges({b"low": 5, b"lower": 2}, 2)
    >>> merges, list(build_vocab(merges))[256:]
    ([(75, 78), (256, 86)], [b'lo', b'low'])

    Args:
        counts: pieces and how often each occurs.
        num_merges: how many merges at most.
        min_frequency: how often a pair must occur to be merged.

    Returns:
        Pairs of ids. Ids up to 255 are bytes, in `BYTE_ORDER`; merge number i makes id 256 + i.
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
    """The word with `new` in place of each `pair`, from left to right.

    >>> merge_pair([5, 7, 7, 7], (7, 7), 300)
    [5, 300, 7]
    """
    joined, i = [], 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            joined.append(new)
            i += 2
        else:
            joined.append(word[i])
            i += 1
    return joined


def count_pieces(
    texts: Iterable[str],
    pattern: str | Sequence[str] = GPT2,
    special_tokens: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[bytes, int]:
    """Cuts texts into pieces, and counts how often each occurs.

    A text repeats its words: 50 megabytes of English are 12 million pieces, of which 300 thousand
    differ. `learn` looks at those only.
    """
    patterns = [compile_pattern(p) for p in ([pattern] if isinstance(pattern, str) else pattern)]
    cut = special_token_regex(frozenset(special_tokens)) if special_tokens else None
    counts: Counter[str] = Counter()
    pieces: list[str] = []
    characters = 0
    for text in texts:
        text = fix_surrogates(text)
        for part in cut.split(text)[::2] if cut else [text]:
            pieces += split(patterns, part)
        characters += len(text)
        if len(pieces) > 1 << 20:  # counting many at once is cheaper
            counts.update(pieces)
            pieces.clear()
            if progress:
                progress("counting pieces", characters, None)
    counts.update(pieces)
    return {piece.encode(): count for piece, count in counts.items()}


def build_vocab(merges: Iterable[Pair]) -> dict[bytes, int]:
    """The bytes of every token, and its id: the 256 bytes, then what each merge makes."""
    tokens = [bytes([byte]) for byte in BYTE_ORDER]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return {token: id for id, token in enumerate(tokens)}


def read_files(paths: Iterable[str | Path]) -> Iterator[str]:
    """The text of each file, one after the other.

    Raises:
        ValueError: if one is not UTF-8, naming the line.
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
