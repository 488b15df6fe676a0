"""Training, fast: what `bpe.train` does, from arrays and a heap.

`count_pieces` has a text cut by `boundaries`, where that knows the pattern. A piece of up to seven
bytes and its length are one integer of 64 bits; sorting those brings equal ones together. Most
pieces are that short; the others are counted in a dictionary.

`learn`: all distinct pieces lie in one array of token ids with a gap between any two. A merge
rewrites the places where its pair occurs, all at once, and nothing else. To find them:

- Each pair remembers where it occurred when its younger token was made: only then can new
  occurrences arise. Later merges take some away, never add any. So a look at the remembered places
  says which are left.
- For the same reason a pair's count only falls. A heap holds for every pair a count that was once
  right. The pair that comes up is counted again; if the count still holds, no other can be higher
  and it is merged, else it goes back with what is left.

The places of a token that has been joined to the one before it are dead. `after` and `before` lead
from each living place to its neighbours.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bpe import train
from bpe.fast_pretokenizer import FAST_PATTERNS, pretokenize_batch
from bpe.special_tokens import fix_surrogates, special_token_regex
from bpe.train import BYTE_ORDER, Pair, Progress

_BATCH_CHARS = 1 << 22  # characters to count at once
_MAX_SHORT_BYTES = 7  # bytes, next to which the length fits into 64 bits
_ID_BITS = 24  # of an id; a pair is one integer, (left << _BITS) + right, in the order of pairs
_GAP, _DEAD = -1, -2  # no tokens


def count_pieces(
    texts: Iterable[str],
    pattern: str | Sequence[str],
    special_tokens: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[bytes, int]:
    """Cuts texts into pieces, and counts how often each occurs, as `bpe.train.count_pieces` does.

    Args:
        texts: one after the other.
        pattern: the split pattern, or several to apply in turn.
        special_tokens: where a text spells one, it is cut there.
        progress: told every few million characters.
    """
    if not isinstance(pattern, str) and len(pattern) == 1:
        pattern = pattern[0]
    if not isinstance(pattern, str) or pattern not in FAST_PATTERNS:
        return train.count_pieces(texts, pattern, special_tokens, progress)
    special = special_token_regex(frozenset(special_tokens)) if special_tokens else None
    short: Counter[int] = Counter()
    long: Counter[bytes] = Counter()
    batch: list[str] = []
    characters = counted = 0
    for text in texts:
        batch += special.split(text)[::2] if special else [text]
        characters += len(text)
        if characters - counted >= _BATCH_CHARS:
            _count_batch(pattern, batch, short, long)
            batch.clear()
            counted = characters
            if progress:
                progress("counting pieces", counted, None)
    _count_batch(pattern, batch, short, long)
    for key, count in short.items():
        long[key.to_bytes(8, "little")[: key >> 56]] = count
    return dict(long)


def _count_batch(pattern: str, texts: list[str], short: Counter[int], long: Counter[bytes]) -> None:
    data, begin, ends = pretokenize_batch(pattern, [fix_surrogates(text) for text in texts])
    is_piece = np.ones(len(begin), bool)
    is_piece[ends] = False  # the bytes between the texts
    piece = np.flatnonzero(is_piece)
    start, stop = begin[piece], begin[piece + 1]
    length = stop - start

    is_short = length <= _MAX_SHORT_BYTES
    padded = data + bytes(8)
    eight_bytes = np.ndarray(len(data), "<u8", padded, strides=(1,))  # those from each place on
    size = length[is_short].astype(np.uint64)
    keys = eight_bytes[start[is_short]] & ((np.uint64(1) << 8 * size) - 1) | size << 56
    keys, counts = np.unique(keys, return_counts=True)
    for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
        short[key] += count
    is_long = ~is_short
    long.update(
        data[a:b] for a, b in zip(start[is_long].tolist(), stop[is_long].tolist(), strict=True)
    )


def learn_merges(
    counts: Mapping[bytes, int],
    num_merges: int,
    min_frequency: int = 2,
    progress: Progress | None = None,
) -> list[Pair]:
    """The merges, from how often each piece occurs: those of `bpe.train.learn`.

    Args:
        counts: pieces and how often each occurs.
        num_merges: how many merges at most.
        min_frequency: how often a pair must occur to be merged.
        progress: told every 256 merges.

    Returns:
        Pairs of ids. Ids up to 255 are bytes, in `BYTE_ORDER`; merge number i makes id 256 + i.
    """
    tokens, weight = _lay_out(counts)  # [places]
    after = np.arange(1, len(tokens) + 1, dtype=np.int32)
    before = np.arange(-1, len(tokens) - 1, dtype=np.int32)
    places: dict[int, NDArray[np.int32]] = {}  # where each pair may occur: places of the left token
    heap: list[int] = []  # of (-count, pair), as one integer

    def remember(pairs: NDArray[np.int64], at: NDArray[np.int32]) -> None:
        """Notes pairs that occur at places, sorted, for later."""
        order = np.argsort(pairs, kind="stable")
        pairs, at = pairs[order], at[order]
        starts = np.flatnonzero(np.diff(pairs, prepend=-1))
        count = np.add.reduceat(weight[at], starts)
        ends = np.append(starts[1:], len(pairs))
        often = count >= min_frequency
        for pair, start, end, n in zip(
            pairs[starts[often]].tolist(),
            starts[often].tolist(),
            ends[often].tolist(),
            count[often].tolist(),
            strict=True,
        ):
            places[pair] = at[start:end]
            heapq.heappush(heap, (-n << 2 * _ID_BITS) + pair)

    both = np.flatnonzero((tokens[:-1] >= 0) & (tokens[1:] >= 0)).astype(np.int32)
    if len(both):
        remember((tokens[both].astype(np.int64) << _ID_BITS) + tokens[both + 1], both)

    merges: list[Pair] = []
    while heap and len(merges) < num_merges:
        pair = heap[0] & ((1 << 2 * _ID_BITS) - 1)
        left, right = pair >> _ID_BITS, pair & ((1 << _ID_BITS) - 1)
        at = places[pair]
        at = at[(tokens[at] == left) & (tokens[after[at]] == right)]
        count = int(weight[at].sum())
        if (entry := (-count << 2 * _ID_BITS) + pair) != heap[0]:
            places[pair] = at
            if count < min_frequency:
                heapq.heappop(heap)
                del places[pair]
            else:
                heapq.heapreplace(heap, entry)
            continue
        heapq.heappop(heap)
        del places[pair]

        new = 256 + len(merges)
        merges.append((left, right))
        if left == right:
            at = _every_other(at, after)
        gone = after[at]
        following = after[gone]
        tokens[at], tokens[gone] = new, _DEAD
        after[at], before[following] = following, at
        leading = before[at]

        neighbour = tokens[leading].astype(np.int64)
        kept = neighbour >= 0
        if kept.any():
            remember((neighbour[kept] << _ID_BITS) + new, leading[kept])
        neighbour = tokens[following].astype(np.int64)
        kept = (neighbour >= 0) & (neighbour != new)  # (new, new) was seen from its right half
        if kept.any():
            remember((new << _ID_BITS) + neighbour[kept], at[kept])
        if progress and len(merges) % 256 == 0:
            progress("learning merges", len(merges), num_merges)
    return merges


def _lay_out(counts: Mapping[bytes, int]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The bytes of all pieces as ids, gaps around each, and how often each byte's piece occurs."""
    length = np.fromiter(map(len, counts), np.int64, len(counts))
    piece = np.repeat(np.arange(len(counts)), length)  # which piece each byte belongs to
    at = np.arange(len(piece)) + piece + 1
    tokens = np.full(len(piece) + len(counts) + 1, _GAP, np.int32)
    id_of_byte = np.argsort(BYTE_ORDER).astype(np.int32)
    tokens[at] = id_of_byte[np.frombuffer(b"".join(counts), np.uint8)]
    weight = np.zeros(len(tokens), np.int64)
    weight[at] = np.fromiter(counts.values(), np.int64, len(counts))[piece]
    return tokens, weight


def _every_other(at: NDArray[np.int32], after: NDArray[np.int32]) -> NDArray[np.int32]:
    """Of a run like "aaaa", every other place: only those pairs can be joined at once."""
    index = np.arange(len(at))
    begins = np.ones(len(at), bool)  # whether a place begins a run
    begins[1:] = after[at[:-1]] != at[1:]
    start = np.maximum.accumulate(np.where(begins, index, 0))
    return at[(index - start) % 2 == 0]
