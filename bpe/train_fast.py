"""Train a byte-pair encoding with arrays and a heap: the same results as `bpe.train`, but faster.

`count_pieces` splits text with `fast_pretokenizer` if it supports the pattern. A piece of up to
seven bytes and its length form one integer of 64 bits, and equal integers are counted by sorting.
Most pieces are that short; longer pieces are counted in a dictionary.

`learn_merges` stores all distinct pieces in one array of token ids, with a gap between adjacent
pieces. A merge rewrites all positions of its pair at once, and no other positions. To find them:

- For each pair, the positions at which it occurs are recorded when its newer token is created. Only
  then can new occurrences arise; later merges only remove some. The current occurrences are found
  by checking the recorded positions.
- For the same reason, the count of a pair never increases. A heap holds an upper bound of the count
  of every pair. The pair at the top is counted again. If the count is unchanged, it is the most
  frequent pair and is merged; otherwise it is pushed back with the new count.

A position is dead after its token was merged into the previous one. `after` and `before` hold the
neighbors of each live position.
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
_MAX_SHORT_BYTES = 7  # bytes that fit into 64 bits together with the length
_ID_BITS = 24  # a pair is one integer, (left << _ID_BITS) + right, which sorts like the pair
_GAP, _DEAD = -1, -2  # positions without a token


def count_pieces(
    texts: Iterable[str],
    pattern: str | Sequence[str],
    special_tokens: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[bytes, int]:
    """Split texts into pieces and count them, as `bpe.train.count_pieces` does.

    Args:
        texts: the texts; no piece spans two of them.
        pattern: the split pattern, or several to apply in turn.
        special_tokens: the tokens at which texts are split; they are not counted.
        progress: called every few million characters, see `train.Progress`.
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
    data, offsets, separators = pretokenize_batch(pattern, [fix_surrogates(text) for text in texts])
    is_piece = np.ones(len(offsets), bool)
    is_piece[separators] = False
    piece = np.flatnonzero(is_piece)
    start, stop = offsets[piece], offsets[piece + 1]
    length = stop - start

    is_short = length <= _MAX_SHORT_BYTES
    padded = data + bytes(8)
    uint64s = np.ndarray(len(data), "<u8", padded, strides=(1,))  # the 8 bytes from each offset
    size = length[is_short].astype(np.uint64)
    keys = uint64s[start[is_short]] & ((np.uint64(1) << 8 * size) - 1) | size << 56
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
    """Learn merges from the counts of pieces, the same as `bpe.train.learn_merges`.

    Args:
        counts: piece to count.
        num_merges: the maximum number of merges.
        min_frequency: the minimum count of a pair to be merged.
        progress: called every 256 merges, see `train.Progress`.

    Returns:
        Pairs of ids. Ids up to 255 are bytes, in `BYTE_ORDER`; merge i makes the id 256 + i.
    """
    tokens, weight = _token_array(counts)  # [positions]
    after = np.arange(1, len(tokens) + 1, dtype=np.int32)
    before = np.arange(-1, len(tokens) - 1, dtype=np.int32)
    pair_positions: dict[int, NDArray[np.int32]] = {}  # candidate positions of the left token
    heap: list[int] = []  # of (-count, pair), as one integer

    def add_pairs(pairs: NDArray[np.int64], positions: NDArray[np.int32]) -> None:
        """Add pairs [n], found at ascending positions [n] of their left tokens, to the heap."""
        order = np.argsort(pairs, kind="stable")
        pairs, positions = pairs[order], positions[order]
        starts = np.flatnonzero(np.diff(pairs, prepend=-1))
        count = np.add.reduceat(weight[positions], starts)
        ends = np.append(starts[1:], len(pairs))
        is_frequent = count >= min_frequency
        for pair, start, end, n in zip(
            pairs[starts[is_frequent]].tolist(),
            starts[is_frequent].tolist(),
            ends[is_frequent].tolist(),
            count[is_frequent].tolist(),
            strict=True,
        ):
            pair_positions[pair] = positions[start:end]
            heapq.heappush(heap, (-n << 2 * _ID_BITS) + pair)

    first = np.flatnonzero((tokens[:-1] >= 0) & (tokens[1:] >= 0)).astype(np.int32)
    if len(first):
        add_pairs((tokens[first].astype(np.int64) << _ID_BITS) + tokens[first + 1], first)

    merges: list[Pair] = []
    while heap and len(merges) < num_merges:
        pair = heap[0] & ((1 << 2 * _ID_BITS) - 1)
        left, right = pair >> _ID_BITS, pair & ((1 << _ID_BITS) - 1)
        positions = pair_positions[pair]
        positions = positions[(tokens[positions] == left) & (tokens[after[positions]] == right)]
        count = int(weight[positions].sum())
        if (entry := (-count << 2 * _ID_BITS) + pair) != heap[0]:
            pair_positions[pair] = positions
            if count < min_frequency:
                heapq.heappop(heap)
                del pair_positions[pair]
            else:
                heapq.heapreplace(heap, entry)
            continue
        heapq.heappop(heap)
        del pair_positions[pair]

        new = 256 + len(merges)
        merges.append((left, right))
        if left == right:
            positions = _every_other(positions, after)
        dead = after[positions]
        following = after[dead]
        tokens[positions], tokens[dead] = new, _DEAD
        after[positions], before[following] = following, positions
        preceding = before[positions]

        neighbor = tokens[preceding].astype(np.int64)
        is_token = neighbor >= 0
        if is_token.any():
            add_pairs((neighbor[is_token] << _ID_BITS) + new, preceding[is_token])
        neighbor = tokens[following].astype(np.int64)
        is_token = (neighbor >= 0) & (neighbor != new)  # (new, new) was added above
        if is_token.any():
            add_pairs((new << _ID_BITS) + neighbor[is_token], positions[is_token])
        if progress and len(merges) % 256 == 0:
            progress("learning merges", len(merges), num_merges)
    return merges


def _token_array(counts: Mapping[bytes, int]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the token ids of all pieces in one array, and the count of the piece at each position.

    Both arrays have the shape [positions]. A position without a token is before and after each
    piece.
    """
    length = np.fromiter(map(len, counts), np.int64, len(counts))
    piece = np.repeat(np.arange(len(counts)), length)  # the index of the piece of each byte
    positions = np.arange(len(piece)) + piece + 1
    tokens = np.full(len(piece) + len(counts) + 1, _GAP, np.int32)
    byte_ids = np.argsort(BYTE_ORDER).astype(np.int32)
    tokens[positions] = byte_ids[np.frombuffer(b"".join(counts), np.uint8)]
    weight = np.zeros(len(tokens), np.int64)
    weight[positions] = np.fromiter(counts.values(), np.int64, len(counts))[piece]
    return tokens, weight


def _every_other(positions: NDArray[np.int32], after: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the positions of pairs without those that overlap, as in "aaaa".

    Of a run of overlapping pairs, every other position is kept, beginning with the first.
    """
    index = np.arange(len(positions))
    begins_run = np.ones(len(positions), bool)
    begins_run[1:] = after[positions[:-1]] != positions[1:]
    start = np.maximum.accumulate(np.where(begins_run, index, 0))
    return positions[(index - start) % 2 == 0]
