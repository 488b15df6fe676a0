"""Text to token ids and back: the object everything else holds, with the contract of tiktoken.

Three steps forward: find the special tokens that the caller allows (they stand for themselves), cut
the rest into pieces (`pretokenize`), cover each piece with tokens (`merge`). Backward is a table.
Long texts take another way to the same ids (`bulk`), long Chinese pieces are cut further (`seams`).
"""

from __future__ import annotations

import array
import functools
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

from bpe.pretokenize import split
from bpe.special_tokens import check_disallowed_special, fix_surrogates, special_token_regex
from bpe.unstable import completions
from bpe.vocab import Vocab

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from bpe.fast_encoder import FastDecoder, FastEncoder
    from bpe.split_points import SplitPoints

Allowed = Literal["all"] | AbstractSet[str]
Disallowed = Literal["all"] | Collection[str]

# Text repeats its words. One entry is some 300 bytes; a cache that is full starts anew.
_CACHE_ENTRIES = 1 << 15
_MAX_CACHED_PIECE = 64  # characters; longer pieces hardly come again
_LONG_PIECE = 12  # characters; longer pieces that are not ASCII are cut further (`seams`)

# From so many characters on, `bulk` is faster; its tables take some 0.3 s to make, once.
_FAST_ENCODE_MIN_CHARS = 1 << 15
_FAST_DECODE_MIN_IDS = 1 << 10  # ids to decode


class Encoding(Vocab):
    """A vocabulary with its rules: `encode` and `decode` as tiktoken's `Encoding` has them.

    Attributes and arguments are those of `Vocab`.
    """

    # How to get the same object again, for pickling; None: by what it was made from.
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
        """Encodes text into token ids.

        Special tokens steer a model, so text from a stranger must not be able to spell one. By
        default, text that does raises an error; the caller chooses per token:

        - in `allowed_special`: it becomes the special token;
        - in neither set: it is encoded as the ordinary text it is;
        - in `disallowed_special` ("all": every one that is not allowed): an error.

        >>> gpt2 = bpe.get_encoding("gpt2")
        >>> gpt2.encode("<|endoftext|>", allowed_special={"<|endoftext|>"})
        [50256]
        >>> gpt2.encode("<|endoftext|>", disallowed_special=())
        [27, 91, 437, 1659, 5239, 91, 29]

        Surrogate pairs count as the character they stand for; lone surrogates, which have no UTF-8,
        as U+FFFD.

        Raises:
            ValueError: if the text spells a disallowed special token.
        """
        allowed, disallowed = self._special_sets(allowed_special, disallowed_special)
        check_disallowed_special(text, disallowed)
        return self._encode(text, allowed)

    def encode_ordinary(self, text: str) -> list[int]:
        """Encodes text, seeing no special token in it: `encode(text, disallowed_special=())`."""
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
        """What `encode` gives, as an array, which is the faster way for much text.

        Raises:
            ValueError: if the text spells a disallowed special token.
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
        """Encodes several texts; see `encode`.

        `num_threads` is there because tiktoken has it, and changes nothing: threads of Python do
        not help here, but texts that are long enough together are encoded all at once.

        Raises:
            ValueError: if a text spells a disallowed special token.
        """
        allowed, disallowed = self._special_sets(allowed_special, disallowed_special)
        texts = list(text)
        for one in texts:
            check_disallowed_special(one, disallowed)
        return self._encode_batch(texts, allowed)

    def encode_ordinary_batch(
        self, text: Sequence[str], *, num_threads: int = 8
    ) -> list[list[int]]:
        """Encodes several texts, seeing no special token in them; `num_threads` changes nothing."""
        texts = list(text)
        for one in texts:
            if not isinstance(one, str):
                raise TypeError(f"a text must be a string, not {one!r:.80}")
        return self._encode_batch(texts, frozenset())

    def encode_with_unstable(
        self,
        text: str,
        *,
        allowed_special: Allowed = frozenset(),
        disallowed_special: Disallowed = "all",
    ) -> tuple[list[int], list[list[int]]]:
        """Encodes text that is not complete: its ids so far, and how it may go on.

        More text can change the last ids: "hello fanta" ends in other tokens than "hello fantastic"
        begins with. So the last piece (all of them, if they are white space) is taken away again,
        and all the ways are given in which tokens can cover it and perhaps more. Which they are
        follows tiktoken, approximations and all.

        >>> stable, completions = bpe.get_encoding("gpt2").encode_with_unstable("hello fanta")
        >>> stable, completions[0], completions[-1], len(completions)
        ([31373], [277, 4910], [30162], 1432)

        Returns:
            The ids that stay, and the completions, sorted; none if the text ends in a special
            token.

        Raises:
            ValueError: if the text spells a disallowed special token.
        """
        allowed, disallowed = self._special_sets(allowed_special, disallowed_special)
        check_disallowed_special(text, disallowed)
        parts = self._split_special(fix_surrogates(text), allowed)
        pieces = split(self._patterns, self._normalize(parts[-1]))
        if not pieces:
            return self._encode(text, allowed), []
        ids = self._encode("".join(parts[:-1]), allowed)
        for piece in pieces[:-1]:  # one by one: without the last, they might be cut otherwise
            ids += self.encode_piece(piece.encode())
        last = self.encode_piece(pieces[-1].encode())
        if last and self._is_blank(last[0]):
            while ids and self._is_blank(ids[-1]):
                last.insert(0, ids.pop())
        found = completions(
            self,
            self._sorted_tokens,
            self.decode_bytes(last),
            encode=self.encode_ordinary_batch,
            decode=self.decode_single_token_bytes,
        )
        return ids, sorted(map(list, found))

    def encode_single_token(self, text_or_bytes: str | bytes) -> int:
        """The id of one token, special or not.

        Raises:
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

    def _split_special(self, text: str, allowed: AbstractSet[str]) -> list[str]:
        """Ordinary text and special tokens by turns, beginning and ending with ordinary text."""
        present = frozenset(self.special_tokens.keys() & allowed)
        return special_token_regex(present).split(text) if present else [text]

    def _encode(self, text: str, allowed: AbstractSet[str]) -> list[int]:
        if self._should_use_fast_encoder([text]):
            return self._encode_fast([text], allowed)[0].tolist()
        ids: list[int] = []
        for i, part in enumerate(self._split_special(fix_surrogates(text), allowed)):
            if i % 2:
                ids.append(self.special_tokens[part])
            else:
                ids += self._encode_ordinary(part)
        return ids

    def _encode_ordinary(self, text: str) -> list[int]:
        cache = self._cache
        ids: list[int] = []
        pieces = split(self._patterns, self._normalize(text))
        if not text.isascii() and max(map(len, pieces)) > _LONG_PIECE:
            pieces = [part for piece in pieces for part in self._split_long_piece(piece)]
        for piece in pieces:
            if (found := cache.get(piece)) is None:
                found = self.encode_piece(piece.encode())
                if len(piece) <= _MAX_CACHED_PIECE:
                    if len(cache) >= _CACHE_ENTRIES:
                        cache.clear()
                    cache[piece] = found
            ids += found
        return ids

    @functools.cached_property
    def _cache(self) -> dict[str, list[int]]:
        """Ids of pieces that were encoded before."""
        return {}

    def _split_long_piece(self, piece: str) -> Sequence[str]:
        return self.split_points.split(piece) if len(piece) > _LONG_PIECE else (piece,)

    @functools.cached_property
    def split_points(self) -> SplitPoints:
        """Where long pieces can be cut without a change to their ids."""
        from bpe.split_points import SplitPoints

        return SplitPoints(self)

    def _normalize(self, text: str) -> str:
        if self.normalization and not text.isascii():
            return unicodedata.normalize(self.normalization, text)
        return text

    # Much text

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
        parts = [self._split_special(fix_surrogates(text), allowed) for text in texts]
        ordinary = [self._normalize(part) for text in parts for part in text[::2]]
        ids, counts = self._fast_encoder.encode(ordinary)
        if len(ordinary) == 1:  # no special tokens, and one text
            return [ids]
        special = [[self.special_tokens[token] for token in text[1::2]] for text in parts]
        # Each special token goes in behind the ordinary ids before it.
        ends = np.cumsum(counts)
        last = np.array(list(accumulate(len(text) // 2 + 1 for text in parts)), np.intp) - 1
        behind = np.delete(ends, last) if any(special) else np.empty(0, np.intp)
        ids = np.insert(ids, behind, [id for text in special for id in text])
        borders = ends[last] + np.cumsum([len(text) for text in special], dtype=np.intp)
        return np.split(ids, borders[:-1])

    def _is_blank(self, id: int) -> bool:
        token = self._decoder[id]
        return id not in self._special_ids and not token.strip(b" \n\t")

    @functools.cached_property
    def _sorted_tokens(self) -> list[bytes]:
        return sorted(self.ranks)

    # Decoding

    def decode(self, tokens: Sequence[int], errors: str = "replace") -> str:
        """Decodes ids into text.

        Args:
            tokens: the ids.
            errors: what to do with bytes that are no UTF-8, as `bytes.decode` has it.

        Raises:
            KeyError: if the vocabulary has no such id.
        """
        return self.decode_bytes(tokens).decode("utf-8", errors=errors)

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """Decodes ids into the bytes they stand for.

        Raises:
            KeyError: if the vocabulary has no such id.
        """
        if isinstance(tokens, str) or not hasattr(tokens, "__getitem__"):
            raise TypeError(f"ids must be a sequence of integers, not {tokens!r:.80}")
        tokens = _checked_array(tokens)
        # Of bytes, an array would take four for one number.
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
            try:  # several times as fast as NumPy's own way
                ids = np.frombuffer(array.array("I", tokens), np.uint32)
            except (OverflowError, TypeError):
                raise self._decoding_error(tokens) from None
        if (found := self._fast_decoder(ids)) is None:
            raise self._decoding_error(tokens)
        return found

    @functools.cached_property
    def _fast_decoder(self) -> FastDecoder:
        from bpe.fast_encoder import FastDecoder

        return FastDecoder(self._decoder, self.n_vocab)

    def _decoding_error(self, tokens: Iterable[int]) -> Exception:
        """What is wrong with the first of the ids that cannot be decoded."""
        for token in tokens:
            try:
                if _checked_id(token) not in self._decoder:
                    return KeyError(f"Invalid token for decoding: {token}")
            except (TypeError, OverflowError) as error:
                return error
        raise AssertionError("all of these ids can be decoded")

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes of one token, special or not; they may end inside a character.

        Raises:
            KeyError: if the vocabulary has no such id.
        """
        if (found := self._decoder.get(_checked_id(token))) is None:
            raise KeyError(str(token))
        return found

    def decode_tokens_bytes(self, tokens: Sequence[int]) -> list[bytes]:
        """The bytes of each token.

        Raises:
            KeyError: if the vocabulary has no such id.
        """
        return [self.decode_single_token_bytes(token) for token in _checked_array(tokens)]

    def decode_with_offsets(self, tokens: Sequence[int]) -> tuple[str, list[int]]:
        """Decodes ids into text, and where in it (in characters) each token begins.

        A token that begins inside a character begins where that character does.

        Raises:
            KeyError: if the vocabulary has no such id.
            UnicodeDecodeError: if the bytes are no UTF-8.
        """
        offsets, length = [], 0
        pieces = self.decode_tokens_bytes(tokens)
        for piece in pieces:
            offsets.append(max(0, length - _is_continuation_byte(piece[0])))
            length += sum(not _is_continuation_byte(byte) for byte in piece)
        return b"".join(pieces).decode("utf-8"), offsets

    def decode_batch(
        self, batch: Sequence[Sequence[int]], *, errors: str = "replace", num_threads: int = 8
    ) -> list[str]:
        """Decodes several sequences of ids into texts; `num_threads` changes nothing.

        Raises:
            KeyError: if the vocabulary has no such id.
        """
        return [self.decode(tokens, errors) for tokens in batch]

    def decode_bytes_batch(
        self, batch: Sequence[Sequence[int]], *, num_threads: int = 8
    ) -> list[bytes]:
        """Decodes several sequences of ids into bytes; `num_threads` changes nothing.

        Raises:
            KeyError: if the vocabulary has no such id.
        """
        return [self.decode_bytes(tokens) for tokens in batch]

    # About the vocabulary

    def token_byte_values(self) -> list[bytes]:
        """The bytes of all tokens but the special ones, sorted."""
        return list(self._sorted_tokens)

    @functools.cached_property
    def special_tokens_set(self) -> set[str]:
        """The spellings of the special tokens."""
        return set(self.special_tokens)

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

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

    # Pickling: a named encoding as its name, another with what it was made from.

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
        }
        return _rebuild, (self.name, arguments)


def _rebuild(name: str, arguments: dict[str, Any]) -> Encoding:
    return Encoding(name, **arguments)


def _checked_array(tokens: Any) -> Any:
    """An array of ids, of whichever library, as one of NumPy's; what is no array as it is."""
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
        raise OverflowError(f"the token id {token} is not from 0 to {(1 << 32) - 1}")
    return token


def _is_continuation_byte(byte: int) -> bool:
    """Whether a byte of UTF-8 continues a character that began before it."""
    return 0x80 <= byte < 0xC0
