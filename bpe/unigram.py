"""Unigram language model: the most probable sequence of tokens, by the Viterbi algorithm.

Kudo, "Subword Regularization: Improving Neural Network Translation Models with Multiple Subword
Candidates" (2018); used by T5, XLM-R and multilingual E5. Every token has a probability, whose
logarithm is its score. The score of a sequence is the sum of the scores of its tokens, and a text
becomes the sequence of the highest score. All sequences form a lattice: its nodes are the positions
between characters, and its edges are tokens. The best path to a position consists of a last token
and the best path to the position before that token, so one pass from left to right finds the best
path of the whole text.

A character that is not a token is an edge as well: the unknown token, or the bytes of the
character, with a score below that of every token.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bpe.character_bpe import BatchMerge
from bpe.fast_encoder import Ids
from bpe.hash_table import Ints

_UNK_PENALTY = 10.0
_MAX_PIECE = 4096  # characters; the search tries every prefix of a token at every position


@dataclass(frozen=True)
class Edge:
    """A token in the lattice of a text.

    Attributes:
        begin: the position of the first character.
        end: the position after the last character.
        score: the logarithm of the probability of the token.
        is_known: whether the vocabulary has the token; else the edge is an unknown character.
    """

    begin: int
    end: int
    score: float
    is_known: bool = True


class Unigram:
    """A Unigram vocabulary: the scores of its tokens, and the search of the best path.

    Attributes:
        pieces: token to id; a space is written as a space, not as U+2581.
        scores: token to score, the logarithm of its probability.
        unk_score: the score of an unknown character.
        vocab: None, because there are no merges; see `PieceModel`.
    """

    vocab = None

    def __init__(
        self,
        pieces: Mapping[str, int],
        scores: Mapping[str, float],
        *,
        unk_id: int,
        byte_ids: Sequence[int] | None = None,
        lowest_score: float | None = None,
    ):
        """Store the vocabulary and build the table of token prefixes for the search.

        Args:
            pieces: token to id.
            scores: token to score.
            unk_id: the id of an unknown character.
            byte_ids: the id of each of the 256 bytes, to encode an unknown character as its bytes;
                None uses `unk_id`.
            lowest_score: the lowest score in the vocabulary file; None takes that of `scores`. The
                score of an unknown character is lower by 10.

        Raises:
            ValueError: if a token has more than 4,096 characters.
        """
        self.pieces, self.scores = dict(pieces), dict(scores)
        self._unk_id, self._byte_ids = unk_id, byte_ids
        lowest = min(scores.values(), default=0.0) if lowest_score is None else lowest_score
        self.unk_score = lowest - _UNK_PENALTY
        # The score of every prefix of a token; None: the prefix is not a token.
        self._scores: dict[str, float | None] = dict(scores)
        for piece, id in self.pieces.items():
            if len(piece) > _MAX_PIECE:
                raise ValueError(
                    f"token {id} has {len(piece):,} characters; the limit is {_MAX_PIECE:,}"
                )
            for n in range(len(piece) - 1, 0, -1):
                if piece[:n] in self._scores:
                    break
                self._scores[piece[:n]] = None

    def best_path(self, text: str) -> list[tuple[int, int, bool]]:
        """Return (begin, end, whether the vocabulary has it) for each token of the best path.

        Of two paths to a position with the same score, the path with the longer last token is
        better.
        """
        n, scores, unk_score = len(text), self._scores, self.unk_score
        best = [-np.inf] * (n + 1)
        best[0] = 0.0
        origin = [-1] * (n + 1)  # the position at which the last token of the best path begins
        known = [True] * (n + 1)
        for begin in range(n):
            score_before = best[begin]
            has_single = False
            for end in range(begin + 1, n + 1):
                score = scores.get(text[begin:end], _MISSING)
                if score is None:
                    continue
                if score is _MISSING:
                    break
                if end == begin + 1:
                    has_single = True
                if (total := score_before + score) > best[end]:
                    best[end], origin[end], known[end] = total, begin, True
            if not has_single and (total := score_before + unk_score) > best[begin + 1]:
                best[begin + 1], origin[begin + 1], known[begin + 1] = total, begin, False
        path = []
        while n > 0:
            path.append((origin[n], n, known[n]))
            n = origin[n]
        return path[::-1]

    def lattice(self, text: str) -> list[Edge]:
        """Return all edges of the lattice of a text, ordered by `begin`."""
        edges = []
        for begin in range(len(text)):
            edges_from_begin = []
            for end in range(begin + 1, len(text) + 1):
                score = self._scores.get(text[begin:end], _MISSING)
                if score is _MISSING:
                    break
                if isinstance(score, float):
                    edges_from_begin.append(Edge(begin, end, score))
            if not any(edge.end == begin + 1 for edge in edges_from_begin):
                edges_from_begin.insert(0, Edge(begin, begin + 1, self.unk_score, is_known=False))
            edges += edges_from_begin
        return edges

    def encode(self, segment: str) -> list[int]:
        """Return the ids of a segment of normalized text."""
        ids: list[int] = []
        for begin, end, is_known in self.best_path(segment):
            if is_known:
                ids.append(self.pieces[segment[begin:end]])
            elif self._byte_ids is None:
                ids.append(self._unk_id)
            else:
                ids += [self._byte_ids[byte] for byte in segment[begin:end].encode()]
        return ids

    def encode_batch(self, segments: list[bytes], merge: BatchMerge) -> tuple[Ids, Ints]:
        """Return the concatenated ids of segments, and the id count of each; ignore `merge`."""
        results = [self.encode(segment.decode()) for segment in segments]
        ids = np.array(list(itertools.chain.from_iterable(results)), np.uint32)
        return ids, np.array(list(map(len, results)), np.intp)


_MISSING = float("nan")  # compared by identity
