"""Save a vocabulary of SentencePiece as a `tokenizer.json` of Hugging Face.

A GGUF file or a `tokenizer.model` has scores: of two possible merges, the one that makes the token
of higher score comes first. A `tokenizer.json` lists pairs instead, so each token becomes the pairs
of tokens that make it, in the order of the scores; transformers converts in the same way. Spaces
and the dummy prefix become two steps of the normalizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bpe.character_bpe import CharacterBpe
from bpe.encoding import Encoding
from bpe.normalizers import SPACE_SYMBOL, SentencePieceNormalizer
from bpe.save import added_tokens
from bpe.sentencepiece import SentencePiece


def sentencepiece_spec(encoding: Encoding) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` that is equivalent to an encoding.

    Args:
        encoding: a `SentencePiece` with a BPE model.

    Raises:
        ValueError: if the encoding has a setting that tokenizers does not have.
    """
    assert isinstance(encoding, SentencePiece)
    model, normalizer = encoding.model, encoding.normalizer
    if not isinstance(normalizer, SentencePieceNormalizer):
        raise _cannot(encoding, "it comes from a tokenizer.json; copy that file")
    if not isinstance(model, CharacterBpe):
        raise _cannot(encoding, "it is a Unigram vocabulary")
    _check(encoding, model, normalizer)
    vocab = {_escape(piece): id for piece, id in model.pieces.items()}
    byte_ids = model.byte_ids
    for byte, id in enumerate(byte_ids or ()):
        vocab[f"<0x{byte:02X}>"] = id
    names = {id: text for text, id in encoding.special_tokens.items()}
    prefix = [{"type": "Prepend", "prepend": SPACE_SYMBOL}] if encoding.dummy_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token | {"normalized": False} for token in added_tokens(encoding, vocab)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prefix, _replace(" ", SPACE_SYMBOL)],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                _replace(SPACE_SYMBOL, " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *(strip if encoding.dummy_prefix else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if encoding.unk_id is None else names[encoding.unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": byte_ids is not None,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [[_escape(left), _escape(right)] for left, right in _merges(model)],
        },
    }


def _check(
    encoding: SentencePiece, model: CharacterBpe, normalizer: SentencePieceNormalizer
) -> None:
    """Check that a `tokenizer.json` can represent the settings of an encoding.

    Raises:
        ValueError: if it cannot.
    """
    if normalizer.charsmap is not None:
        raise _cannot(encoding, "tokenizers applies its precompiled_charsmap differently")
    if normalizer.remove_extra_whitespaces or normalizer.whitespace_as_suffix:
        raise _cannot(encoding, "it removes spaces, or puts them after words")
    if normalizer.add_dummy_prefix and not normalizer.after_tokens:
        raise _cannot(encoding, "it puts a space before the first text only, not after a token")
    if any(piece.encode() not in encoding.ranks for piece in model.pieces):
        raise _cannot(encoding, "it has unused tokens, which are split again after merging")
    for token in encoding.added_tokens:  # saved as matched in raw text, which differs for spaces
        if token.normalized and SPACE_SYMBOL in token.content.replace(" ", SPACE_SYMBOL):
            raise _cannot(encoding, f"the token {token.content!r} is matched in normalized text")


def _cannot(encoding: Encoding, reason: str) -> ValueError:
    return ValueError(
        f"{encoding!r} cannot be saved as a tokenizer.json: {reason}; copy the files that it was "
        "read from"
    )


def _escape(piece: str) -> str:
    return piece.replace(" ", SPACE_SYMBOL)


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _merges(model: CharacterBpe) -> Iterator[tuple[str, str]]:
    """Yield the pairs of tokens that the model merges, in order of rank."""
    pieces = model.pieces
    if model.vocab.merges is None:
        # Of equal scores (the runs of spaces in Llama), SentencePiece takes the leftmost pair. With
        # the longer token first, a run grows from the left here too.
        for token in sorted(pieces, key=lambda p: (model.vocab.rank(p.encode(), b""), -len(p))):
            splits = ((token[:i], token[i:]) for i in range(len(token) - 1, 0, -1))
            yield from (pair for pair in splits if pair[0] in pieces and pair[1] in pieces)
        return
    for left, right in model.vocab.merges:
        if len(right) > 1 or right.isascii():  # not a byte that completes a character
            yield left.decode(), right.decode()
