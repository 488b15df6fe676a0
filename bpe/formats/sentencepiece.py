"""Read SentencePiece vocabularies: `tokenizer.model`, and the same data in GGUF metadata.

The fields are those of `sentencepiece_model.proto`. A `tokenizer.model` contains neither a chat
template nor the settings of special tokens; `from_folder` reads them from the files beside it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bpe.added_tokens import AddedToken
from bpe.charsmap import Charsmap
from bpe.normalizers import SPACE_SYMBOL, SentencePieceNormalizer
from bpe.protobuf import read_fields

if TYPE_CHECKING:
    from bpe.fast_piece_encoder import PieceModel
    from bpe.sentencepiece import SentencePiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of pieces
UNIGRAM, BPE = 1, 2  # types of models


@dataclass(kw_only=True)
class SentencePieceModel:
    """The content of a `tokenizer.model`.

    Attributes:
        pieces: the text of each piece, by id.
        scores: the score of each piece.
        types: the type of each piece: NORMAL, UNKNOWN, ...
        model_type: UNIGRAM or BPE.
        special_ids: the ids of "bos", "eos", "unk" and "pad"; -1 if there is no such token.
        precompiled_charsmap: the replacements of characters, see `Charsmap`; empty for none.
        add_dummy_prefix: whether a space is put before a text.
        remove_extra_whitespaces: whether spaces at both ends, and all but one of repeated spaces,
            are removed.
        treat_whitespace_as_suffix: whether a space belongs to the word before it.
    """

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    model_type: int = UNIGRAM
    special_ids: dict[str, int] = field(
        default_factory=lambda: {"unk": 0, "bos": 1, "eos": 2, "pad": -1}
    )
    precompiled_charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    treat_whitespace_as_suffix: bool = False


_SPECIAL_FIELDS = {40: "unk", 41: "bos", 42: "eos", 43: "pad"}
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


def parse_model(data: bytes, where: str) -> SentencePieceModel:
    """Parse the bytes of a `tokenizer.model`.

    Args:
        data: the content of the file.
        where: the file, for error messages.

    Raises:
        ValueError: if the data is damaged, or has an unsupported setting.
    """
    model = SentencePieceModel()
    try:
        for number, value in read_fields(data):
            if number == 1:
                _parse_piece(_as_bytes(value), model, where)
            elif number == 2:
                _parse_trainer(_as_bytes(value), model, where)
            elif number == 3:
                _parse_normalizer(_as_bytes(value), model, where)
            elif number == 5 and _as_bytes(value):
                for denormalizer_field, charsmap in read_fields(_as_bytes(value)):
                    if denormalizer_field == 2 and charsmap:
                        raise ValueError("a denormalizer_spec with rules is not supported")
    except (ValueError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f"{where} is not a SentencePiece model: {error}") from error
    if not model.pieces:
        raise ValueError(f"{where} is not a SentencePiece model: it has no pieces")
    return model


def _as_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError(f"expected a protobuf message or string, got the integer {value}")
    return value


def _parse_piece(data: bytes, model: SentencePieceModel, where: str) -> None:
    text, score, kind = "", 0.0, NORMAL
    for number, value in read_fields(data):
        if number == 1:
            text = _as_bytes(value).decode()
        elif number == 2:
            (score,) = struct.unpack("<f", _as_bytes(value))
        elif number == 3:
            kind = value if isinstance(value, int) else -1
    model.pieces.append(text)
    model.scores.append(score)
    model.types.append(kind)


def _parse_trainer(data: bytes, model: SentencePieceModel, where: str) -> None:
    for number, value in read_fields(data):
        if number == 3:
            model.model_type = value if isinstance(value, int) else -1
            if model.model_type not in (UNIGRAM, BPE):
                name = _MODEL_TYPES.get(model.model_type, value)
                raise ValueError(
                    f"trainer_spec.model_type is {name!r}; supported values: 'unigram', 'bpe'"
                )
        elif number == 24:
            model.treat_whitespace_as_suffix = bool(value)
        elif number in _SPECIAL_FIELDS and isinstance(value, int):
            # A negative int32 is written as 64 bits.
            model.special_ids[_SPECIAL_FIELDS[number]] = value - (1 << 64) * (value >> 63)


def _parse_normalizer(data: bytes, model: SentencePieceModel, where: str) -> None:
    for number, value in read_fields(data):
        if number == 2:
            model.precompiled_charsmap = _as_bytes(value)
        elif number == 3:
            model.add_dummy_prefix = bool(value)
        elif number == 4:
            model.remove_extra_whitespaces = bool(value)
        elif number == 5 and not value:
            raise ValueError("normalizer_spec.escape_whitespaces is false; only true is supported")


def build_encoding(
    model: SentencePieceModel,
    *,
    name: str,
    where: str,
    prefix_after_tokens: bool,
    raw_user_defined: bool,
    added_tokens: Sequence[AddedToken] = (),
    merges: Sequence[tuple[str, str]] | None = None,
) -> SentencePiece:
    """Build an encoding from the content of a `tokenizer.model`.

    Args:
        model: the vocabulary and its settings.
        name: the name of the encoding in error messages.
        where: the file and key, for error messages.
        prefix_after_tokens: whether the dummy prefix is added also after special tokens, as in
            llama.cpp and in the "legacy" tokenizers of transformers.
        raw_user_defined: whether user-defined pieces are matched before normalization.
        added_tokens: tokens beyond those of the model, or with flags.
        merges: the pairs that can be merged, in order of rank; None: the scores determine the
            order.

    Raises:
        ValueError: if the vocabulary is inconsistent.
    """
    from bpe.sentencepiece import SentencePiece  # loads NumPy

    pieces: dict[str, int] = {}
    special: dict[str, int] = {}
    added = {token.content: token for token in added_tokens}
    unused: set[str] = set()
    byte_ids: dict[int, int] = {}
    for id, (text, kind) in enumerate(zip(model.pieces, model.types, strict=True)):
        if not text:
            raise ValueError(f"{where}: piece {id} is empty")
        if kind == BYTE:
            if (byte := parse_byte_piece(text)) is None or byte in byte_ids:
                raise ValueError(
                    f"{where}: expected a byte such as '<0x0A>', each byte once, for piece {id} of "
                    f"the type BYTE, got {text!r}"
                )
            byte_ids[byte] = id
            continue
        if kind in (CONTROL, UNKNOWN):
            known, value = special, text
        elif kind == USER_DEFINED:
            flags = AddedToken(
                content=text, id=id, special=looks_special(text), normalized=not raw_user_defined
            )
            added.setdefault(text, flags)
            if flags.special:
                special[text] = id
            continue
        elif kind in (NORMAL, UNUSED):
            known, value = pieces, text.replace(SPACE_SYMBOL, " ")
            if kind == UNUSED and (model.model_type == UNIGRAM or len(value) > 1):
                unused.add(value)
        else:
            raise ValueError(f"{where}: piece {id} has the type {kind}; supported values: 1 to 6")
        if known.setdefault(value, id) != id:
            raise ValueError(f"{where}: {text!r} is piece {known[value]} and piece {id}")
    for token in added_tokens:
        if token.special:
            special[token.content] = token.id
            pieces.pop(token.content.replace(SPACE_SYMBOL, " "), None)
    unk_id = model.special_ids["unk"]
    if not 0 <= unk_id < len(model.pieces) or model.types[unk_id] != UNKNOWN:
        unk_id = next((id for id, kind in enumerate(model.types) if kind == UNKNOWN), None)
    if byte_ids and len(byte_ids) != 256:
        byte = next(byte for byte in range(256) if byte not in byte_ids)
        raise ValueError(
            f"{where}: expected a piece for each of the 256 bytes, but there is none for "
            f"0x{byte:02X}"
        )
    if unk_id is None and not byte_ids:
        raise ValueError(f"{where}: expected pieces of the type UNKNOWN or BYTE, got neither")
    bytes_in_order = [byte_ids[byte] for byte in range(256)] if byte_ids else None
    user_defined = tuple(token.content for token in added.values() if token.normalized)
    try:
        charsmap = Charsmap(model.precompiled_charsmap) if model.precompiled_charsmap else None
        return SentencePiece(
            name,
            model=_build_model(model, name, pieces, unused, bytes_in_order, unk_id, merges),
            pieces={piece: id for piece, id in pieces.items() if piece not in unused},
            special_tokens=special,
            added_tokens=added.values(),
            byte_ids=bytes_in_order,
            unk_id=unk_id,
            normalizer=SentencePieceNormalizer(
                charsmap=charsmap,
                kept=user_defined,
                add_dummy_prefix=model.add_dummy_prefix,
                after_tokens=prefix_after_tokens,
                remove_extra_whitespaces=model.remove_extra_whitespaces,
                whitespace_as_suffix=model.treat_whitespace_as_suffix,
            ),
            dummy_prefix=model.add_dummy_prefix and not model.treat_whitespace_as_suffix,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _build_model(
    model: SentencePieceModel,
    name: str,
    pieces: dict[str, int],
    unused: set[str],
    byte_ids: list[int] | None,
    unk_id: int | None,
    merges: Sequence[tuple[str, str]] | None,
) -> PieceModel:
    from bpe.character_bpe import CharacterBpe
    from bpe.unigram import Unigram

    options: dict[str, Any] = {"byte_ids": byte_ids, "unk_id": unk_id}
    if merges is not None:
        pairs = [
            (left.replace(SPACE_SYMBOL, " "), right.replace(SPACE_SYMBOL, " "))
            for left, right in merges
        ]
        return CharacterBpe(name, pieces, merges=pairs, **options)
    if model.model_type == UNIGRAM:
        pieces = {piece: id for piece, id in pieces.items() if piece not in unused}
    scores = {piece: model.scores[id] for piece, id in pieces.items()}
    if bad := [piece for piece, score in scores.items() if not math.isfinite(score)]:
        raise ValueError(
            f"expected a finite number for the score of {bad[0]!r}, got {scores[bad[0]]}"
        )
    if model.model_type == BPE:
        return CharacterBpe(name, pieces, scores=scores, unused=unused, **options)
    if unk_id is None:
        raise ValueError("expected a piece of the type UNKNOWN in a Unigram vocabulary, got none")
    return Unigram(pieces, scores, unk_id=unk_id, byte_ids=byte_ids)


def parse_byte_piece(text: str) -> int | None:
    """Return the byte that a piece such as <0x0A> stands for; None for other pieces."""
    if len(text) != 6 or not text.startswith("<0x") or not text.endswith(">"):
        return None
    try:
        return int(text[3:5], 16)
    except ValueError:
        return None


_SPECIAL_LOOKING = {"<s>", "</s>", "<pad>", "<mask>", "<2mass>", "[@BOS@]", "[INST]", "[/INST]"}
_SPECIAL_LOOKING |= {"<start_of_turn>", "<end_of_turn>"}


def looks_special(token: str) -> bool:
    """Return whether a token looks special although its file does not say so, as in llama.cpp.

    The turns of a conversation depend on such tokens, so user text must not produce them.
    """
    return (
        token in _SPECIAL_LOOKING
        or (token.startswith("<") and token.endswith(">") and any(mark in token for mark in "|｜"))
        or token.startswith("<unused")
    )
