"""A vocabulary: tokens, their ids, and what orders the merges.

Two kinds are in use, and they disagree on what orders the merges:

- tiktoken: any two neighbours whose bytes together are a token may be joined, and that token's id
  is the priority. A piece that is a token as a whole is that token.
- GPT-2, Hugging Face and GGUF: a list names the pairs that may be joined, in order of priority. An
  id is just a number (SmolLM2 begins with 17 special tokens). The *pair* matters: if ("a", "bc")
  is listed, ("ab", "c") gives the same bytes but may not be joined.

`Encoding` adds text; `bulk` and `seams` take what is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from bpe.merge import NO_MERGE, merge
from bpe.pretokenize import compile_pattern


class Vocab:
    """Tokens and their merges. Nothing of it changes once it is made.

    Attributes:
        name: what it is called in messages.
        ranks: token bytes to id, without the special tokens.
        special_tokens: spelling to id.
        max_token_value: the highest id.
        patterns: the split patterns, applied in turn.
        merges: the pairs that may be joined, and their priority; None if ids are the priorities.
        whole_pieces: whether a piece that is a token as a whole is always that token.
        normalization: the Unicode form that text is brought into first.
        dropped_bytes: the bytes that have no token; encoding loses them.
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
        normalization: Literal["NFC"] | None = None,
        dropped_bytes: bytes = b"",
        explicit_n_vocab: int | None = None,
    ):
        """
        Args:
            name: free to choose.
            pattern: the split pattern, or several to apply in turn (see `bpe.pretokenize`);
                tiktoken's `pat_str`.
            ranks: token bytes to id, tiktoken's `mergeable_ranks`. Without `merges` the id is also
                the token's merge priority.
            special_tokens: spelling to id of the tokens that no ordinary text can produce.
            merges: the pairs that may be joined, highest priority first.
            ignore_merges: only with `merges`: a piece that is a token as a whole is that token even
                where no merges lead to it (Llama 3).
            normalization: the Unicode form that text is brought into first (Qwen2: "NFC"); None
                leaves text as it is, and only then does decoding always give it back.
            dropped_bytes: exactly the bytes that `ranks` lacks, to say that the loss is known:
                SmolLM2 has no token for \\x04, and Hugging Face's tokenizer skips it too.
            explicit_n_vocab: how many tokens there must be, if that is to be checked; they then
                have the ids below it.

        Raises:
            ValueError: if ids repeat, bytes are missing, a merge names no token, or the number of
                tokens is not `explicit_n_vocab`.
        """
        self.name = name
        self.ranks = dict(ranks)
        self.special_tokens = dict(special_tokens)
        self.normalization: Literal["NFC"] | None = normalization
        self.dropped_bytes = bytes(dropped_bytes)
        self.patterns = (pattern,) if isinstance(pattern, str) else tuple(pattern)
        self._patterns = tuple(map(compile_pattern, self.patterns))

        missing = bytes(b for b in range(256) if bytes([b]) not in self.ranks)
        if missing != self.dropped_bytes:
            raise ValueError(
                f"encoding {name!r}: no token for the bytes {missing!r}, "
                f"but dropped_bytes is {self.dropped_bytes!r}"
            )
        if "" in self.special_tokens or b"" in self.ranks:
            raise ValueError(f"encoding {name!r}: a token must not be empty")

        for ids in (self.ranks, self.special_tokens):
            # A look at all of them at once: there may be 200,000, and this is start-up.
            if set(map(type, ids.values())) - {int} or (
                ids and not 0 <= min(ids.values()) <= max(ids.values()) < 1 << 32
            ):
                _raise_invalid_ids(name, ids)
        # A special token may have two spellings (o200k_harmony); decoding gives the first.
        special = {id: token.encode() for token, id in reversed(self.special_tokens.items())}
        self._decoder = {id: token for token, id in self.ranks.items()} | special
        if len(self._decoder) != len(self.ranks) + len(special):
            raise ValueError(
                f"encoding {name!r}: {_describe_duplicate(self.ranks, self.special_tokens)}"
            )
        self.max_token_value = max(self._decoder)
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
                    raise ValueError(f"encoding {name!r}: merge {pair} joins what is no token")
                if pair[0] + pair[1] not in self.ranks:
                    raise ValueError(f"encoding {name!r}: merge {pair} makes what is no token")
                if pair in self.merges:
                    raise ValueError(f"encoding {name!r}: merge {pair} is listed twice")
                self.merges[pair] = len(self.merges)
        self.ignore_merges = merges is None or ignore_merges

    @property
    def n_vocab(self) -> int:
        """One more than the highest id. Ids below it may be unused."""
        return self.max_token_value + 1

    def encode_piece(self, piece: bytes) -> list[int]:
        """Encodes one piece as `bpe.pretokenize` cuts them: nothing is cut here."""
        if self.ignore_merges and (id := self.ranks.get(piece)) is not None:
            return [id]
        if self.dropped_bytes:
            piece = piece.translate(None, self.dropped_bytes)
        return self.merge(piece)

    def merge(self, piece: bytes) -> list[int]:
        """Covers one piece with tokens by merges alone, even where it is a token as a whole."""
        rank = self._rank_of_token if self.merges is None else self._rank_of_pair
        return [self.ranks[token] for token in merge(piece, rank)]

    def _rank_of_token(self, left: bytes, right: bytes) -> int:
        return self.ranks.get(left + right, NO_MERGE)

    def _rank_of_pair(self, left: bytes, right: bytes) -> int:
        assert self.merges is not None
        return self.merges.get((left, right), NO_MERGE)


def _raise_invalid_ids(name: str, ids: Mapping[Any, Any]) -> None:
    for token, id in ids.items():
        if not isinstance(id, int) or not 0 <= id < 1 << 32:
            raise ValueError(
                f"encoding {name!r}: the id of {token!r} must be a number from 0 to "
                f"{(1 << 32) - 1}, got {id!r}"
            )


def _describe_duplicate(ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]) -> str:
    seen: dict[int, bytes | str] = {}
    for token, id in [*ranks.items(), *special_tokens.items()]:
        if id in seen:
            return f"tokens {seen[id]!r} and {token!r} both have the id {id}"
        seen[id] = token
    raise AssertionError("no id is repeated")
