"""Encode and decode with the vocabularies of SentencePiece: the class `SentencePiece`.

Kudo and Richardson, "SentencePiece: A simple and language independent subword tokenizer and
detokenizer for neural text processing" (2018). A text is a sequence of characters that includes its
spaces; files write a space as "▁" (U+2581). Encoding has three steps:

1. Added tokens are found in the text (`added_tokens`).
2. The text between them is normalized (`normalizers`): usually, a space is put before it, so that
   a word has the same token at the start of a text as after a space.
3. A model encodes the normalized text: merges (`character_bpe`: Llama 2, Gemma) or the most
   probable path (`unigram`: T5, XLM-R). The text is encoded in segments (`character_pairs`).

Decoding concatenates the tokens, and drops the space that was put before the text. A character that
is not a token is encoded as its bytes, so a token can be a part of a character, as in byte-level
vocabularies.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from bpe.added_tokens import AddedToken, TokenSplitter, token_splitter
from bpe.character_pairs import CharacterPairs
from bpe.encoding import Allowed, Disallowed, Encoding, Position
from bpe.fast_piece_encoder import FastPieceEncoder, PieceModel
from bpe.normalizers import SPACE_SYMBOL, Step

_MAX_CACHED_SEGMENT = 64  # characters; longer segments rarely repeat
_CACHE_ENTRIES = 1 << 15

PreTokenizer = Callable[[str], list[str]]


class SentencePiece(Encoding):
    """A vocabulary of characters, with the interface of `Encoding`.

    The attribute `ranks` maps the ordinary tokens and the bytes to ids, which are not the ranks of
    merges as in a byte-level vocabulary. The attribute `patterns` is empty.

    Attributes:
        model: the model that encodes segments: `CharacterBpe` or `Unigram`.
        unk_id: the id of characters without a token and without bytes, or None.
        normalizer: the steps of the normalization.
        dummy_prefix: whether a space is put before a text, which decoding drops.
    """

    def __init__(
        self,
        name: str,
        *,
        model: PieceModel,
        pieces: Mapping[str, int],
        special_tokens: Mapping[str, int],
        added_tokens: Iterable[AddedToken] = (),
        byte_ids: Sequence[int] | None = None,
        unk_id: int | None = None,
        fuse_unk: bool = True,
        normalizer: Step,
        normalize_added: bool = False,
        pre_tokenizer: PreTokenizer | None = None,
        metaspace: str | None = None,
        split_before_space: bool = False,
        dummy_prefix: bool = False,
    ):
        """Create an encoding.

        Args:
            name: the name of the encoding in error messages.
            model: the model that encodes segments.
            pieces: ordinary token to id; a space is written as a space, not as U+2581.
            special_tokens: text to id of the tokens that ordinary text cannot produce.
            added_tokens: as in `Vocab`.
            byte_ids: the id of each byte, or None.
            unk_id: the id of characters without a token, or None.
            fuse_unk: whether a run of unknown characters becomes one `unk_id`.
            normalizer: the normalizer of the text between added tokens.
            normalize_added: whether `normalizer` also applies to the content of added tokens that
                are matched in normalized text.
            pre_tokenizer: function that splits a normalized text, or None.
            metaspace: when to put a space before a text that does not begin with one: "first": at
                the start of a text, "always": also after an added token, None: never.
            split_before_space: whether to split before every space.
            dummy_prefix: whether decoding drops a space at the start.

        Raises:
            ValueError: if an id is repeated or invalid.
        """
        ranks = {piece.encode(): id for piece, id in pieces.items()}
        byte_tokens = {bytes([byte]): id for byte, id in enumerate(byte_ids or ())}
        only_bytes = {token: id for token, id in byte_tokens.items() if token not in ranks}
        self._set_tokens(name, ranks | only_bytes, special_tokens, added_tokens)
        for token, id in byte_tokens.items():
            if self._decoder.setdefault(id, token) != token:
                raise ValueError(
                    f"encoding {name!r}: the byte {token!r} and the token {self._decoder[id]!r} "
                    f"both have the id {id}"
                )
        for token in self.added_tokens:
            if not token.special:
                self._decoder[token.id] = token.content.replace(SPACE_SYMBOL, " ").encode()
        self.max_token_value = max(self._decoder)
        self.model, self.unk_id = model, unk_id
        self.dummy_prefix = dummy_prefix
        self._fused_id = unk_id if fuse_unk else None
        self.normalizer, self._normalize_added = normalizer, normalize_added
        self._pre_tokenizer, self._metaspace = pre_tokenizer, metaspace
        self._split_before_space = split_before_space
        # The attributes of a byte-level vocabulary.
        self.patterns, self._patterns = (), ()
        self.merges, self.ignore_merges = None, False
        self.normalization, self.dropped_bytes = None, b""
        self.unreachable_tokens = {}

    # Encoding

    def normalize(self, text: str) -> str:
        """Return a whole text, normalized and with its added tokens left out."""
        return "".join(item for item in self._items(text, frozenset()) if isinstance(item, str))

    def _splitter(self, allowed: AbstractSet[str], normalized: bool = False) -> TokenSplitter:
        splitter = super()._splitter(allowed, normalized)
        if not normalized:
            return splitter
        tokens = []
        for token in splitter.tokens:
            content = token.content
            if self._normalize_added:
                content = self.normalizer(content, "start")
            content = content.replace(SPACE_SYMBOL, " ")
            tokens.append(dataclasses.replace(token, content=content))
        return token_splitter(frozenset(tokens))

    def _items(
        self, text: str, allowed: AbstractSet[str], position: Position = "start"
    ) -> list[str | int]:
        items: list[str | int] = []
        for part in self._split_at_tokens(text, allowed):
            if isinstance(part, AddedToken):
                items.append(part.id)
                position = "after token"
                continue
            text = self.normalizer(part, position)
            if SPACE_SYMBOL in text:
                text = text.replace(SPACE_SYMBOL, " ")
            for item in self._split_at_tokens(text, allowed, normalized=True):
                if isinstance(item, AddedToken):
                    items.append(item.id)
                    position = "after token"
                    continue
                if not item.startswith(" ") and (
                    (self._metaspace == "first" and position == "start")
                    or (self._metaspace == "always" and position != "inside")
                ):
                    item = " " + item
                items.append(item)
                position = "inside"
        return items

    def _encode_ordinary(self, text: str) -> list[int]:
        ids: list[int] = []
        for chunk in (text,) if self._pre_tokenizer is None else self._pre_tokenizer(text):
            begin = len(ids)
            for segment in self.segments(chunk):
                ids += self._encode_segment(segment)
            if self._fused_id is not None and self._fused_id in ids[begin:]:
                ids[begin:] = _without_repeats(ids[begin:], self._fused_id)
        return ids

    def _encode_segment(self, segment: str) -> list[int]:
        cache = self._cache
        if (ids := cache.get(segment)) is None:
            ids = self.model.encode(segment)
            if len(segment) <= _MAX_CACHED_SEGMENT:
                if len(cache) >= _CACHE_ENTRIES:
                    cache.clear()
                cache[segment] = ids
        return ids

    def segments(self, chunk: str) -> list[str]:
        """Split a normalized text into the segments that are encoded separately."""
        segments = self.pairs.split(chunk)
        if not self._split_before_space:
            return segments
        return [part for segment in segments for part in _split_before_spaces(segment)]

    @functools.cached_property
    def pairs(self) -> CharacterPairs:
        """The pairs of characters that are adjacent in a token."""
        return CharacterPairs([token for token in self.model.pieces if len(token) > 1])

    @functools.cached_property
    def _fast_encoder(self) -> FastPieceEncoder | None:
        if self._pre_tokenizer is not None:
            return None
        return FastPieceEncoder(
            self.model,
            self.pairs,
            split_before_space=self._split_before_space,
            fused_id=self._fused_id,
        )

    def encode_with_unstable(
        self,
        text: str,
        *,
        allowed_special: Allowed = frozenset(),
        disallowed_special: Disallowed = "all",
    ) -> tuple[list[int], list[list[int]]]:
        """Raise a ValueError: completions are defined for byte-level vocabularies only."""
        raise ValueError(
            f"encode_with_unstable needs a byte-level vocabulary, got {self!r}, a vocabulary of "
            "characters"
        )

    def encode_piece(self, piece: bytes) -> list[int]:
        """Encode a normalized text, given in UTF-8, without adding a space before it."""
        return self._encode_ordinary(piece.decode())

    # Decoding

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """Decode ids to bytes, without the space that encoding puts before a text.

        Raises:
            KeyError: if the vocabulary has no such id.
            TypeError: if an id is not an integer.
            OverflowError: if an id is not between 0 and 2^32 - 1.
        """
        data = super().decode_bytes(tokens)
        return data[1:] if self.dummy_prefix and data.startswith(b" ") else data

    def decode_with_offsets(self, tokens: Sequence[int]) -> tuple[str, list[int]]:
        """Decode ids to text and the character offset of each token; see `Encoding`."""
        text, offsets = super().decode_with_offsets(tokens)
        if self.dummy_prefix and text.startswith(" "):
            return text[1:], [max(0, offset - 1) for offset in offsets]
        return text, offsets

    def __reduce__(self) -> tuple[Any, ...]:
        lazy = ("_cache", "pairs", "_fast_encoder", "_fast_decoder", "_splitters")
        state = {key: value for key, value in self.__dict__.items() if key not in lazy}
        return _restore, (state,)


def _restore(state: dict[str, Any]) -> SentencePiece:
    encoding = SentencePiece.__new__(SentencePiece)
    encoding.__dict__.update(state)
    return encoding


def _split_before_spaces(text: str) -> list[str]:
    first, *rest = text.split(" ")
    return [*([first] if first else []), *(" " + part for part in rest)]


def _without_repeats(ids: list[int], fused_id: int) -> list[int]:
    return [id for i, id in enumerate(ids) if not (i and id == fused_id and ids[i - 1] == fused_id)]
