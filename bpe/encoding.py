"""Text to token ids and back: the object everything else holds, with the contract of tiktoken.

Three steps forward: find the special tokens that the caller allows (they stand for themselves), cut
the rest into pieces (`pretokenize`), cover each piece with tokens (`merge`). Backward is a table.

Two kinds of vocabulary are in use, and they disagree on what orders the merges:

- tiktoken: any two neighbours whose bytes together are a token may be joined, and that token's id
  is the priority. A piece that is a token as a whole is that token.
- GPT-2, Hugging Face and GGUF: a list names the pairs that may be joined, in order of priority. An
  id is just a number (SmolLM2 begins with 17 special tokens). The *pair* matters: if ("a", "bc")
  is listed, ("ab", "c") gives the same bytes but may not be joined.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Literal, NoReturn

from bpe.merge import NEVER, merge
from bpe.pretokenize import compile_pattern, split

# Text repeats its words. One entry is some 300 bytes; a cache that is full starts anew.
_CACHE_ENTRIES = 1 << 15
_CACHE_PIECE = 64  # characters; longer pieces hardly come again


class Encoding:
    """A vocabulary with its rules: `encode` and `decode` as tiktoken's `Encoding` has them.

    Attributes:
        name: what it is called in messages.
        ranks: token bytes to id, without the special tokens.
        special_tokens: spelling to id.
        max_token_value: the highest id.
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
    ):
        """
        Args:
            name: free to choose.
            pattern: the split pattern, or several to apply in turn (see `bpe.pretokenize`).
            ranks: token bytes to id. Without `merges` the id is also the token's merge priority.
            special_tokens: spelling to id of the tokens that no ordinary text can produce.
            merges: the pairs that may be joined, highest priority first.
            ignore_merges: only with `merges`: a piece that is a token as a whole is that token even
                where no merges lead to it (Llama 3).
            normalization: the Unicode form that text is brought into first (Qwen2: "NFC"); None
                leaves text as it is, and only then does decoding always give it back.
            dropped_bytes: exactly the bytes that `ranks` lacks, to say that the loss is known:
                SmolLM2 has no token for \\x04, and Hugging Face's tokenizer skips it too.

        Raises:
            ValueError: if ids repeat, bytes are missing, or a merge names no token.
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

        # A special token may have two spellings (o200k_harmony); decoding gives the first.
        special = {id: token.encode() for token, id in reversed(self.special_tokens.items())}
        self._decoder = {id: token for token, id in self.ranks.items()} | special
        if len(self._decoder) != len(self.ranks) + len(special):
            raise ValueError(f"encoding {name!r}: {_repeated(self.ranks, self.special_tokens)}")
        if min(self._decoder) < 0:
            raise ValueError(f"encoding {name!r}: token id {min(self._decoder)} is negative")
        self.max_token_value = max(self._decoder)
        self._special_ids = frozenset(self.special_tokens.values())

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
        self.whole_pieces = merges is None or ignore_merges
        self._cache: dict[str, list[int]] = {}

    def __repr__(self) -> str:
        return f"<Encoding {self.name!r}>"

    # Encoding

    def encode(
        self,
        text: str,
        *,
        allowed_special: Literal["all"] | AbstractSet[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = "all",
    ) -> list[int]:
        """Encodes text into token ids.

        Special tokens steer a model, so text from a stranger must not be able to spell one. By
        default, text that does raises an error; the caller chooses per token:

        - in `allowed_special`: it becomes the special token;
        - in neither set: it is encoded as the ordinary text it is;
        - in `disallowed_special` ("all": every one that is not allowed): an error.

        >>> encoding.encode("<|endoftext|>", allowed_special={"<|endoftext|>"})
        [0]
        >>> encoding.encode("<|endoftext|>", disallowed_special=())
        [44, 108, 486, 1168, 2658, 108, 46]

        Raises:
            ValueError: if the text spells a disallowed special token.
        """
        if allowed_special == "all":
            allowed_special = self.special_tokens_set
        if disallowed_special == "all":
            disallowed_special = self.special_tokens_set - allowed_special
        if disallowed_special and (
            match := special_pattern(frozenset(disallowed_special)).search(text)
        ):
            _raise_disallowed(match.group())

        allowed = self.special_tokens.keys() & allowed_special
        if not allowed:
            return self.encode_ordinary(text)
        ids = []
        # The group in the pattern makes `split` return the special tokens at the odd places.
        for i, part in enumerate(special_pattern(frozenset(allowed)).split(text)):
            if i % 2:
                ids.append(self.special_tokens[part])
            elif part:
                ids += self.encode_ordinary(part)
        return ids

    def encode_ordinary(self, text: str) -> list[int]:
        """Encodes text, seeing no special token in it: `encode(text, disallowed_special=())`."""
        try:
            return self._encode_ordinary(text)
        except UnicodeEncodeError:
            # As tiktoken does: join surrogate pairs; lone ones, which have no UTF-8, become U+FFFD.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._encode_ordinary(text)

    def encode_single_token(self, text_or_bytes: str | bytes) -> int:
        """The id of one token, special or not.

        Raises:
            KeyError: if the vocabulary has no such token.
        """
        token = text_or_bytes.encode() if isinstance(text_or_bytes, str) else text_or_bytes
        if (id := self.ranks.get(token)) is not None:
            return id
        try:
            return self.special_tokens[token.decode()]
        except (KeyError, UnicodeDecodeError):
            raise KeyError(token) from None

    def _encode_ordinary(self, text: str) -> list[int]:
        if self.normalization and not text.isascii():
            text = unicodedata.normalize(self.normalization, text)
        cache = self._cache
        ids: list[int] = []
        for piece in split(self._patterns, text):
            if (found := cache.get(piece)) is None:
                found = self.encode_piece(piece.encode())
                if len(piece) <= _CACHE_PIECE:
                    if len(cache) >= _CACHE_ENTRIES:
                        cache.clear()
                    cache[piece] = found
            ids += found
        return ids

    def encode_piece(self, piece: bytes) -> list[int]:
        if self.whole_pieces and (id := self.ranks.get(piece)) is not None:
            return [id]
        if self.dropped_bytes:
            piece = piece.translate(None, self.dropped_bytes)
        rank = self._rank_of_token if self.merges is None else self._rank_of_pair
        return [self.ranks[token] for token in merge(piece, rank)]

    def _rank_of_token(self, left: bytes, right: bytes) -> int:
        return self.ranks.get(left + right, NEVER)

    def _rank_of_pair(self, left: bytes, right: bytes) -> int:
        assert self.merges is not None
        return self.merges.get((left, right), NEVER)

    # Decoding

    def decode(self, ids: Sequence[int], errors: str = "replace") -> str:
        """Decodes ids into text.

        Args:
            ids: the tokens.
            errors: what to do with bytes that are no UTF-8, as `bytes.decode` has it.

        Raises:
            KeyError: if the vocabulary has no such id.
        """
        return self.decode_bytes(ids).decode("utf-8", errors=errors)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Decodes ids into the bytes they stand for.

        Raises:
            KeyError: if the vocabulary has no such id.
        """
        try:
            return b"".join([self._decoder[id] for id in ids])
        except KeyError as error:
            raise KeyError(f"Invalid token for decoding: {error.args[0]}") from None

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes of one token, special or not; they may end inside a character.

        Raises:
            KeyError: if the vocabulary has no such id.
        """
        try:
            return self._decoder[token]
        except KeyError:
            raise KeyError(str(token)) from None

    def decode_tokens_bytes(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token.

        Raises:
            KeyError: if the vocabulary has no such id.
        """
        return [self.decode_single_token_bytes(id) for id in ids]

    def decode_with_offsets(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """Decodes ids into text, and where in it (in characters) each token begins.

        A token that begins inside a character begins where that character does.

        Raises:
            KeyError: if the vocabulary has no such id.
            UnicodeDecodeError: if the bytes are no UTF-8.
        """
        offsets, length = [], 0
        tokens = self.decode_tokens_bytes(ids)
        for token in tokens:
            offsets.append(max(0, length - _continues(token[0])))
            length += sum(not _continues(byte) for byte in token)
        return b"".join(tokens).decode("utf-8"), offsets

    # About the vocabulary

    @property
    def n_vocab(self) -> int:
        """One more than the highest id. Ids below it may be unused."""
        return self.max_token_value + 1

    @functools.cached_property
    def special_tokens_set(self) -> set[str]:
        """The spellings of the special tokens."""
        return set(self.special_tokens)

    def is_special_token(self, token: int) -> bool:
        """Whether `token` is the id of a special token."""
        assert isinstance(token, int)
        return token in self._special_ids

    @property
    def eot_token(self) -> int:
        """The id of `<|endoftext|>`.

        Raises:
            KeyError: if the vocabulary has no such token.
        """
        return self.special_tokens["<|endoftext|>"]


@functools.lru_cache(maxsize=128)
def special_pattern(tokens: frozenset[str]) -> re.Pattern[str]:
    """A pattern with one group that finds any of `tokens`; of several at one place, the longest."""
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def _continues(byte: int) -> bool:
    """Whether a byte of UTF-8 continues a character that began before it."""
    return 0x80 <= byte < 0xC0


def _repeated(ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]) -> str:
    seen: dict[int, bytes | str] = {}
    for token, id in [*ranks.items(), *special_tokens.items()]:
        if id in seen:
            return f"tokens {seen[id]!r} and {token!r} both have the id {id}"
        seen[id] = token
    raise AssertionError("no id is repeated")


def _raise_disallowed(token: str) -> NoReturn:
    raise ValueError(
        f"Encountered text corresponding to disallowed special token {token!r}.\n"
        "To encode it as the special token, pass it to `allowed_special`, e.g. "
        f"`allowed_special={{{token!r}}}`.\n"
        "To encode it as ordinary text, disable the check for this token by passing "
        f"`disallowed_special=(enc.special_tokens_set - {{{token!r}}})`, "
        "or for all of them by passing `disallowed_special=()`.\n"
    )
