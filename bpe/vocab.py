"""Define a vocabulary: the tokens, their ids, and the order of the merges.

There are two kinds of vocabularies, with a different order of merges:

- tiktoken: two adjacent tokens can be merged if their concatenation is a token; the id of that
  token is the rank. A piece that equals a token becomes this token.
- GPT-2, Hugging Face and GGUF: a list contains the pairs that can be merged, in order of rank. An
  id is an arbitrary number (SmolLM2 begins with 17 special tokens). The *pair* matters: if
  ("a", "bc") is in the list, ("ab", "c") has the same bytes but cannot be merged.

`Encoding` adds methods for text. `fast_encoder` and `split_points` also use this class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Any

from bpe.added_tokens import AddedToken
from bpe.merge import NO_MERGE, merge
from bpe.pretokenize import NormalizationForm, compile_pattern


class Vocab:
    """Tokens and their merges; immutable.

    Attributes:
        name: the name in error messages.
        ranks: token bytes to id, without the special tokens.
        special_tokens: text to id.
        added_tokens: the tokens that are matched in every text, and the special tokens with flags
            such as `lstrip`.
        max_token_value: the highest id.
        patterns: the split patterns, applied in turn.
        merges: pair of tokens to rank; None if the ids are the ranks.
        ignore_merges: whether a piece that equals a token always becomes this token.
        normalization: the Unicode normalization form applied before encoding, or None.
        dropped_bytes: the bytes without a token, which encoding drops.
    """

    def __init__(
        self,
        name: str,
        *,
        pattern: str | Sequence[str],
        ranks: Mapping[bytes, int],
        special_tokens: Mapping[str, int],
        merges: Iterable[tuple[bytes, bytes]] | None = None,
        ignore_merges: bool = False,
        normalization: NormalizationForm | None = None,
        dropped_bytes: bytes = b"",
        explicit_n_vocab: int | None = None,
        added_tokens: Iterable[AddedToken] = (),
        unreachable_tokens: Mapping[int, bytes] = MappingProxyType({}),
    ):
        """Create and check a vocabulary.

        Args:
            name: the name in error messages.
            pattern: the split pattern, or several to apply in turn (see `bpe.pretokenize`);
                tiktoken's `pat_str`.
            ranks: token bytes to id; tiktoken's `mergeable_ranks`. Without `merges`, the id is also
                the rank of the token.
            special_tokens: text to id of the tokens that ordinary text cannot produce.
            merges: the pairs that can be merged, in order of rank.
            ignore_merges: whether a piece that equals a token becomes this token even if no
                sequence of merges makes it (Llama 3); used only with `merges`.
            normalization: the Unicode normalization form to apply first (Qwen2: "NFC"). None leaves
                the text unchanged; only then does decoding always return the same text.
            dropped_bytes: exactly the bytes without a token in `ranks`, to confirm that they are
                dropped: SmolLM2 has no token for byte 4, and Hugging Face's tokenizer drops it too.
            explicit_n_vocab: the expected number of tokens, with the ids from 0 on; None or 0 skips
                this check.
            added_tokens: the tokens that are matched in every text (`special` is false), and the
                tokens of `special_tokens` that have flags such as `lstrip`.
            unreachable_tokens: id to bytes of tokens that encoding never returns, for decoding.

        Raises:
            ValueError: if an id is repeated or invalid, a byte has no token, a merge has a pair or
                a result that is not a token, or the number of tokens is not `explicit_n_vocab`.
        """
        self._set_tokens(name, ranks, special_tokens, added_tokens)
        self.unreachable_tokens = dict(unreachable_tokens)
        self._decoder = self.unreachable_tokens | self._decoder
        self.max_token_value = max(self._decoder)
        self.normalization: NormalizationForm | None = normalization
        self.dropped_bytes = bytes(dropped_bytes)
        self.patterns = (pattern,) if isinstance(pattern, str) else tuple(pattern)
        self._patterns = tuple(map(compile_pattern, self.patterns))

        missing = bytes(b for b in range(256) if bytes([b]) not in self.ranks)
        if missing != self.dropped_bytes:
            raise ValueError(
                f"encoding {name!r}: expected dropped_bytes={missing!r}, the bytes without a "
                f"token, got {self.dropped_bytes!r}"
            )
        if explicit_n_vocab and not len(self._decoder) == self.n_vocab == explicit_n_vocab:
            raise ValueError(
                f"encoding {name!r}: explicit_n_vocab is {explicit_n_vocab}, but there are "
                f"{len(self._decoder)} tokens and the highest id is {self.max_token_value}"
            )
        self.merges: dict[tuple[bytes, bytes], int] | None = None
        if merges is not None:
            self.merges = {}
            for pair in merges:
                if not (pair[0] in self.ranks and pair[1] in self.ranks):
                    raise ValueError(
                        f"encoding {name!r}: merge {pair} has a part that is not a token"
                    )
                if pair[0] + pair[1] not in self.ranks:
                    raise ValueError(
                        f"encoding {name!r}: the result of the merge {pair} is not a token"
                    )
                if pair in self.merges:
                    raise ValueError(f"encoding {name!r}: merge {pair} is listed twice")
                self.merges[pair] = len(self.merges)
        self.ignore_merges = merges is None or ignore_merges

    def _set_tokens(
        self,
        name: str,
        ranks: Mapping[bytes, int],
        special_tokens: Mapping[str, int],
        added_tokens: Iterable[AddedToken],
    ) -> None:
        """Set and check the tokens and their ids."""
        self.name = name
        self.ranks = dict(ranks)
        self.special_tokens = dict(special_tokens)
        self.added_tokens = tuple(added_tokens)
        if "" in self.special_tokens or b"" in self.ranks:
            raise ValueError(f"encoding {name!r}: a token must not be empty")

        text_tokens = {token.content: token.id for token in self.added_tokens if not token.special}
        for ids in (self.ranks, self.special_tokens, text_tokens):
            # Check all ids at once: there may be 200,000, and this code runs at startup.
            if set(map(type, ids.values())) - {int} or (
                ids and not 0 <= min(ids.values()) <= max(ids.values()) < 1 << 32
            ):
                _raise_invalid_ids(name, ids)
        # Two special tokens may have the same id (o200k_harmony); decoding returns the first.
        special = {id: token.encode() for token, id in reversed(self.special_tokens.items())}
        added = {id: token.encode() for token, id in text_tokens.items()}
        self._decoder = {id: token for token, id in self.ranks.items()} | special | added
        if len(self._decoder) != len(self.ranks) + len(special) + len(text_tokens):
            tokens = [*self.ranks.items(), *self.special_tokens.items(), *text_tokens.items()]
            raise ValueError(f"encoding {name!r}: {_describe_duplicate(tokens)}")
        self.max_token_value = max(self._decoder)

    @property
    def token_ids(self) -> AbstractSet[int]:
        """The ids of all tokens: ordinary, special and added tokens."""
        return self._decoder.keys()

    @property
    def n_vocab(self) -> int:
        """One more than the highest id; ids below it may be unused."""
        return self.max_token_value + 1

    def encode_piece(self, piece: bytes) -> list[int]:
        """Encode the bytes of one piece, without splitting (see `bpe.pretokenize`)."""
        if self.ignore_merges and (id := self.ranks.get(piece)) is not None:
            return [id]
        if self.dropped_bytes:
            piece = piece.translate(None, self.dropped_bytes)
        return self.merge(piece)

    def merge(self, piece: bytes) -> list[int]:
        """Encode the bytes of one piece by merges only, even if `ignore_merges` is set."""
        rank = self._rank_of_token if self.merges is None else self._rank_of_pair
        return [self.ranks[token] for token in merge(piece, rank)]

    def rank(self, left: bytes, right: bytes) -> int:
        """Return the rank of a pair of adjacent tokens; `NO_MERGE` if they cannot be merged."""
        if self.merges is None:
            return self._rank_of_token(left, right)
        return self._rank_of_pair(left, right)

    def _rank_of_token(self, left: bytes, right: bytes) -> int:
        return self.ranks.get(left + right, NO_MERGE)

    def _rank_of_pair(self, left: bytes, right: bytes) -> int:
        assert self.merges is not None
        return self.merges.get((left, right), NO_MERGE)


def _raise_invalid_ids(name: str, ids: Mapping[Any, Any]) -> None:
    for token, id in ids.items():
        if not isinstance(id, int) or not 0 <= id < 1 << 32:
            raise ValueError(
                f"encoding {name!r}: the id of {token!r} must be an integer from 0 to "
                f"{(1 << 32) - 1}, got {id!r}"
            )


def _describe_duplicate(items: Iterable[tuple[bytes | str, int]]) -> str:
    tokens: dict[int, bytes | str] = {}
    for token, id in items:
        if id in tokens:
            return f"tokens {tokens[id]!r} and {token!r} both have the id {id}"
        tokens[id] = token
    raise AssertionError("no id is repeated")
