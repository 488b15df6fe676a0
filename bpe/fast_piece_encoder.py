"""Encode long texts with a vocabulary of characters: `fast_encoder` with other split points.

The texts are split at positions that no token crosses (`character_pairs`). The segments are cached
as `fast_encoder` caches pieces, and only new segments are encoded: by merges (`character_bpe`), or
by the search of the best path (`unigram`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from bpe.character_bpe import BatchMerge
from bpe.character_pairs import CharacterPairs, Codes, to_codes
from bpe.fast_encoder import FastEncoder, Ids, PieceCache
from bpe.fast_pretokenizer import Bools, PieceOffsets, to_byte_offsets
from bpe.hash_table import Ints, Uint64s, sliding_uint64
from bpe.vocab import Vocab

_CUT_CHARS = 1 << 10  # the window in which a split point is searched


class PieceModel(Protocol):
    """The interface of a model that encodes segments: `CharacterBpe` or `Unigram`."""

    @property
    def vocab(self) -> Vocab | None:
        """The byte-level vocabulary whose merges `encode_batch` applies; None for Unigram."""
        ...

    @property
    def pieces(self) -> Mapping[str, int]:
        """The dictionary from token to id."""
        ...

    def encode(self, segment: str) -> list[int]:
        """Return the ids of a segment."""
        ...

    def encode_batch(self, segments: list[bytes], merge: BatchMerge) -> tuple[Ids, Ints]:
        """Return the concatenated ids of segments, and the number of ids of each."""
        ...


class FastPieceEncoder(FastEncoder):
    """A `FastEncoder` whose vocabulary has tokens of characters (SentencePiece), not of bytes."""

    def __init__(
        self,
        model: PieceModel,
        pairs: CharacterPairs,
        *,
        split_before_space: bool = False,
        fused_id: int | None = None,
    ):
        """Create an encoder.

        Args:
            model: the model that encodes segments.
            pairs: the pairs of characters that are adjacent in a token of the model.
            split_before_space: whether to split before every space.
            fused_id: the id of unknown characters, if a run of them becomes one id; None keeps
                one id per character.
        """
        self._model, self._pairs = model, pairs
        self._split_before_space, self._fused_id = split_before_space, fused_id
        if model.vocab is not None:
            self._vocab = model.vocab
        self._lock = threading.Lock()
        self._piece_cache = self._new_cache()

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Ints]:
        """Encode texts independently of each other; see `FastEncoder.encode`."""
        ids, counts = super().encode(texts)
        if self._fused_id is None or not len(ids):
            return ids, counts
        is_unknown = ids == self._fused_id
        repeats = np.zeros(len(ids), np.bool_)
        repeats[1:] = is_unknown[1:] & is_unknown[:-1]
        ends = np.cumsum(counts)
        starts = ends - counts
        repeats[starts[counts > 0]] = False
        num_repeats = np.append(0, np.cumsum(repeats))
        return ids[~repeats], counts - (num_repeats[ends] - num_repeats[starts])

    def _new_cache(self) -> PieceCache:
        return PieceCache({})

    def _starts(self, codes: Codes) -> Bools:
        start = self._pairs.starts(codes)
        if self._split_before_space:
            start |= codes == ord(" ")
        return start

    def _pretokenize(self, texts: Sequence[str]) -> tuple[PieceOffsets, Uint64s]:
        joined = "\n".join(["", *texts, ""])
        separators = np.cumsum([0, *(len(text) + 1 for text in texts)])
        start = self._starts(to_codes(joined))
        start[separators] = True
        start[separators[:-1] + 1] = True
        data = joined.encode()
        offsets = to_byte_offsets(data, np.flatnonzero(start), separators, len(joined))
        return offsets, sliding_uint64(data)

    def _find_cut(self, text: str, position: int) -> int | None:
        while position < len(text):
            window = to_codes(text[position : position + _CUT_CHARS])
            offsets = np.flatnonzero(self._starts(window))
            if len(offsets) > 1:
                return position + int(offsets[1])
            position += max(len(window) - 1, 1)
        return None

    def _merge(self, pieces: list[bytes]) -> tuple[Ids, Ints]:
        return self._model.encode_batch(pieces, super()._merge)
