"""Encoding much text at once: the same ids as piece by piece, with NumPy.

Three steps, each an operation on all pieces of a stretch of text:

- cut the text into pieces (`boundaries`), and long ones where no token reaches across (`seams`);
- look every piece up in one hash table. A piece of up to 15 bytes together with its length is a
  number of 128 bits, so comparing keys is comparing pieces, and no two are ever confused;
- write down the ids that belong to each piece, one after the other.

The table (`tables`) begins with the vocabulary and learns. Pieces that it lacks are merged side by
side (`_side_by_side`): the algorithm of `merge`, with its loop over the pairs of a piece turned
into a loop of rounds in which every piece joins one pair. Longer pieces are found in a dict, one by
one; the longest are left to `merge.merge`.

Back from ids to text, `Decoder` does the same for many tokens.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import regex

from bpe.fast_pretokenizer import FAST_PATTERNS, pretokenize_batch
from bpe.hash_table import GrowableArray, HashTable, Ints, Uint64s, concat_ranges, sliding_uint64
from bpe.split_points import SplitPoints
from bpe.vocab import Vocab

Ids = npt.NDArray[np.uint32]

# The arrays of a stretch should stay in the processor's cache. New pieces are merged at the end of
# a block: the more there are, the less each one costs.
CHUNK_CHARS = 1 << 17  # characters
BLOCK_CHARS = 1 << 22
MERGE_BATCH_BYTES = 1 << 16  # bytes of pieces that are merged side by side
DECODE_CHUNK_IDS = 1 << 14  # ids to decode at once

# Where a text can be cut without a change to its pieces: a letter or number is the last of its
# piece if one of these follows, and none of these asks what came before, if that was no symbol.
_SAFE_CUT = regex.compile(r"[\p{L}\p{N}](?=[ \n，。、।])")

MAX_KEY_BYTES = 15
MIN_BATCH_PIECES = 64  # to merge so few pieces one by one is faster
MAX_BATCH_PIECE_BYTES = 512  # bytes; a piece longer than that is merged alone
MIN_ROUND_PIECES = 8  # pieces in a round
MAX_ADDED_IDS = 1 << 21  # ids; then all that was learned is forgotten

_NO_MERGE = np.uint32(0xFFFFFFFF)  # the priority of what is not to be joined
_NO_TOKEN = np.uint32(0xFFFFFFFF)  # no token: a wall, or a part that was joined to the one before


class FastEncoder:
    """Encodes much text with one vocabulary. One thread works at a time, others wait."""

    def __init__(self, vocab: Vocab, split_points: SplitPoints | None = None):
        """
        Args:
            vocab: the vocabulary; its only pattern is in `boundaries.CUTS`.
            seams: where its long pieces can be cut; None to find that out.
        """
        (self._pattern,) = vocab.patterns
        self._vocab, self._split_points = vocab, split_points or SplitPoints(vocab)
        self._lock = threading.Lock()
        self._piece_cache = _PieceCache(vocab)

    @staticmethod
    def supports(patterns: Sequence[str]) -> bool:
        """Whether text that is cut by these patterns can be encoded here."""
        return len(patterns) == 1 and patterns[0] in FAST_PATTERNS

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Ints]:
        """Encodes texts, none of which affects another.

        Args:
            texts: without surrogates, and normalized as the encoding asks for.

        Returns:
            The ids of all texts, one after the other; and how many each text has.
        """
        with self._lock:
            try:
                return self._encode(texts)
            except BaseException:  # Ctrl-C too may have left half of what was learned
                self._piece_cache = _PieceCache(self._vocab)
                raise

    def _encode(self, texts: Sequence[str]) -> tuple[Ids, Ints]:
        ids, counts = [np.empty(0, np.uint32)], [np.empty(0, np.intp)]
        owners: list[int] = []
        for block in _split_into_blocks(texts):
            for stretch_ids, stretch_counts in self._encode_block([s for _, s in block]):
                ids.append(stretch_ids)
                counts.append(stretch_counts)
            owners += (owner for stretch_owners, _ in block for owner in stretch_owners)
        totals = np.bincount(owners, np.concatenate(counts), len(texts)).astype(np.intp)
        return np.concatenate(ids), totals

    def _encode_block(self, stretches: list[list[str]]) -> Iterator[tuple[Ids, Ints]]:
        """For each stretch the ids, and how many each of its texts has."""
        known = self._piece_cache
        if known.num_added_ids > MAX_ADDED_IDS:
            known = self._piece_cache = _PieceCache(self._vocab)
        new: dict[bytes, int] = {}  # to the numbers they are going to have
        size = known.size
        looked_up = []
        for stretch in stretches:
            data, begin, ends = pretokenize_batch(self._pattern, stretch)
            eight = sliding_uint64(data)
            if not data.isascii():
                begin, ends = self._split_points.split_batch(data, eight, begin, ends)
            number = known.find(data, eight, begin[:-1], np.diff(begin))
            number[ends[:-1]] = known.EMPTY_PIECE
            missing = np.flatnonzero(number < 0)
            bounds = zip(begin[missing].tolist(), begin[missing + 1].tolist(), strict=True)
            pieces = [data[a:b] for a, b in bounds]
            number[missing] = [new.setdefault(piece, size + len(new)) for piece in pieces]
            looked_up.append((number, ends))
        known.add(list(new), *self._merge(list(new)))
        for number, ends in looked_up:
            ids, counts = known.gather_ids(number)
            yield ids, np.add.reduceat(counts, ends[:-1])

    @functools.cached_property
    def _pair_table(self) -> _PairTable:
        return _PairTable(self._vocab)

    def _merge(self, pieces: list[bytes]) -> tuple[Ids, Ints]:
        """The ids of pieces, one after the other, and how many each has."""
        length = np.fromiter(map(len, pieces), np.intp, len(pieces))
        # A round costs the same for one piece as for ten: the few longest are not waited for.
        together = length <= min(
            MAX_BATCH_PIECE_BYTES, np.sort(length)[-MIN_ROUND_PIECES:][0] if len(length) else 0
        )
        if dropped := self._vocab.dropped_bytes:
            whole = [piece.translate(None, dropped) == piece for piece in pieces]
            together &= np.array(whole, np.bool_)
        if np.count_nonzero(together) < MIN_BATCH_PIECES:
            together[:] = False
        alone = np.flatnonzero(~together).tolist()
        lists = [self._vocab.encode_piece(pieces[i]) for i in alone]
        count = np.zeros(len(pieces), np.intp)
        count[alone] = [len(ids) for ids in lists]
        merged = np.empty(0, np.uint32)
        if together.any():
            chosen = list(itertools.compress(pieces, together.tolist()))
            merged, count[together] = _merge_in_batches(chosen, self._pair_table)
        first = np.cumsum(count) - count
        ids = np.empty(count.sum(), np.uint32)
        ids[concat_ranges(first[together], count[together])] = merged
        for i, own in zip(alone, lists, strict=True):
            ids[first[i] : first[i] + len(own)] = own
        return ids, count


class _PieceCache:
    """The pieces whose ids are known, numbered; the ids of all of them in one array."""

    EMPTY_PIECE = 0  # the number of what is no piece and has no ids

    def __init__(self, vocab: Vocab):
        self._table = HashTable(words_per_key=2)
        self._long: dict[bytes, int] = {}
        self._ids = GrowableArray(np.uint32)
        self._head = GrowableArray(np.uint32, 2)  # the first id of each piece, and how many it has
        self._first = GrowableArray(np.intp)  # where in _ids those of a piece begin
        self.add([b""], np.empty(0, np.uint32), np.zeros(1, np.intp))
        if vocab.ignore_merges:
            ids = np.fromiter(vocab.ranks.values(), np.uint32)
            self.add(list(vocab.ranks), ids, np.ones(len(ids), np.intp))
        self._num_initial_ids = self._ids.size

    @property
    def size(self) -> int:
        return self._head.size

    @property
    def num_added_ids(self) -> int:
        return self._ids.size - self._num_initial_ids

    def find(self, data: bytes, eight: Uint64s, begin: Ints, length: Ints) -> Ints:
        """The numbers of the pieces data[begin : begin + length], -1 if unknown."""
        number = self._table.find(*_keys(eight, begin, length))
        long = np.flatnonzero(length > MAX_KEY_BYTES)
        if len(long):
            get, first = self._long.get, begin[long]
            bounds = zip(first.tolist(), (first + length[long]).tolist(), strict=True)
            number[long] = [get(data[a:b], -1) for a, b in bounds]
        return number

    def add(self, pieces: Sequence[bytes], ids: Ids, count: Ints) -> None:
        """Adds pieces that are not known, as numbers `size`, `size` + 1, ..."""
        length = np.fromiter(map(len, pieces), np.intp, len(pieces))
        long = np.flatnonzero(length > MAX_KEY_BYTES)
        low, high = _keys(sliding_uint64(b"".join(pieces)), np.cumsum(length) - length, length)
        low[long] = long + self.size  # some key that no piece has, to take up the number
        high[long] = (MAX_KEY_BYTES + 1) << 56
        self._table.add(low, high)
        self._long.update((pieces[i], self.size + i) for i in long.tolist())
        first = np.cumsum(count) - count
        self._first.append(first + self._ids.size)
        self._head.append(np.stack([np.append(ids, np.uint32(0)).take(first), count], axis=1))
        self._ids.append(ids)

    def gather_ids(self, number: Ints) -> tuple[Ids, Ints]:
        """The ids of pieces, one after the other, and how many each has."""
        head = self._head.take(number)
        count = head[:, 1].astype(np.intp)
        other = np.flatnonzero(count != 1)
        if 4 * len(other) > len(count):
            return self._ids.take(concat_ranges(self._first.take(number), count)), count
        # Most pieces are one token: write that down, then the others in their places.
        ids = np.repeat(head[:, 0], count)
        own = count.take(other)
        end = np.cumsum(own - 1) + other + 1
        ids[concat_ranges(end - own, own)] = self._ids.take(
            concat_ranges(self._first.take(number.take(other)), own)
        )
        return ids, count


# The words of a key hold up to 8 and up to 7 bytes; the last byte of the second is the length.
_MASKS = np.array(
    [
        [(1 << 8 * min(n, 8)) - 1 for n in range(MAX_KEY_BYTES + 1)],
        [(1 << 8 * max(n - 8, 0)) - 1 for n in range(MAX_KEY_BYTES + 1)],
    ],
    np.uint64,
)


def _keys(eight: Uint64s, begin: Ints, length: Ints) -> tuple[Uint64s, Uint64s]:
    """The keys of pieces that begin at some of the `eight`; of a longer one it says nothing."""
    low = eight.take(begin, mode="clip")
    low &= _MASKS[0].take(length, mode="clip")
    high = eight[8:].take(begin, mode="clip")
    high &= _MASKS[1].take(length, mode="clip")
    high |= length.astype(np.uint64) << np.uint64(56)
    return low, high


class _PairTable:
    """What two neighbouring tokens become, and with which priority.

    Attributes:
        byte_ids: [256], the token of each byte.
        byte_ranks: [256 * 256], the priority of joining two bytes, `_NEVER` if they never are.
        made: what the joined pair becomes, by priority.
    """

    def __init__(self, vocab: Vocab):
        ranks = vocab.ranks
        if vocab.merges is None:  # any two tokens that are a third together
            left, right, ranks_of_pairs = _mergeable_pairs(vocab)
            self.merged_ids = np.arange(max(ranks.values()) + 1, dtype=np.uint32)
        else:
            left, right, made = np.array(
                [(ranks[a], ranks[b], ranks[a + b]) for a, b in vocab.merges], np.uint64
            ).T
            ranks_of_pairs = np.arange(len(left))
            self.merged_ids = made.astype(np.uint32)
        self._table = HashTable(words_per_key=1)
        self._table.add(left << np.uint64(32) | right)
        self._ranks = np.append(_NO_MERGE, ranks_of_pairs.astype(np.uint32))  # by number + 1
        self.byte_ids = np.array([ranks.get(bytes([b]), 0) for b in range(256)], np.uint32)
        self.byte_ranks = self.ranks(np.repeat(self.byte_ids, 256), np.tile(self.byte_ids, 256))

    def ranks(self, left: Ids, right: Ids) -> Ids:
        """The priority of joining tokens, `_NEVER` where they may not be joined."""
        key = left.astype(np.uint64) << np.uint64(32) | right
        return self._ranks.take(self._table.find(key) + 1, mode="clip")


def _mergeable_pairs(vocab: Vocab) -> tuple[Uint64s, Uint64s, Ints]:
    """All pairs of tokens that are a token together: the ids of the two, and of the one."""
    known, tokens = _PieceCache(vocab), list(vocab.ranks)
    ids = np.fromiter([0, *vocab.ranks.values()], np.intp)  # by number in `known`
    found = []
    for start in range(0, len(tokens), 1 << 16):  # to save memory
        some = tokens[start : start + (1 << 16)]
        length = np.fromiter(map(len, some), np.intp)
        begin = np.cumsum(length) - length
        data = b"".join(some)
        token = np.repeat(np.arange(len(some)), length - 1)
        left_length = concat_ranges(
            np.ones_like(length), length - 1
        )  # every token cut at every place
        eight = sliding_uint64(data)
        left = known.find(data, eight, begin[token], left_length)
        good = left >= 0
        token, left, left_length = token[good], left[good], left_length[good]
        right = known.find(data, eight, begin[token] + left_length, length[token] - left_length)
        good = right >= 0
        found.append(ids[np.stack([left, right, token + start + 1])[:, good]])
    left, right, made = np.concatenate(found, axis=1)
    return left.astype(np.uint64), right.astype(np.uint64), made


def _merge_in_batches(pieces: Sequence[bytes], pairs: _PairTable) -> tuple[Ids, Ints]:
    """Merges many pieces.

    Args:
        pieces: none of them empty.
        pairs: the vocabulary.

    Returns:
        The ids of all pieces, one after the other, and how many each has.
    """
    # Pieces of about one length take about as many rounds; the longest first.
    length = np.fromiter(map(len, pieces), np.intp, len(pieces))
    order = np.argsort(-length, kind="stable")
    total = np.cumsum(length[order])
    borders = np.searchsorted(total, np.arange(MERGE_BATCH_BYTES, total[-1], MERGE_BATCH_BYTES))
    batches = [[pieces[i] for i in part.tolist()] for part in np.split(order, borders)]
    merged = [_merge_batch(batch, pairs) for batch in batches if batch]
    ids = np.concatenate([ids for ids, _ in merged])
    count = np.concatenate([count for _, count in merged])
    first = np.cumsum(count) - count
    back = np.argsort(order)
    return ids[concat_ranges(first[back], count[back])], count[back]


def _merge_batch(pieces: Sequence[bytes], pairs: _PairTable) -> tuple[Ids, Ints]:
    """Merges pieces, the longest first: in each round, every piece joins its best pair.

    The state is that of `merge.merge_heap`, for all pieces in one row: a part is known by the
    place of its first byte. A pair's rank and place, in this order, are one number; so the least
    of a piece's numbers is the pair to join next, the leftmost of those with the lowest rank.
    """
    data = np.frombuffer(b"\0".join(pieces) + b"\0", np.uint8)
    end = np.cumsum(np.fromiter(map(len, pieces), np.intp, len(pieces)) + 1)  # a wall after each
    begin = np.append(0, end[:-1])
    place = np.arange(len(data))

    token = pairs.byte_ids.take(data)
    token[end - 1] = _NO_TOKEN
    before, after = place - 1, place + 1
    two_bytes = data.astype(np.intp) << 8
    two_bytes[:-1] |= data[1:]
    rank = pairs.byte_ranks.take(two_bytes)
    rank[end - 1] = rank[end - 2] = _NO_MERGE
    best = _merge_keys(rank, place)

    live = len(pieces)  # only the pieces before this one may have pairs left
    while live:
        least = np.minimum.reduceat(best[: end[live - 1]], begin[:live])
        going = np.flatnonzero(least < _NO_MERGE_KEY)
        live = int(going[-1]) + 1 if len(going) else 0
        least = least.take(going)
        i = (least & np.uint64(0xFFFFFFFF)).view(np.intp)
        j = after.take(i, mode="clip")  # the part to join to i
        h, k = before.take(i, mode="clip"), after.take(j, mode="clip")  # their neighbours
        token[i] = pairs.merged_ids.take((least >> np.uint64(32)).view(np.intp), mode="clip")
        token[j] = _NO_TOKEN
        best[j] = _NO_MERGE_KEY
        after[i] = k
        before[k] = i
        left, right = np.append(h, i), np.append(i, k)
        rank = pairs.ranks(token.take(left, mode="clip"), token.take(right, mode="clip"))
        best[left] = _merge_keys(rank, left)
    part = token != _NO_TOKEN
    return token[part], np.add.reduceat(part, begin, dtype=np.intp)


def _merge_keys(rank: Ids, place: Ints) -> Uint64s:
    """One number for a rank and a place: the least has the lowest rank, and is the leftmost."""
    return rank.astype(np.uint64) << np.uint64(32) | place.view(np.uint64)


_NO_MERGE_KEY = np.uint64(_NO_MERGE) << np.uint64(
    32
)  # less than this are those that are to be joined


# Decoding


class FastDecoder:
    """Decodes many ids at once: their bytes, one token after the other.

    A token is written as words of eight bytes, of which the last may reach into the next token. So
    first come the words of long tokens but their first ones, and then the first words of all, in
    order: what reached too far is overwritten.
    """

    def __init__(self, tokens: Mapping[int, bytes], n_vocab: int):
        """
        Args:
            tokens: bytes by id.
            n_vocab: one more than the highest id.
        """
        self._length = np.array([len(tokens.get(id, b"")) or -1 for id in range(n_vocab)], np.intp)
        bounds = np.cumsum(np.maximum(self._length, 0))
        self._first = bounds - np.maximum(self._length, 0)
        data = b"".join([tokens.get(id, b"") for id in range(n_vocab)])
        self._eight = sliding_uint64(data)
        self._words = self._eight.take(self._first)

    def __call__(self, ids: npt.NDArray[np.integer]) -> bytes | None:
        """The bytes of tokens; None if one of the ids is not that of a token."""
        portions = [
            self._decode(ids[i : i + DECODE_CHUNK_IDS])
            for i in range(0, len(ids), DECODE_CHUNK_IDS)
        ]
        return None if None in portions else b"".join(portions)  # type: ignore[arg-type]

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
        words = np.ndarray((end[-1] + 1,), "<u8", data, strides=(1,))  # one from every byte on
        done, more = 8, np.flatnonzero(length > 8)
        while len(more):
            words[begin[more] + done] = self._eight.take(self._first.take(ids[more]) + done)
            done += 8
            more = more[length[more] > done]
        words[begin] = self._words.take(ids, mode="clip")
        return data[: end[-1]].tobytes()


# Cutting text into portions


def _split_into_blocks(texts: Sequence[str]) -> Iterator[list[tuple[list[int], list[str]]]]:
    """Blocks of stretches; a stretch is some parts of texts, and to which texts they belong."""
    block: list[tuple[list[int], list[str]]] = []
    owners: list[int] = []
    parts: list[str] = []
    in_stretch = in_block = 0
    for owner, text in enumerate(texts):
        for part in _split_at_safe_cuts(text):
            owners.append(owner)
            parts.append(part)
            in_stretch += len(part)
            in_block += len(part)
            if in_stretch >= CHUNK_CHARS:
                block.append((owners, parts))
                owners, parts, in_stretch = [], [], 0
            if in_block >= BLOCK_CHARS:
                yield block
                block, in_block = [], 0
    if parts:
        block.append((owners, parts))
    if block:
        yield block


def _split_at_safe_cuts(text: str) -> Iterator[str]:
    """Parts of some STRETCH characters that can be cut into pieces one by one."""
    begin = 0
    while len(text) - begin > CHUNK_CHARS:
        safe = _SAFE_CUT.search(text, begin + CHUNK_CHARS)
        if not safe:
            break
        yield text[begin : safe.end()]
        begin = safe.end()
    yield text[begin:] if begin else text
