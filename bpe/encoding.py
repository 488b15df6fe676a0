"""Encode text to token ids and decode ids to text: the class `Encoding`, with the API of tiktoken.

Encoding has three steps: find the special tokens that the caller allows, split the remaining text
into pieces (`pretokenize`), and merge the bytes of each piece into tokens (`merge`). Decoding is a
lookup. Long texts are encoded to the same ids by `fast_encoder`; long Chinese pieces are split
further by `split_points`.
"""

from __future__ import annotations

import array
import functools
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, Literal, Self

from bpe.added_tokens import WHITESPACE, AddedToken, TokenSplitter, token_splitter
from bpe.pretokenize import split
from bpe.special_tokens import check_disallowed_special, fix_surrogates
from bpe.unstable import completions
from bpe.vocab import Vocab

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from bpe.fast_encoder import FastDecoder, FastEncoder
    from bpe.split_points import SplitPoints

Allowed = Literal["all"] | AbstractSet[str]
Disallowed = Literal["all"] | Collection[str]
Position = Literal["start", "after token", "inside"]
"""The position of a part in its text: at the start, after an added token, or after other text."""

# Words repeat in a text. An entry takes about 300 bytes; a full cache is cleared.
_CACHE_ENTRIES = 1 << 15
_MAX_CACHED_PIECE = 64  # characters; longer pieces rarely repeat
_LONG_PIECE = 12  # characters; longer non-ASCII pieces are split further (`split_points`)

# `fast_encoder` is faster from this length on. Building its tables takes about 0.3 s, once.
_FAST_ENCODE_MIN_CHARS = 1 << 15
_FAST_DECODE_MIN_IDS = 1 << 10


class Encoding(Vocab):
    """A vocabulary with the methods `encode` and `decode` of tiktoken's `Encoding`.

    Attributes and arguments are those of `Vocab`.
    """

    dummy_prefix = False  # whether encoding puts a space before a text, which decoding drops
    # For pickling: a function and its arguments, whose call returns this encoding. With None, the
    # arguments of the constructor are pickled.
    factory: tuple[Callable[[str], Encoding], tuple[str]] | None = None

    def __repr__(self) -> str:
        return f"<Encoding {self.name!r}>"

    # Encoding

    def encode(
        self,
        text: str,
        *,
        allowed_special: Allowed = frozenset(),
        disallowed_special: Disallowed = "all",
    ) -> list[int]:
        """Encode text to token ids.

        Special tokens control a model, so untrusted text must not be able to produce one. By
        default, text that contains a special token raises an error. A special token is

        - encoded as the special token if it is in `allowed_special`;
        - encoded as ordinary text if it is in neither set;
        - rejected with a ValueError if it is in `disallowed_special` ("all": every token that is
          not allowed).

        >>> gpt2 = bpe.get_encoding("gpt2")
        >>> gpt2.encode("<|endoftext|>", allowed_special={"<|endoftext|>"})
        [50256]
        >>> gpt2.encode("<|endoftext|>", disallowed_special=())
        [27, 91, 437, 1659, 5239, 91, 29]

        A surrogate pair is encoded as its character; a lone surrogate, which has no UTF-8, as
        U+FFFD.

        Args:
            text: the text.
            allowed_special: the special tokens to encode as such, or "all".
            disallowed_special: the special tokens that raise an error, or "all".

        Raises:
            TypeError: if `text` is not a string.
            ValueError: if the text contains a disallowed special token.
        """
        allowed, disallowed = self._special_sets(allowed_special, disallowed_special)
        check_disallowed_special(text, disallowed)
        return self._encode(text, allowed)

    def encode_ordinary(self, text: str) -> list[int]:
        """Encode text, with special tokens as ordinary text.

        Same as `encode(text, disallowed_special=())`.

        Raises:
            TypeError: if `text` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, not {text!r:.80}")
        return self._encode(text, frozenset())

    def encode_to_numpy(
        self,
        text: str,
        *,
        allowed_special: Allowed = frozenset(),
        disallowed_special: Disallowed = "all",
    ) -> npt.NDArray[np.uint32]:
        """Encode text to an array of ids [n]; faster than `encode` for long texts.

        Args:
            text: the text.
            allowed_special: as in `encode`.
            disallowed_special: as in `encode`.

        Raises:
            TypeError: if `text` is not a string.
            ValueError: if the text contains a disallowed special token.
        """
        import numpy as np

        allowed, disallowed = self._special_sets(allowed_special, disallowed_special)
        check_disallowed_special(text, disallowed)
        if self._should_use_fast_encoder([text]):
            return self._encode_fast([text], allowed)[0]
        return np.array(self._encode(text, allowed), np.uint32)

    def encode_batch(
        self,
        text: Sequence[str],
        *,
        num_threads: int = 8,
        allowed_special: Allowed = frozenset(),
        disallowed_special: Disallowed = "all",
    ) -> list[list[int]]:
        """Encode several texts, each as `encode` does.

        Args:
            text: the texts.
            num_threads: has no effect; tiktoken has this argument. Python threads would not help,
                but texts with enough characters in total are encoded together, which is faster.
            allowed_special: as in `encode`.
            disallowed_special: as in `encode`.

        Raises:
            TypeError: if a text is not a string.
            ValueError: if a text contains a disallowed special token.
        """
        allowed, disallowed = self._special_sets(allowed_special, disallowed_special)
        texts = list(text)
        for item in texts:
            check_disallowed_special(item, disallowed)
        return self._encode_batch(texts, allowed)

    def encode_ordinary_batch(
        self, text: Sequence[str], *, num_threads: int = 8
    ) -> list[list[int]]:
        """Encode several texts, with special tokens as ordinary text.

        Args:
            text: the texts.
            num_threads: has no effect; tiktoken has this argument.

        Raises:
            TypeError: if a text is not a string.
        """
        texts = list(text)
        for item in texts:
            if not isinstance(item, str):
                raise TypeError(f"text must be a string, not {item!r:.80}")
        return self._encode_batch(texts, frozenset())

    def encode_with_unstable(
        self,
        text: str,
        *,
        allowed_special: Allowed = frozenset(),
        disallowed_special: Disallowed = "all",
    ) -> tuple[list[int], list[list[int]]]:
        """Encode incomplete text to its stable ids and the possible continuations.

        More text can change the last ids: the last tokens of "hello fanta" are not tokens of "hello
        fantastic". Therefore the last piece is not encoded; if it is whitespace, neither are the
        whitespace tokens before it.
        Instead, all sequences of ids are returned whose text begins with the rest of the text. The
        set of sequences follows tiktoken, including its approximations.

        >>> stable, completions = bpe.get_encoding("gpt2").encode_with_unstable("hello fanta")
        >>> stable, completions[0], completions[-1], len(completions)
        ([31373], [277, 4910], [30162], 1432)

        Args:
            text: the text.
            allowed_special: as in `encode`.
            disallowed_special: as in `encode`.

        Returns:
            The stable ids, and the sorted completions, which are empty if the text ends in a
            special token.

        Raises:
            TypeError: if `text` is not a string.
            ValueError: if the text contains a disallowed special token.
        """
        allowed, disallowed = self._special_sets(allowed_special, disallowed_special)
        check_disallowed_special(text, disallowed)
        items = self._items(fix_surrogates(text), allowed)
        if not items or not isinstance(items[-1], str):
            return [id for item in items for id in self._encode_item(item)], []
        pieces = split(self._patterns, items[-1])
        ids = [id for item in items[:-1] for id in self._encode_item(item)]
        for piece in pieces[
            :-1
        ]:  # one by one: the text without its last piece might be split at other positions
            ids += self.encode_piece(piece.encode())
        last = self.encode_piece(pieces[-1].encode())
        if last and self._is_blank(last[0]):
            while ids and self._is_blank(ids[-1]):
                last.insert(0, ids.pop())
        sequences = completions(
            self,
            self._sorted_tokens,
            self.decode_bytes(last),
            encode=self.encode_ordinary_batch,
            decode=self.decode_single_token_bytes,
        )
        return ids, sorted(map(list, sequences))

    def encode_single_token(self, text_or_bytes: str | bytes) -> int:
        """Return the id of one token, ordinary or special.

        Raises:
            TypeError: if the token is neither a string nor bytes.
            KeyError: if the vocabulary has no such token.
        """
        token = text_or_bytes.encode() if isinstance(text_or_bytes, str) else text_or_bytes
        if not isinstance(token, bytes):
            raise TypeError(f"a token must be a string or bytes, not {token!r:.80}")
        if (id := self.ranks.get(token)) is not None:
            return id
        try:
            return self.special_tokens[token.decode()]
        except (KeyError, UnicodeDecodeError):
            raise KeyError(token) from None

    def _special_sets(
        self, allowed: Allowed, disallowed: Disallowed
    ) -> tuple[AbstractSet[str], Collection[str]]:
        if allowed == "all":
            allowed = self.special_tokens_set
        if disallowed == "all":
            disallowed = self.special_tokens_set - allowed
        return allowed, disallowed

    def encode_parts(self, parts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Encode the parts of one text, which the caller has split at special tokens.

        A part of ordinary text is encoded as a continuation of the part before it. This matters for
        vocabularies that put a space before the first word of a text (`bpe.sentencepiece`), and for
        special tokens that take the whitespace around them.

        Args:
            parts: (text, whether it is a special token), in order.

        Returns:
            The ids of each part.

        Raises:
            KeyError: if a part is not a special token of the vocabulary.
        """
        results: list[list[int]] = []
        position: Position = "start"
        for i, (text, is_special) in enumerate(parts):
            if is_special:
                results.append([self.special_tokens[text]])
                position = "after token"
                continue
            if i and parts[i - 1][1] and self._flags(parts[i - 1][0]).rstrip:
                text = text.lstrip(WHITESPACE)
            if i + 1 < len(parts) and parts[i + 1][1] and self._flags(parts[i + 1][0]).lstrip:
                text = text.rstrip(WHITESPACE)
            items = self._items(fix_surrogates(text), frozenset(), position)
            results.append([id for item in items for id in self._encode_item(item)])
            position = "inside" if text else position
        return results

    def _flags(self, content: str) -> AddedToken:
        return self._added_by_content.get(content) or AddedToken(content=content, id=-1)

    @functools.cached_property
    def _added_by_content(self) -> dict[str, AddedToken]:
        return {token.content: token for token in self.added_tokens}

    def _splitter(self, allowed: AbstractSet[str], normalized: bool = False) -> TokenSplitter:
        """Return the splitter at allowed special tokens, and at added tokens that are not special.

        Args:
            allowed: the allowed special tokens.
            normalized: whether to include only the tokens with `AddedToken.normalized`, which are
                matched in normalized text; else only the others, which are matched in raw text.
        """
        tokens = [token for token in self.added_tokens if not token.special]
        for content in self.special_tokens.keys() & allowed:
            flags = self._added_by_content.get(content)
            tokens.append(flags or AddedToken(content=content, id=self.special_tokens[content]))
        return token_splitter(frozenset(t for t in tokens if t.normalized == normalized))

    @functools.cached_property
    def _splitters(self) -> dict[tuple[AbstractSet[str] | None, bool], TokenSplitter]:
        """The dictionary from (allowed special tokens, `normalized`) to splitter.

        It has the empty set of special tokens, and all of them (None).
        """
        choices = [(frozenset(), False), (frozenset(), True)]
        choices += [(self.special_tokens_set, False), (self.special_tokens_set, True)]
        return {
            (None if allowed else frozenset(), normalized): self._splitter(allowed, normalized)
            for allowed, normalized in choices
        }

    def _split_at_tokens(
        self, text: str, allowed: AbstractSet[str], normalized: bool = False
    ) -> list[str | AddedToken]:
        if not allowed or allowed is self.special_tokens_set:
            key = None if allowed else frozenset[str]()
            return self._splitters[key, normalized].split(text)
        return self._splitter(allowed, normalized).split(text)

    def _items(
        self, text: str, allowed: AbstractSet[str], position: Position = "start"
    ) -> list[str | int]:
        """Return the id of each added token in a text and each normalized text between them.

        Args:
            text: a text without surrogates.
            allowed: the special tokens to find.
            position: the position of the text in a longer one; used by vocabularies that mark the
                start of a text.
        """
        if not allowed and not self.added_tokens:
            return [self.normalize(text)] if text else []
        return [
            self.normalize(part) if isinstance(part, str) else part.id
            for part in self._split_at_tokens(text, allowed)
        ]

    def _encode_item(self, item: str | int) -> list[int]:
        return [item] if isinstance(item, int) else self._encode_ordinary(item)

    def _encode(self, text: str, allowed: AbstractSet[str]) -> list[int]:
        if self._should_use_fast_encoder([text]):
            return self._encode_fast([text], allowed)[0].tolist()
        ids: list[int] = []
        for item in self._items(fix_surrogates(text), allowed):
            ids += self._encode_item(item)
        return ids

    def _encode_ordinary(self, text: str) -> list[int]:
        """Encode normalized text between added tokens; the text is not searched for them."""
        cache = self._cache
        ids: list[int] = []
        pieces = split(self._patterns, text)
        if not text.isascii() and max(map(len, pieces)) > _LONG_PIECE:
            pieces = [part for piece in pieces for part in self._split_long_piece(piece)]
        for piece in pieces:
            if (piece_ids := cache.get(piece)) is None:
                piece_ids = self.encode_piece(piece.encode())
                if len(piece) <= _MAX_CACHED_PIECE:
                    if len(cache) >= _CACHE_ENTRIES:
                        cache.clear()
                    cache[piece] = piece_ids
            ids += piece_ids
        return ids

    @functools.cached_property
    def _cache(self) -> dict[str, list[int]]:
        """The dictionary from each recently encoded piece to its ids."""
        return {}

    def _split_long_piece(self, piece: str) -> Sequence[str]:
        return self.split_points.split(piece) if len(piece) > _LONG_PIECE else (piece,)

    @functools.cached_property
    def split_points(self) -> SplitPoints:
        """The `SplitPoints` of this vocabulary, which split long pieces without changing ids."""
        from bpe.split_points import SplitPoints

        return SplitPoints(self)

    def normalize(self, text: str) -> str:
        """Normalize a text without added tokens, before it is split and merged."""
        if self.normalization and not text.isascii():
            return unicodedata.normalize(self.normalization, text)
        return text

    # Long texts

    @functools.cached_property
    def _fast_encoder(self) -> FastEncoder | None:
        from bpe.fast_encoder import FastEncoder

        return FastEncoder(self, self.split_points) if FastEncoder.supports(self.patterns) else None

    def _should_use_fast_encoder(self, texts: Sequence[str]) -> bool:
        return sum(map(len, texts)) >= _FAST_ENCODE_MIN_CHARS and self._fast_encoder is not None

    def _encode_batch(self, texts: list[str], allowed: AbstractSet[str]) -> list[list[int]]:
        if self._should_use_fast_encoder(texts):
            return [ids.tolist() for ids in self._encode_fast(texts, allowed)]
        return [self._encode(text, allowed) for text in texts]

    def _encode_fast(
        self, texts: Sequence[str], allowed: AbstractSet[str]
    ) -> list[npt.NDArray[np.uint32]]:
        import numpy as np

        assert self._fast_encoder is not None
        texts_items = [self._items(fix_surrogates(text), allowed) for text in texts]
        ordinary = [item for items in texts_items for item in items if isinstance(item, str)]
        ids, counts = self._fast_encoder.encode(ordinary)
        if len(ordinary) == 1 == len(texts) == len(texts_items[0]):  # a text without added tokens
            return [ids]
        items = [item for items in texts_items for item in items]
        is_token = np.array([isinstance(item, int) for item in items], np.bool_)
        sizes = np.ones(len(items), np.intp)
        sizes[~is_token] = counts
        ends = np.cumsum(sizes)
        is_ordinary = np.ones(sizes.sum(), np.bool_)
        is_ordinary[ends[is_token] - 1] = False
        result = np.empty(len(is_ordinary), np.uint32)
        result[is_ordinary] = ids
        result[~is_ordinary] = [item for item in items if isinstance(item, int)]
        text_ends = np.append(0, ends)[np.cumsum([len(items) for items in texts_items])]
        return np.split(result, text_ends[:-1])

    def _is_blank(self, id: int) -> bool:
        token = self._decoder[id]
        return id not in self._special_ids and not token.strip(b" \n\t")

    @functools.cached_property
    def _sorted_tokens(self) -> list[bytes]:
        return sorted(self.ranks)

    # Decoding

    def decode(self, tokens: Sequence[int], errors: str = "replace") -> str:
        """Decode ids to text.

        Args:
            tokens: the ids, a sequence or an array [n] of integers.
            errors: how to handle invalid UTF-8, as in `bytes.decode`.

        Raises:
            KeyError: if the vocabulary has no such id.
            TypeError: if an id is not an integer.
            OverflowError: if an id is not between 0 and 2^32 - 1.
        """
        return self.decode_bytes(tokens).decode("utf-8", errors=errors)

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """Decode ids to bytes.

        Raises:
            KeyError: if the vocabulary has no such id.
            TypeError: if an id is not an integer.
            OverflowError: if an id is not between 0 and 2^32 - 1.
        """
        if isinstance(tokens, str) or not hasattr(tokens, "__getitem__"):
            raise TypeError(f"ids must be a sequence of integers, not {tokens!r:.80}")
        tokens = _checked_array(tokens)
        # `array.array` would read four bytes as one id.
        is_bytes = isinstance(tokens, bytes | bytearray | memoryview)
        if len(tokens) >= _FAST_DECODE_MIN_IDS and self.max_token_value < 1 << 24 and not is_bytes:
            return self._decode_fast(tokens)
        try:
            return b"".join([self._decoder[token] for token in tokens])
        except (KeyError, TypeError):
            raise self._decoding_error(tokens) from None

    def _decode_fast(self, tokens: Sequence[int]) -> bytes:
        import numpy as np

        if isinstance(tokens, np.ndarray):
            ids = tokens
        else:
            try:  # several times faster than np.array
                ids = np.frombuffer(array.array("I", tokens), np.uint32)
            except (OverflowError, TypeError):
                raise self._decoding_error(tokens) from None
        if (data := self._fast_decoder(ids)) is None:
            raise self._decoding_error(tokens)
        return data

    @functools.cached_property
    def _fast_decoder(self) -> FastDecoder:
        from bpe.fast_encoder import FastDecoder

        return FastDecoder(self._decoder, self.n_vocab)

    def _decoding_error(self, tokens: Iterable[int]) -> Exception:
        """Return the error for the first id that cannot be decoded."""
        for token in tokens:
            try:
                if _checked_id(token) not in self._decoder:
                    return KeyError(f"Invalid token for decoding: {token}")
            except (TypeError, OverflowError) as error:
                return error
        raise AssertionError("expected an id that cannot be decoded, but all ids are valid")

    def decode_single_token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token, ordinary or special; they may end inside a character.

        Raises:
            KeyError: if the vocabulary has no such id.
            TypeError: if the id is not an integer.
            OverflowError: if the id is not between 0 and 2^32 - 1.
        """
        if (data := self._decoder.get(_checked_id(token))) is None:
            raise KeyError(str(token))
        return data

    def decode_tokens_bytes(self, tokens: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token.

        Raises:
            KeyError: if the vocabulary has no such id.
        """
        return [self.decode_single_token_bytes(token) for token in _checked_array(tokens)]

    def decode_with_offsets(self, tokens: Sequence[int]) -> tuple[str, list[int]]:
        """Decode ids to text, and return the character offset of each token in the text.

        A token that begins inside a character has the offset of that character.

        Raises:
            KeyError: if the vocabulary has no such id.
            UnicodeDecodeError: if the bytes are not UTF-8.
        """
        offsets, length = [], 0
        data = self.decode_tokens_bytes(tokens)
        for token in data:
            offsets.append(max(0, length - _is_continuation_byte(token[0])))
            length += sum(not _is_continuation_byte(byte) for byte in token)
        return b"".join(data).decode("utf-8"), offsets

    def decode_batch(
        self, batch: Sequence[Sequence[int]], *, errors: str = "replace", num_threads: int = 8
    ) -> list[str]:
        """Decode several sequences of ids to texts.

        Args:
            batch: the sequences of ids.
            errors: as in `decode`.
            num_threads: has no effect; tiktoken has this argument.

        Raises:
            KeyError: if the vocabulary has no such id.
        """
        return [self.decode(tokens, errors) for tokens in batch]

    def decode_bytes_batch(
        self, batch: Sequence[Sequence[int]], *, num_threads: int = 8
    ) -> list[bytes]:
        """Decode several sequences of ids to bytes.

        Args:
            batch: the sequences of ids.
            num_threads: has no effect; tiktoken has this argument.

        Raises:
            KeyError: if the vocabulary has no such id.
        """
        return [self.decode_bytes(tokens) for tokens in batch]

    # The vocabulary

    def token_byte_values(self) -> list[bytes]:
        """Return the bytes of all ordinary tokens, sorted."""
        return list(self._sorted_tokens)

    @functools.cached_property
    def special_tokens_set(self) -> set[str]:
        """The texts of all special tokens."""
        return set(self.special_tokens)

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    def is_special_token(self, token: int) -> bool:
        """Return whether `token` is the id of a special token."""
        assert isinstance(token, int)
        return token in self._special_ids

    @property
    def eot_token(self) -> int:
        """The id of `<|endoftext|>`.

        Raises:
            KeyError: if the vocabulary has no such token.
        """
        return self.special_tokens["<|endoftext|>"]

    # A named encoding is pickled as its name, any other encoding as its constructor arguments.

    def without_added_tokens(self, first_id: int) -> Self:
        """Return a copy without the special and added tokens whose id is `first_id` or greater.

        A text that contains such a token is then encoded as ordinary text.
        """
        result = type(self).__new__(type(self))
        lazy = {
            name
            for cls in type(self).__mro__
            for name, value in vars(cls).items()
            if isinstance(value, functools.cached_property)
        }
        vars(result).update((key, value) for key, value in vars(self).items() if key not in lazy)
        result.special_tokens = {t: id for t, id in self.special_tokens.items() if id < first_id}
        result.added_tokens = tuple(token for token in self.added_tokens if token.id < first_id)
        dropped = {*self.special_tokens.values(), *(token.id for token in self.added_tokens)}
        result._decoder = {
            id: token for id, token in self._decoder.items() if id < first_id or id not in dropped
        }
        result.max_token_value = max(result._decoder)
        result.factory = None
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        if self.factory is not None:
            return self.factory
        arguments = {
            "pattern": self.patterns,
            "ranks": self.ranks,
            "special_tokens": self.special_tokens,
            "merges": None if self.merges is None else list(self.merges),
            "ignore_merges": self.merges is not None and self.ignore_merges,
            "normalization": self.normalization,
            "dropped_bytes": self.dropped_bytes,
            "added_tokens": self.added_tokens,
            "unreachable_tokens": self.unreachable_tokens,
        }
        return _rebuild, (self.name, arguments)


def _rebuild(name: str, arguments: dict[str, Any]) -> Encoding:
    return Encoding(name, **arguments)


def _checked_array(tokens: Any) -> Any:
    """Convert an array of any library to a NumPy array; return anything else unchanged."""
    if not hasattr(tokens, "dtype"):
        return tokens
    import numpy as np

    ids = np.asarray(tokens)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise TypeError(
            f"ids must be a sequence of integers, not an array of {ids.dtype} "
            f"with the shape {ids.shape}"
        )
    return ids


def _checked_id(token: int) -> int:
    if not isinstance(token, int) and not hasattr(token, "__index__"):
        raise TypeError(f"a token id must be an integer, not {token!r:.80}")
    if not 0 <= token < 1 << 32:
        raise OverflowError(f"token id {token} is not between 0 and {(1 << 32) - 1}")
    return token


def _is_continuation_byte(byte: int) -> bool:
    """Return whether a byte of UTF-8 continues a character."""
    return 0x80 <= byte < 0xC0
