"""Byte-pair encoding of characters, as in SentencePiece: Llama 2, Mistral, Gemma.

Kudo and Richardson, "SentencePiece: A simple and language independent subword tokenizer" (2018).
Two things differ from the byte-level vocabularies of GPT-2. Merging starts from characters, and a
character that is not a token becomes its bytes after merging ("byte fallback"), or the unknown
token. And if the vocabulary has scores (`tokenizer.model`, GGUF), the pair whose merged token has
the highest score is merged first; a `tokenizer.json` lists the pairs in order instead.

This module converts such a vocabulary to a byte-level one (`vocab.Vocab`), so that `merge`,
`fast_encoder` and `explain` can use it: additional merges, ranked before all others, join the bytes
of each character. The byte-level vocabulary has internal ids. Each internal id expands to one or
several ids of the model: a byte, or an incomplete or unknown character, to its byte tokens.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from bpe.fast_encoder import Ids
from bpe.hash_table import Ints, concat_ranges
from bpe.merge import NO_MERGE, merge
from bpe.vocab import Vocab

BatchMerge = Callable[[list[bytes]], tuple[Ids, Ints]]


class CharacterBpe:
    """A character-level BPE vocabulary, converted to byte-level merges.

    Attributes:
        vocab: the byte-level vocabulary; its ids (internal ids) are not those of the model.
        expansions: for each internal id, the ids of the model that replace it.
        has_ties: whether two tokens have the same score, so that merges have equal ranks.
        byte_ids: the id of each byte, or None.
    """

    def __init__(
        self,
        name: str,
        pieces: Mapping[str, int],
        *,
        scores: Mapping[str, float] | None = None,
        merges: Iterable[tuple[str, str]] | None = None,
        unused: Iterable[str] = (),
        byte_ids: Sequence[int] | None = None,
        unk_id: int | None = None,
    ):
        """Compile a vocabulary.

        Args:
            name: the name of the vocabulary in error messages.
            pieces: token to id.
            scores: the score of each token; of two possible merges, the one that makes the token of
                higher score comes first.
            merges: the pairs that can be merged, in order of rank; instead of `scores`.
            unused: tokens of `pieces` that can result from a merge but are split again afterwards
                (type UNUSED of SentencePiece).
            byte_ids: the id of each of the 256 bytes, for characters that are not tokens; with
                None, such a character becomes `unk_id`.
            unk_id: the id of a character that is not a token, if there are no `byte_ids`; with
                None, the character is dropped.

        Raises:
            ValueError: if a merge has a pair or a result that is not a token, or is repeated.
        """
        self._unk_id = unk_id
        self._pieces, self.byte_ids = pieces, byte_ids
        characters = sorted({character.encode() for piece in pieces for character in piece})
        # All UTF-8 prefixes of two to four bytes of the characters, the shorter ones first.
        parts = {c[:n]: c[: n - 1] for n in range(2, 5) for c in characters if n <= len(c)}
        self._first_merged = 256 + len(parts)
        tokens = [bytes([byte]) for byte in range(256)] + list(parts)
        merged = [piece for piece in pieces if len(piece) > 1]
        if scores is not None:
            merged.sort(key=lambda piece: -scores[piece])
        tokens += [piece.encode() for piece in merged]
        ranks = {token: rank for rank, token in enumerate(tokens)}
        if scores is None:
            joins = [(beginning, part[-1:]) for part, beginning in parts.items()]
            pairs = [(left.encode(), right.encode()) for left, right in merges or ()]
            self.vocab = Vocab(
                name, pattern=(), ranks=ranks, special_tokens={}, merges=[*joins, *pairs]
            )
        else:
            equal = [0] * len(tokens)  # the rank of a token: that of the first with the same score
            for i in range(len(tokens)):
                is_tie = i > self._first_merged and (
                    scores[merged[i - self._first_merged]]
                    == scores[merged[i - self._first_merged - 1]]
                )
                equal[i] = equal[i - 1] if is_tie else i
            self.vocab = _ScoredVocab(name, ranks, equal)
        self.has_ties = isinstance(self.vocab, _ScoredVocab) and self.vocab.has_ties
        unused_tokens = frozenset(piece.encode() for piece in unused)
        self.expansions = [self._expand(token, unused_tokens) for token in tokens]

    def _expand(self, token: bytes, unused: frozenset[bytes]) -> tuple[int, ...]:
        """Return the ids of the model that replace a token (bytes) of the byte-level vocabulary.

        A token in `unused` is replaced by the tokens that it was merged from.
        """
        if token in unused:
            return tuple(
                id for part in self._split_unused(token) for id in self._expand(part, unused)
            )
        try:
            id = self._pieces.get(token.decode())
        except UnicodeDecodeError:  # a part of a character
            id = None
        if id is not None:
            return (id,)
        if self.byte_ids is not None:
            return tuple(self.byte_ids[byte] for byte in token)
        if self._unk_id is None:
            return ()
        return (self._unk_id,) * sum(not 0x80 <= byte < 0xC0 for byte in token)

    def _split_unused(self, token: bytes) -> Sequence[bytes]:
        """Return the tokens that an unused token was merged from, as SentencePiece does."""
        rank = self.vocab.rank
        parts = merge(token, lambda a, b: NO_MERGE if len(a) + len(b) == len(token) else rank(a, b))
        return [token[i : i + 1] for i in range(len(token))] if len(parts) == 1 else parts

    @property
    def pieces(self) -> Mapping[str, int]:
        """The dictionary from token to id."""
        return self._pieces

    def encode(self, segment: str) -> list[int]:
        """Return the ids of a segment of normalized text."""
        expansions = self.expansions
        return [id for token in self.vocab.merge(segment.encode()) for id in expansions[token]]

    def encode_batch(self, segments: list[bytes], merge: BatchMerge) -> tuple[Ids, Ints]:
        """Return the concatenated ids of segments, and the number of ids of each.

        Args:
            segments: the segments in UTF-8.
            merge: function that returns the same two arrays in internal ids, see `FastEncoder`.
        """
        if self.has_ties:  # the batched algorithm requires that no two merges have the same rank
            results = [self.encode(segment.decode()) for segment in segments]
            ids = np.array(list(itertools.chain.from_iterable(results)), np.uint32)
            return ids, np.array(list(map(len, results)), np.intp)
        tokens, counts = merge(segments)
        ids, first, length = self._expansion_arrays
        token_lengths = length.take(tokens)
        ends = np.append(0, np.cumsum(token_lengths))[np.append(0, np.cumsum(counts))]
        return ids.take(concat_ranges(first.take(tokens), token_lengths)), np.diff(ends)

    @functools.cached_property
    def _expansion_arrays(self) -> tuple[Ids, Ints, Ints]:
        """The concatenated expansions, and the offset and the length of each expansion."""
        length = np.array(list(map(len, self.expansions)), np.intp)
        ids = np.array(list(itertools.chain.from_iterable(self.expansions)), np.uint32)
        return ids, np.cumsum(length) - length, length


class _ScoredVocab(Vocab):
    """A vocabulary whose merges have equal ranks if the merged tokens have equal scores."""

    def __init__(self, name: str, ranks: Mapping[bytes, int], equal: Sequence[int]):
        super().__init__(name, pattern=(), ranks=ranks, special_tokens={})
        self.ignore_merges = False  # a token that no sequence of merges makes is never used
        self._equal = equal
        self.has_ties = any(rank != i for i, rank in enumerate(equal))

    def _rank_of_token(self, left: bytes, right: bytes) -> int:
        rank = self.ranks.get(left + right)
        return NO_MERGE if rank is None else self._equal[rank]
