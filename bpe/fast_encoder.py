"""Encode long texts with NumPy, to the same ids as if each piece were encoded separately.

There are three steps, each an array operation on all pieces of a chunk of text:

- Split the text into pieces (`fast_pretokenizer`), and long pieces where no token crosses
  (`split_points`).
- Look up every piece in one hash table. A piece of up to 15 bytes and its length form a number of
  128 bits, so equal keys are equal pieces and there are no false matches.
- Concatenate the ids of the pieces.

The hash table (`hash_table`) starts with the vocabulary, and new pieces are added to it. New pieces
are merged in batches (`_merge_batch`): the algorithm of `merge`, with the loop over the pairs of a
piece replaced by rounds in which every piece merges one pair. Pieces longer than a key are looked
up in a dict. The longest pieces are merged one by one by `merge.merge`.

`FastDecoder` decodes many ids in the same manner.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import regex

from bpe.fast_pretokenizer import FAST_PATTERNS, PieceOffsets, pretokenize_batch
from bpe.fast_splits import find_cut_pattern, pretokenize_sequence, supports_sequence
from bpe.hash_table import GrowableArray, HashTable, Ints, Uint64s, concat_ranges, sliding_uint64
from bpe.split_points import SplitPoints
from bpe.vocab import Vocab

Ids = npt.NDArray[np.uint32]

# The arrays of a chunk should fit in the processor's cache. New pieces are merged at the end of a
# block; the cost per piece falls with their number.
CHUNK_CHARS = 1 << 17
BLOCK_CHARS = 1 << 22
MERGE_BATCH_BYTES = 1 << 16  # total bytes of the pieces in one call of `_merge_batch`
DECODE_CHUNK_IDS = 1 << 14  # ids to decode at once

# Positions at which a text can be split without a change of its pieces: a letter or number ends its
# piece if one of these characters follows, and the match of these characters does not depend on a
# preceding letter or number.
_SAFE_CUT = regex.compile(r"[\p{L}\p{N}](?=[ \n，。、।])")

MAX_KEY_BYTES = 15
MIN_BATCH_PIECES = 64  # fewer pieces are merged faster one by one
MAX_BATCH_PIECE_BYTES = 512  # longer pieces are merged one by one
MIN_ROUND_PIECES = 8
MAX_ADDED_IDS = 1 << 21  # above this size, the cache of pieces is cleared

_NO_MERGE = np.uint32(0xFFFFFFFF)  # the rank of a pair that cannot be merged
_NO_TOKEN = np.uint32(0xFFFFFFFF)  # a separator, or a token that was merged into the previous one


class FastEncoder:
    """An encoder for long texts with one vocabulary.

    Thread-safe: one thread encodes at a time, other threads wait.
    """

    def __init__(self, vocab: Vocab, split_points: SplitPoints | None = None):
        """Create an encoder with a cache of all pieces that are one token.

        Args:
            vocab: the vocabulary, with patterns that `supports` accepts.
            split_points: the split points of the vocabulary; None computes them.
        """
        self._patterns = vocab.patterns
        self._safe_cut = _SAFE_CUT
        if len(self._patterns) > 1:
            self._safe_cut = find_cut_pattern(self._patterns[0])
        self._vocab, self._split_points = vocab, split_points or SplitPoints(vocab)
        self._lock = threading.Lock()
        self._piece_cache = self._new_cache()

    @staticmethod
    def supports(patterns: Sequence[str]) -> bool:
        """Return whether this encoder can be used for these split patterns."""
        if len(patterns) == 1:
            return patterns[0] in FAST_PATTERNS
        return supports_sequence(patterns)

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Ints]:
        """Encode texts independently of each other.

        Args:
            texts: texts without surrogates, normalized as the encoding requires.

        Returns:
            The concatenated ids of all texts [n] (uint32), and the number of ids per text [texts].
        """
        with self._lock:
            try:
                return self._encode(texts)
            except BaseException:  # an interruption may have left the cache inconsistent
                self._piece_cache = self._new_cache()
                raise

    def _new_cache(self) -> PieceCache:
        return PieceCache(self._vocab.ranks if self._vocab.ignore_merges else {})

    def _pretokenize(self, texts: Sequence[str]) -> tuple[PieceOffsets, Uint64s]:
        """Return the `PieceOffsets` of several texts, and `sliding_uint64` of its data."""
        if len(self._patterns) == 1:
            data, offsets, separators = pretokenize_batch(self._patterns[0], texts)
        else:
            data, offsets, separators = pretokenize_sequence(self._patterns, texts)
        uint64s = sliding_uint64(data)
        if not data.isascii():
            offsets, separators = self._split_points.split_batch(data, uint64s, offsets, separators)
        return PieceOffsets(data, offsets, separators), uint64s

    def _find_cut(self, text: str, position: int) -> int | None:
        """Return a position, from `position` on, whose two sides can be pretokenized separately."""
        assert self._safe_cut is not None
        safe = self._safe_cut.search(text, position)
        return safe.end() if safe else None

    def _encode(self, texts: Sequence[str]) -> tuple[Ids, Ints]:
        ids, counts = [np.empty(0, np.uint32)], [np.empty(0, np.intp)]
        text_indices: list[int] = []
        for block in _split_into_blocks(texts, self._find_cut):
            for chunk_ids, chunk_counts in self._encode_block([parts for _, parts in block]):
                ids.append(chunk_ids)
                counts.append(chunk_counts)
            text_indices += (index for chunk_indices, _ in block for index in chunk_indices)
        totals = np.bincount(text_indices, np.concatenate(counts), len(texts)).astype(np.intp)
        return np.concatenate(ids), totals

    def _encode_block(self, chunks: list[list[str]]) -> Iterator[tuple[Ids, Ints]]:
        """Yield the ids of each chunk, and the number of ids of each of its texts."""
        cache = self._piece_cache
        if cache.num_added_ids > MAX_ADDED_IDS:
            cache = self._piece_cache = self._new_cache()
        new_pieces: dict[bytes, int] = {}  # piece -> its future number in the cache
        size = cache.size
        lookups = []
        for chunk in chunks:
            (data, begin, separators), uint64s = self._pretokenize(chunk)
            number = cache.find(data, uint64s, begin[:-1], np.diff(begin))
            number[separators[:-1]] = cache.EMPTY_PIECE
            missing = np.flatnonzero(number < 0)
            bounds = zip(begin[missing].tolist(), begin[missing + 1].tolist(), strict=True)
            pieces = [data[a:b] for a, b in bounds]
            number[missing] = [
                new_pieces.setdefault(piece, size + len(new_pieces)) for piece in pieces
            ]
            lookups.append((number, separators))
        cache.add(list(new_pieces), *self._merge(list(new_pieces)))
        for number, separators in lookups:
            ids, counts = cache.gather_ids(number)
            yield ids, np.add.reduceat(counts, separators[:-1])

    @functools.cached_property
    def _pair_table(self) -> _PairTable:
        return _PairTable(self._vocab)

    def _merge(self, pieces: list[bytes]) -> tuple[Ids, Ints]:
        """Return the concatenated ids of pieces, and the number of ids of each."""
        length = np.fromiter(map(len, pieces), np.intp, len(pieces))
        # A round costs the same for one piece as for ten, so the few longest pieces are merged
        # one by one.
        batched = length <= min(
            MAX_BATCH_PIECE_BYTES, np.sort(length)[-MIN_ROUND_PIECES:][0] if len(length) else 0
        )
        if dropped := self._vocab.dropped_bytes:
            complete = [piece.translate(None, dropped) == piece for piece in pieces]
            batched &= np.array(complete, np.bool_)
        if np.count_nonzero(batched) < MIN_BATCH_PIECES:
            batched[:] = False
        single = np.flatnonzero(~batched).tolist()
        single_ids = [self._vocab.encode_piece(pieces[i]) for i in single]
        count = np.zeros(len(pieces), np.intp)
        count[single] = [len(ids) for ids in single_ids]
        merged = np.empty(0, np.uint32)
        if batched.any():
            batch_pieces = list(itertools.compress(pieces, batched.tolist()))
            merged, count[batched] = _merge_in_batches(batch_pieces, self._pair_table)
        first = np.cumsum(count) - count
        ids = np.empty(count.sum(), np.uint32)
        ids[concat_ranges(first[batched], count[batched])] = merged
        for i, piece_ids in zip(single, single_ids, strict=True):
            ids[first[i] : first[i] + len(piece_ids)] = piece_ids
        return ids, count


class PieceCache:
    """A cache of encoded pieces: each piece has a number, and one array holds the ids of all."""

    EMPTY_PIECE = 0  # the number of the empty piece, which has no ids; used for separators

    def __init__(self, tokens: Mapping[bytes, int]):
        """Create a cache of the empty piece and the pieces in `tokens`, which are one token."""
        self._table = HashTable(words_per_key=2)
        self._long: dict[bytes, int] = {}
        self._ids = GrowableArray(np.uint32)
        self._head = GrowableArray(np.uint32, 2)  # the first id of each piece, and its id count
        self._first = GrowableArray(np.intp)  # the offset in _ids of the ids of each piece
        self.add([b""], np.empty(0, np.uint32), np.zeros(1, np.intp))
        if tokens:
            ids = np.fromiter(tokens.values(), np.uint32)
            self.add(list(tokens), ids, np.ones(len(ids), np.intp))
        self._num_initial_ids = self._ids.size

    @property
    def size(self) -> int:
        """The number of pieces."""
        return self._head.size

    @property
    def num_added_ids(self) -> int:
        """The number of ids of the pieces that were added after the creation of the cache."""
        return self._ids.size - self._num_initial_ids

    def find(self, data: bytes, uint64s: Uint64s, begin: Ints, length: Ints) -> Ints:
        """Return the numbers of the pieces data[begin : begin + length], -1 if not cached."""
        number = self._table.find(*_keys(uint64s, begin, length))
        long = np.flatnonzero(length > MAX_KEY_BYTES)
        if len(long):
            get, first = self._long.get, begin[long]
            bounds = zip(first.tolist(), (first + length[long]).tolist(), strict=True)
            number[long] = [get(data[a:b], -1) for a, b in bounds]
        return number

    def add(self, pieces: Sequence[bytes], ids: Ids, count: Ints) -> None:
        """Add pieces that are not in the cache, with the numbers `size`, `size` + 1, ..."""
        length = np.fromiter(map(len, pieces), np.intp, len(pieces))
        long = np.flatnonzero(length > MAX_KEY_BYTES)
        low, high = _keys(sliding_uint64(b"".join(pieces)), np.cumsum(length) - length, length)
        low[long] = long + self.size  # a key that matches no piece, to reserve the number
        high[long] = (MAX_KEY_BYTES + 1) << 56
        self._table.add(low, high)
        self._long.update((pieces[i], self.size + i) for i in long.tolist())
        first = np.cumsum(count) - count
        self._first.append(first + self._ids.size)
        self._head.append(np.stack([np.append(ids, np.uint32(0)).take(first), count], axis=1))
        self._ids.append(ids)

    def gather_ids(self, number: Ints) -> tuple[Ids, Ints]:
        """Return the concatenated ids of the pieces with these numbers, and the id count of each.

        The numbers are those that `find` returns.
        """
        head = self._head.take(number)
        count = head[:, 1].astype(np.intp)
        multi = np.flatnonzero(count != 1)
        if 4 * len(multi) > len(count):
            return self._ids.take(concat_ranges(self._first.take(number), count)), count
        # Most pieces are one token. Write the first id of all pieces, then overwrite the rest.
        ids = np.repeat(head[:, 0], count)
        multi_count = count.take(multi)
        end = np.cumsum(multi_count - 1) + multi + 1
        ids[concat_ranges(end - multi_count, multi_count)] = self._ids.take(
            concat_ranges(self._first.take(number.take(multi)), multi_count)
        )
        return ids, count


# A key is two numbers of 64 bits: up to 8 bytes, and up to 7 bytes with the length on top.
_MASKS = np.array(
    [
        [(1 << 8 * min(n, 8)) - 1 for n in range(MAX_KEY_BYTES + 1)],
        [(1 << 8 * max(n - 8, 0)) - 1 for n in range(MAX_KEY_BYTES + 1)],
    ],
    np.uint64,
)


def _keys(uint64s: Uint64s, begin: Ints, length: Ints) -> tuple[Uint64s, Uint64s]:
    """Return the keys of pieces in `HashTable`: two words [n] each.

    The key of a piece of more than MAX_KEY_BYTES bytes is arbitrary.

    Args:
        uint64s: `sliding_uint64` of the data that contains the pieces.
        begin: the offset [n] in the data of each piece.
        length: the length [n] of each piece in bytes.
    """
    low = uint64s.take(begin, mode="clip")
    low &= _MASKS[0].take(length, mode="clip")
    high = uint64s[8:].take(begin, mode="clip")
    high &= _MASKS[1].take(length, mode="clip")
    high |= length.astype(np.uint64) << np.uint64(56)
    return low, high


class _PairTable:
    """The rank of each mergeable pair of tokens, and the merged token.

    Attributes:
        byte_ids: [256], the id of each byte.
        byte_ranks: [256 * 256], the rank of each pair of bytes, or `_NO_MERGE`.
        merged_ids: [ranks], the id of the token that the pair of each rank is merged to.
    """

    def __init__(self, vocab: Vocab):
        ranks = vocab.ranks
        if vocab.merges is None:  # two tokens can be merged if the result is a token
            left, right, pair_ranks = _mergeable_pairs(vocab)
            self.merged_ids = np.arange(max(ranks.values()) + 1, dtype=np.uint32)
        else:
            left, right, merged = np.array(
                [(ranks[a], ranks[b], ranks[a + b]) for a, b in vocab.merges], np.uint64
            ).T
            pair_ranks = np.arange(len(left))
            self.merged_ids = merged.astype(np.uint32)
        self._table = HashTable(words_per_key=1)
        self._table.add(left << np.uint64(32) | right)
        self._ranks = np.append(_NO_MERGE, pair_ranks.astype(np.uint32))  # by number + 1
        self.byte_ids = np.array([ranks.get(bytes([b]), 0) for b in range(256)], np.uint32)
        self.byte_ranks = self.ranks(np.repeat(self.byte_ids, 256), np.tile(self.byte_ids, 256))

    def ranks(self, left: Ids, right: Ids) -> Ids:
        """Return the ranks of pairs of tokens, `_NO_MERGE` where they cannot be merged."""
        key = left.astype(np.uint64) << np.uint64(32) | right
        return self._ranks.take(self._table.find(key) + 1, mode="clip")


def _mergeable_pairs(vocab: Vocab) -> tuple[Uint64s, Uint64s, Ints]:
    """Return all pairs of tokens whose concatenation is a token: left, right and merged ids."""
    cache, tokens = PieceCache(vocab.ranks), list(vocab.ranks)
    ids = np.fromiter([0, *vocab.ranks.values()], np.intp)  # by number in `cache`
    pairs = []
    for start in range(0, len(tokens), 1 << 16):  # in batches, to limit memory
        batch = tokens[start : start + (1 << 16)]
        length = np.fromiter(map(len, batch), np.intp)
        begin = np.cumsum(length) - length
        data = b"".join(batch)
        token = np.repeat(np.arange(len(batch)), length - 1)
        # Every token is split at every position.
        left_length = concat_ranges(np.ones_like(length), length - 1)
        uint64s = sliding_uint64(data)
        left = cache.find(data, uint64s, begin[token], left_length)
        is_token = left >= 0
        token, left, left_length = token[is_token], left[is_token], left_length[is_token]
        right = cache.find(data, uint64s, begin[token] + left_length, length[token] - left_length)
        is_token = right >= 0
        pairs.append(ids[np.stack([left, right, token + start + 1])[:, is_token]])
    left, right, merged = np.concatenate(pairs, axis=1)
    return left.astype(np.uint64), right.astype(np.uint64), merged


def _merge_in_batches(pieces: Sequence[bytes], pairs: _PairTable) -> tuple[Ids, Ints]:
    """Merge many non-empty pieces in batches of similar length.

    Returns:
        The concatenated ids of all pieces, and the number of ids of each.
    """
    # Pieces of similar length take a similar number of rounds. Sort by length, longest first.
    length = np.fromiter(map(len, pieces), np.intp, len(pieces))
    order = np.argsort(-length, kind="stable")
    total = np.cumsum(length[order])
    splits = np.searchsorted(total, np.arange(MERGE_BATCH_BYTES, total[-1], MERGE_BATCH_BYTES))
    batches = [[pieces[i] for i in indices.tolist()] for indices in np.split(order, splits)]
    merged = [_merge_batch(batch, pairs) for batch in batches if batch]
    ids = np.concatenate([ids for ids, _ in merged])
    count = np.concatenate([count for _, count in merged])
    first = np.cumsum(count) - count
    inverse = np.argsort(order)
    return ids[concat_ranges(first[inverse], count[inverse])], count[inverse]


def _merge_batch(pieces: Sequence[bytes], pairs: _PairTable) -> tuple[Ids, Ints]:
    """Merge pieces, sorted longest first: each round merges the best pair of every piece.

    The state is that of `merge.merge_heap`, with all pieces in one array: a token is identified by
    the offset of its first byte. The rank and the offset of a pair form one number, the merge key.
    The minimum key of a piece is its next pair, the leftmost of those with the lowest rank.
    """
    data = np.frombuffer(b"\0".join(pieces) + b"\0", np.uint8)
    # A separator follows each piece.
    end = np.cumsum(np.fromiter(map(len, pieces), np.intp, len(pieces)) + 1)
    begin = np.append(0, end[:-1])
    offset = np.arange(len(data))

    token = pairs.byte_ids.take(data)
    token[end - 1] = _NO_TOKEN
    before, after = offset - 1, offset + 1
    two_bytes = data.astype(np.intp) << 8
    two_bytes[:-1] |= data[1:]
    rank = pairs.byte_ranks.take(two_bytes)
    rank[end - 1] = rank[end - 2] = _NO_MERGE
    key = _merge_keys(rank, offset)

    live = len(pieces)  # only the first `live` pieces may have pairs left
    while live:
        best = np.minimum.reduceat(key[: end[live - 1]], begin[:live])
        unfinished = np.flatnonzero(best < _NO_MERGE_KEY)
        live = int(unfinished[-1]) + 1 if len(unfinished) else 0
        best = best.take(unfinished)
        i = (best & np.uint64(0xFFFFFFFF)).view(np.intp)
        j = after.take(i, mode="clip")  # the token to merge into i
        h, k = before.take(i, mode="clip"), after.take(j, mode="clip")  # their neighbors
        token[i] = pairs.merged_ids.take((best >> np.uint64(32)).view(np.intp), mode="clip")
        token[j] = _NO_TOKEN
        key[j] = _NO_MERGE_KEY
        after[i] = k
        before[k] = i
        left, right = np.append(h, i), np.append(i, k)
        rank = pairs.ranks(token.take(left, mode="clip"), token.take(right, mode="clip"))
        key[left] = _merge_keys(rank, left)
    is_token = token != _NO_TOKEN
    return token[is_token], np.add.reduceat(is_token, begin, dtype=np.intp)


def _merge_keys(rank: Ids, offset: Ints) -> Uint64s:
    """Pack ranks and offsets into numbers that sort by rank, then by offset."""
    return rank.astype(np.uint64) << np.uint64(32) | offset.view(np.uint64)


# The keys of mergeable pairs are less than this.
_NO_MERGE_KEY = np.uint64(_NO_MERGE) << np.uint64(32)


# Decoding


class FastDecoder:
    """A decoder for many ids.

    A token is written as words of 8 bytes; the last word may overlap the next token. Therefore the
    second and later words of long tokens are written first, and then the first words of all tokens
    in order, which overwrite the overlaps.
    """

    def __init__(self, tokens: Mapping[int, bytes], n_vocab: int):
        """Build the arrays of the token bytes of a vocabulary.

        Args:
            tokens: id to bytes.
            n_vocab: one more than the highest id.
        """
        self._length = np.array([len(tokens.get(id, b"")) or -1 for id in range(n_vocab)], np.intp)
        bounds = np.cumsum(np.maximum(self._length, 0))
        self._first = bounds - np.maximum(self._length, 0)
        data = b"".join([tokens.get(id, b"") for id in range(n_vocab)])
        self._uint64s = sliding_uint64(data)
        self._words = self._uint64s.take(self._first)

    def __call__(self, ids: npt.NDArray[np.integer]) -> bytes | None:
        """Return the concatenated bytes of the ids [n]; None if an id has no token."""
        chunks: list[bytes] = []
        for i in range(0, len(ids), DECODE_CHUNK_IDS):
            if (chunk := self._decode(ids[i : i + DECODE_CHUNK_IDS])) is None:
                return None
            chunks.append(chunk)
        return b"".join(chunks)

    def _decode(self, ids: npt.NDArray[np.integer]) -> bytes | None:
        if ids.min() < 0 or ids.max() >= len(self._length):
            return None
        ids = ids.astype(np.intp)
        length = self._length.take(ids, mode="clip")
        if length.min() < 0:
            return None
        end = np.cumsum(length)
        begin = end - length
        data = np.empty(end[-1] + 8, np.uint8)
        words = np.ndarray((end[-1] + 1,), "<u8", data, strides=(1,))  # a word at every byte offset
        written, long = 8, np.flatnonzero(length > 8)
        while len(long):
            words[begin[long] + written] = self._uint64s.take(self._first.take(ids[long]) + written)
            written += 8
            long = long[length[long] > written]
        words[begin] = self._words.take(ids, mode="clip")
        return data[: end[-1]].tobytes()


# Chunks of text


def _split_into_blocks(
    texts: Sequence[str], find_cut: Callable[[str, int], int | None]
) -> Iterator[list[tuple[list[int], list[str]]]]:
    """Yield blocks of about BLOCK_CHARS characters: lists of chunks of about CHUNK_CHARS.

    A chunk is (text indices, parts): parts of texts, and the index of the text of each.

    Args:
        texts: the texts.
        find_cut: function that returns a position, from a given one on, at which a text can be cut.
    """
    block: list[tuple[list[int], list[str]]] = []
    indices: list[int] = []
    parts: list[str] = []
    chunk_chars = block_chars = 0
    for index, text in enumerate(texts):
        for part in _split_at_safe_cuts(text, find_cut):
            indices.append(index)
            parts.append(part)
            chunk_chars += len(part)
            block_chars += len(part)
            if chunk_chars >= CHUNK_CHARS:
                block.append((indices, parts))
                indices, parts, chunk_chars = [], [], 0
            if block_chars >= BLOCK_CHARS:
                yield block
                block, block_chars = [], 0
    if parts:
        block.append((indices, parts))
    if block:
        yield block


def _split_at_safe_cuts(text: str, find_cut: Callable[[str, int], int | None]) -> Iterator[str]:
    """Yield the parts of a text, about CHUNK_CHARS characters each, to pretokenize separately."""
    begin = 0
    while len(text) - begin > CHUNK_CHARS:
        if (end := find_cut(text, begin + CHUNK_CHARS)) is None:
            break
        yield text[begin:end]
        begin = end
    yield text[begin:] if begin else text
