"""Encoding much text at once: the same ids as piece by piece, with NumPy.

Three steps, each an operation on all pieces of a stretch of text:

- cut the text into pieces (`boundaries`);
- look every piece up in one hash table. A piece of up to 15 bytes together with its length is a
  number of 128 bits, so comparing keys is comparing pieces, and no two are ever confused;
- write down the ids that belong to each piece, one after the other.

The table begins with the vocabulary and learns. Pieces that it lacks are merged side by side
(`_side_by_side`): the algorithm of `merge`, with its loop over the pairs of a piece turned into a
loop of rounds in which every piece joins one pair. Longer pieces are found in a dict, one by one;
the longest are left to `merge.merge`.

Back from ids to text, `Decoder` does the same for many tokens.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import regex

from bpe.boundaries import CUTS, cut

if TYPE_CHECKING:
    from bpe.encoding import Encoding

Ints = npt.NDArray[np.intp]
Words = npt.NDArray[np.uint64]
Ids = npt.NDArray[np.uint32]

# The arrays of a stretch should stay in the processor's cache. New pieces are merged at the end of
# a block: the more there are, the less each one costs.
STRETCH = 1 << 17  # characters
BLOCK = 1 << 22
BATCH = 1 << 16  # bytes of pieces that are merged side by side

# Where a text can be cut without a change to its pieces: a letter or number is the last of its
# piece if one of these follows, and none of these asks what came before, if that was no symbol.
_SAFE = regex.compile(r"[\p{L}\p{N}](?=[ \n，。、।])")

KEY_BYTES = 15
FEW = 256  # to merge so few pieces one by one is faster
LONG = 512  # bytes; a piece that long would keep the others waiting
MAX_LEARNED = 1 << 21  # ids; then all that was learned is forgotten

_NEVER = np.iinfo(np.int64).max


class Bulk:
    """Encodes much text with one vocabulary. One thread works at a time, others wait."""

    def __init__(self, encoding: Encoding):
        """
        Args:
            encoding: the vocabulary; its only pattern is in `boundaries.CUTS`.
        """
        (self._pattern,) = encoding.patterns
        self._encoding = encoding
        self._lock = threading.Lock()
        self._known = _Known(encoding)
        self._pairs: _Pairs | None = None

    @staticmethod
    def knows(patterns: Sequence[str]) -> bool:
        """Whether text that is cut by these patterns can be encoded here."""
        return len(patterns) == 1 and patterns[0] in CUTS

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
                self._known = _Known(self._encoding)
                raise

    def _encode(self, texts: Sequence[str]) -> tuple[Ids, Ints]:
        ids, counts = [np.empty(0, np.uint32)], [np.empty(0, np.intp)]
        owners: list[int] = []
        for block in _blocks(texts):
            for stretch_ids, stretch_counts in self._encode_block([s for _, s in block]):
                ids.append(stretch_ids)
                counts.append(stretch_counts)
            owners += (owner for stretch_owners, _ in block for owner in stretch_owners)
        totals = np.bincount(owners, np.concatenate(counts), len(texts)).astype(np.intp)
        return np.concatenate(ids), totals

    def _encode_block(self, stretches: list[list[str]]) -> Iterator[tuple[Ids, Ints]]:
        """For each stretch the ids, and how many each of its texts has."""
        known = self._known
        if known.learned > MAX_LEARNED:
            known = self._known = _Known(self._encoding)
        new: dict[bytes, int] = {}  # to the numbers they are going to have
        looked_up = []
        for stretch in stretches:
            data, begin, ends = cut(self._pattern, stretch)
            number = known.find(data, begin[:-1], np.diff(begin))
            number[ends[:-1]] = known.nothing
            missing = np.flatnonzero(number < 0)
            bounds = zip(begin[missing].tolist(), begin[missing + 1].tolist(), strict=True)
            pieces = [data[a:b] for a, b in bounds]
            number[missing] = [new.setdefault(p, known.size + len(new)) for p in pieces]
            looked_up.append((number, ends))
        known.add(list(new), *self._merge(list(new)))
        for number, ends in looked_up:
            ids, counts = known.ids(number)
            yield ids, np.add.reduceat(counts, ends[:-1])

    def _merge(self, pieces: list[bytes]) -> tuple[Ids, Ints]:
        """The ids of pieces, one after the other, and how many each has."""
        length = np.fromiter(map(len, pieces), np.intp, len(pieces))
        together = length < LONG
        if dropped := self._encoding.dropped_bytes:
            whole = [piece.translate(None, dropped) == piece for piece in pieces]
            together &= np.array(whole, np.bool_)
        if np.count_nonzero(together) < FEW:
            together[:] = False
        elif self._pairs is None:
            self._pairs = _Pairs(self._encoding)
        alone = np.flatnonzero(~together).tolist()
        lists = [self._encoding.encode_piece(pieces[i]) for i in alone]
        count = np.zeros(len(pieces), np.intp)
        count[alone] = [len(ids) for ids in lists]
        merged = np.empty(0, np.uint32)
        if self._pairs is not None and together.any():
            chosen = list(itertools.compress(pieces, together.tolist()))
            merged, count[together] = _merge_many(chosen, self._pairs)
        first = np.cumsum(count) - count
        ids = np.empty(count.sum(), np.uint32)
        ids[_places(first[together], count[together])] = merged
        for i, own in zip(alone, lists, strict=True):
            ids[first[i] : first[i] + len(own)] = own
        return ids, count


class _Known:
    """The pieces whose ids are known, numbered; the ids of all of them in one array."""

    nothing = 0  # the number of what is no piece and has no ids

    def __init__(self, encoding: Encoding):
        self._table = _Table(words=2)
        self._long: dict[bytes, int] = {}
        self._ids = _Column(np.uint32)
        self._first = _Column(np.intp)  # where in _ids those of a piece begin
        self._count = _Column(np.intp)
        self.add([b""], np.empty(0, np.uint32), np.zeros(1, np.intp))
        if encoding.whole_pieces:
            ids = np.fromiter(encoding.ranks.values(), np.uint32)
            self.add(list(encoding.ranks), ids, np.ones(len(ids), np.intp))
        self._given = self._ids.size

    @property
    def size(self) -> int:
        return self._count.size

    @property
    def learned(self) -> int:
        return self._ids.size - self._given

    def find(self, data: bytes, begin: Ints, length: Ints) -> Ints:
        """The numbers of the pieces data[begin : begin + length], -1 if unknown."""
        number = self._table.find(*_keys(data, begin, length))
        long = np.flatnonzero(length > KEY_BYTES)
        if len(long):
            get, first = self._long.get, begin[long]
            bounds = zip(first.tolist(), (first + length[long]).tolist(), strict=True)
            number[long] = [get(data[a:b], -1) for a, b in bounds]
        return number

    def add(self, pieces: Sequence[bytes], ids: Ids, count: Ints) -> None:
        """Adds pieces that are not known, as numbers `size`, `size` + 1, ..."""
        length = np.fromiter(map(len, pieces), np.intp, len(pieces))
        long = np.flatnonzero(length > KEY_BYTES)
        low, high = _keys(b"".join(pieces), np.cumsum(length) - length, length)
        low[long] = long + self.size  # some key that no piece has, to take up the number
        self._table.add(low, high)
        self._long.update((pieces[i], self.size + i) for i in long.tolist())
        self._first.append(np.cumsum(count) - count + self._ids.size)
        self._count.append(count)
        self._ids.append(ids)

    def ids(self, number: Ints) -> tuple[Ids, Ints]:
        """The ids of pieces, one after the other, and how many each has."""
        count = self._count.take(number)
        return self._ids.take(_places(self._first.take(number), count)), count


class _Column:
    """An array that can grow at its end."""

    def __init__(self, dtype: npt.DTypeLike):
        self._data = np.empty(1, dtype)
        self.size = 0

    def append(self, items: npt.NDArray[Any]) -> None:
        begin, self.size = self.size, self.size + len(items)
        if self.size > len(self._data):
            self._data = np.concatenate([self._data, np.empty(2 * self.size, self._data.dtype)])
        self._data[begin : self.size] = items

    def take(self, places: Ints) -> npt.NDArray[Any]:
        return self._data.take(places, mode="clip")  # NumPy's fastest mode


class _Table:
    """A hash table with open addressing that numbers keys of one or more words from 0 on."""

    def __init__(self, *, words: int):
        self._keys = [_Column(np.uint64) for _ in range(words)]
        self._bits = 1  # there are 2^bits slots
        self._slots = np.full(2, -1, np.int32)  # the number of a key; -1: free

    def find(self, *keys: Words) -> Ints:
        """The number of each key, -1 where there is none."""
        slot = self._slot(keys)
        found = self._slots.take(slot, mode="clip").astype(np.intp)
        wrong = np.flatnonzero(self._differs(found, keys) & (found >= 0))
        if len(wrong):
            slot, keys = slot[wrong], tuple(key[wrong] for key in keys)
        while len(wrong):  # another key has the slot: look into the next one
            slot = (slot + 1) & (len(self._slots) - 1)
            number = self._slots.take(slot, mode="clip").astype(np.intp)
            found[wrong] = number
            more = np.flatnonzero(self._differs(number, keys) & (number >= 0))
            wrong, slot, keys = wrong[more], slot[more], tuple(key[more] for key in keys)
        return found

    def add(self, *keys: Words) -> None:
        """Adds keys that are different from each other and from those that the table has."""
        size = self._keys[0].size + len(keys[0])
        number = np.arange(self._keys[0].size, size)
        for column, new in zip(self._keys, keys, strict=True):
            column.append(new)
        if 2 * size > len(self._slots):
            self._bits = (4 * size).bit_length()
            self._slots = np.full(1 << self._bits, -1, np.int32)
            number = np.arange(size)
        slot = self._slot(tuple(column.take(number) for column in self._keys))
        while len(number):
            free = np.flatnonzero(self._slots[slot] < 0)[::-1]
            self._slots[slot[free]] = number[free]  # of several for one slot, the first stays
            left = self._slots[slot] != number
            number, slot = number[left], (slot[left] + 1) & (len(self._slots) - 1)

    def _slot(self, keys: tuple[Words, ...]) -> Ints:
        """The slot at which to look first: the high bits of a sum of products."""
        total = keys[0] * _FACTORS[0]
        for key, factor in zip(keys[1:], _FACTORS[1:], strict=False):
            total += key * factor
        total >>= np.uint64(64 - self._bits)
        return total.view(np.intp)

    def _differs(self, number: Ints, keys: tuple[Words, ...]) -> npt.NDArray[np.bool_]:
        """Whether the numbers belong to other keys (or are -1)."""
        differs = self._keys[0].take(number) != keys[0]
        for column, key in zip(self._keys[1:], keys[1:], strict=True):
            differs |= column.take(number) != key
        return differs


_FACTORS = np.array([0x9E3779B97F4A7C15, 0xD1B54A32D192ED03], np.uint64)  # any odd numbers


# The words of a key hold up to 8 and up to 7 bytes; the last byte of the second is the length.
_MASKS = np.array(
    [
        [(1 << 8 * min(n, 8)) - 1 for n in range(KEY_BYTES + 1)] + [0],
        [(1 << 8 * max(n - 8, 0)) - 1 for n in range(KEY_BYTES + 1)] + [0],
    ],
    np.uint64,
)


def _keys(data: bytes, begin: Ints, length: Ints) -> tuple[Words, Words]:
    """The keys of the pieces data[begin : begin + length]; longer than 15 bytes, all have one."""
    eight = _eight_bytes(data)
    length = np.minimum(length, KEY_BYTES + 1)
    low = eight.take(begin, mode="clip")
    low &= _MASKS[0].take(length)
    high = eight.take(begin + 8, mode="clip")
    high &= _MASKS[1].take(length)
    high |= length.astype(np.uint64) << np.uint64(56)
    return low, high


def _eight_bytes(data: bytes) -> Words:
    """[i]: the eight bytes from i on, the first of them the lowest; zeros after the end."""
    shifted = np.ndarray(len(data) + 9, "<u8", data + bytes(16), strides=(1,))
    return np.ascontiguousarray(shifted, np.uint64)


class _Pairs:
    """What two neighbouring tokens become, and with which priority.

    Attributes:
        byte_ids: [256], the token of each byte.
        byte_ranks: [256 * 256], the priority of joining two bytes; -1 if they may not be joined.
        made: what the joined pair becomes, by priority.
    """

    def __init__(self, encoding: Encoding):
        ranks = encoding.ranks
        if encoding.merges is None:  # any two tokens that are a third together
            left, right, self._ranks = _splits(encoding)
            self.made = np.arange(max(ranks.values()) + 1, dtype=np.uint32)
        else:
            left, right, made = np.array(
                [(ranks[a], ranks[b], ranks[a + b]) for a, b in encoding.merges], np.uint64
            ).T
            self._ranks = np.arange(len(left))
            self.made = made.astype(np.uint32)
        self._table = _Table(words=1)
        self._table.add(left << np.uint64(32) | right)
        self._ranks = np.append(self._ranks, -1)  # what the table finds for the number -1
        self.byte_ids = np.array([ranks.get(bytes([b]), 0) for b in range(256)], np.uint32)
        self.byte_ranks = self.ranks(np.repeat(self.byte_ids, 256), np.tile(self.byte_ids, 256))

    def ranks(self, left: Ids, right: Ids) -> Ints:
        """The priority of joining tokens, -1 where they may not be joined."""
        return self._ranks[self._table.find(left.astype(np.uint64) << np.uint64(32) | right)]


def _splits(encoding: Encoding) -> tuple[Words, Words, Ints]:
    """All pairs of tokens that are a token together: the ids of the two, and of the one."""
    known, tokens = _Known(encoding), list(encoding.ranks)
    ids = np.fromiter([0, *encoding.ranks.values()], np.intp)  # by number in `known`
    found = []
    for start in range(0, len(tokens), 1 << 16):  # to save memory
        some = tokens[start : start + (1 << 16)]
        length = np.fromiter(map(len, some), np.intp)
        begin = np.cumsum(length) - length
        data = b"".join(some)
        token = np.repeat(np.arange(len(some)), length - 1)
        left_length = _places(np.ones_like(length), length - 1)  # every token cut at every place
        left = known.find(data, begin[token], left_length)
        good = left >= 0
        token, left, left_length = token[good], left[good], left_length[good]
        right = known.find(data, begin[token] + left_length, length[token] - left_length)
        good = right >= 0
        found.append(ids[np.stack([left, right, token + start + 1])[:, good]])
    left, right, made = np.concatenate(found, axis=1)
    return left.astype(np.uint64), right.astype(np.uint64), made


def _merge_many(pieces: Sequence[bytes], pairs: _Pairs) -> tuple[Ids, Ints]:
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
    borders = np.searchsorted(total, np.arange(BATCH, total[-1], BATCH))
    batches = [[pieces[i] for i in part.tolist()] for part in np.split(order, borders)]
    merged = [_side_by_side(batch, pairs) for batch in batches if batch]
    ids = np.concatenate([ids for ids, _ in merged])
    count = np.concatenate([count for _, count in merged])
    first = np.cumsum(count) - count
    back = np.argsort(order)
    return ids[_places(first[back], count[back])], count[back]


def _side_by_side(pieces: Sequence[bytes], pairs: _Pairs) -> tuple[Ids, Ints]:
    """Merges pieces, the longest first: in each round, every piece joins its best pair.

    The state is that of `merge.merge_heap`, for all pieces in one row: a part is known by the
    place of its first byte. A pair's rank and place, in this order, are one number; so the least
    of a piece's numbers is the pair to join next, the leftmost of those with the lowest rank.
    """
    data = np.frombuffer(b"\0".join(pieces) + b"\0", np.uint8)
    end = np.cumsum([len(piece) + 1 for piece in pieces])  # with a wall after each piece
    begin = np.append(0, end[:-1])
    place = np.arange(len(data), dtype=np.int32)

    token = pairs.byte_ids.take(data)
    token[end - 1] = _NONE
    before, after = place - 1, place + 1
    rank = np.full(len(data), -1)
    rank[:-1] = pairs.byte_ranks.take(data[:-1].astype(np.intp) << 8 | data[1:])
    rank[end - 1] = rank[end - 2] = -1
    best = np.where(rank < 0, _NEVER, rank << 32 | place)

    live = len(pieces)  # only the pieces before this one may have pairs left
    while live:
        least = np.minimum.reduceat(best[: end[live - 1]], begin[:live])
        going = np.flatnonzero(least != _NEVER)
        live = int(going[-1]) + 1 if len(going) else 0
        least = least.take(going)
        i = least & 0xFFFFFFFF
        j = after.take(i)  # the part to join to i
        h, k = before.take(i), after.take(j)  # their neighbours
        token[i] = pairs.made.take(least >> 32)
        token[j] = _NONE
        best[j] = _NEVER
        after[i] = k
        before[k] = i
        left, right = np.append(h, i), np.append(i, k)
        rank = pairs.ranks(token.take(left), token.take(right))
        best[left] = np.where(rank < 0, _NEVER, rank << 32 | left)
    part = token != _NONE
    return token[part], np.add.reduceat(part, begin, dtype=np.intp)


_NONE = np.uint32(0xFFFFFFFF)  # no token: a wall, or a part that was joined to the one before


def _places(first: Ints, count: Ints) -> Ints:
    """The places of ranges, one after the other: ([5, 2], [2, 3]) gives 5 6 2 3 4."""
    end = np.cumsum(count)
    return np.arange(end[-1] if len(end) else 0) + np.repeat(first - end + count, count)


# Decoding


class Decoder:
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
        self._eight = _eight_bytes(data)
        self._words = self._eight.take(self._first)

    def __call__(self, ids: npt.NDArray[np.integer]) -> bytes | None:
        """The bytes of tokens; None if one of the ids is not that of a token."""
        portions = [self._decode(ids[i : i + STRETCH]) for i in range(0, len(ids), STRETCH)]
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


def _blocks(texts: Sequence[str]) -> Iterator[list[tuple[list[int], list[str]]]]:
    """Blocks of stretches; a stretch is some parts of texts, and to which texts they belong."""
    block: list[tuple[list[int], list[str]]] = []
    owners: list[int] = []
    parts: list[str] = []
    in_stretch = in_block = 0
    for owner, text in enumerate(texts):
        for part in _parts(text):
            owners.append(owner)
            parts.append(part)
            in_stretch += len(part)
            in_block += len(part)
            if in_stretch >= STRETCH:
                block.append((owners, parts))
                owners, parts, in_stretch = [], [], 0
            if in_block >= BLOCK:
                yield block
                block, in_block = [], 0
    if parts:
        block.append((owners, parts))
    if block:
        yield block


def _parts(text: str) -> Iterator[str]:
    """Parts of some STRETCH characters that can be cut into pieces one by one."""
    begin = 0
    while len(text) - begin > STRETCH:
        safe = _SAFE.search(text, begin + STRETCH)
        if not safe:
            break
        yield text[begin : safe.end()]
        begin = safe.end()
    yield text[begin:] if begin else text
