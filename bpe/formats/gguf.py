"""Read a vocabulary from the metadata of a GGUF file, as llama.cpp does (`llama-vocab.cpp`).

`tokenizer.ggml.model` names the algorithm: "gpt2" is byte-level BPE, "llama" is BPE of characters
with scores (SentencePiece), "gemma4" is BPE of characters with a list of merges, and "t5" is
Unigram.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bpe import stop_tokens
from bpe.added_tokens import AddedToken
from bpe.encoding import Encoding
from bpe.formats.byte_level import from_byte_level, is_plain_text
from bpe.formats.checks import (
    get_array,
    get_id,
    get_numbers,
    get_one_of,
    to_text,
    warn_unknown_keys,
)
from bpe.formats.gguf_patterns import PRE_TOKENIZERS
from bpe.formats.sentencepiece import (
    BPE,
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
    build_encoding,
)
from bpe.formats.tokenizer import Tokenizer, build_chat_templates
from bpe.log_once import warn_once

log = logging.getLogger(__name__)

_GGML = "tokenizer.ggml."

_MODELS = {  # values of tokenizer.ggml.model that are not supported
    "bert": "a WordPiece vocabulary of an encoder model",
    "rwkv": "a vocabulary of RWKV",
    "plamo2": "a vocabulary of PLaMo 2",
    "hybriddna": "a vocabulary of text and DNA",
    "whitespace": "a vocabulary that drops all whitespace",
    "no_vocab": "no vocabulary",
    "none": "no vocabulary",
}

# Keys of tokenizer.ggml.* that change the ids, with the values that have no effect. Other values
# are supported only for an algorithm with the key in `_Kind.settings`.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_eos_token": (None, False),
    "add_sep_token": (None, False),
    "add_space_prefix": (None, False),
    "remove_extra_whitespaces": (None, False),
    "precompiled_charsmap": (None, []),
    "normalizer.lowercase": (None, False),
    "normalizer.strip_accents": (None, False),
}
_READ_KEYS = {"model", "pre", "tokens", "token_type", "merges", "scores", "add_bos_token"}
_UNUSED_KEYS = {"token_type_count"}


Flags = Mapping[int, Mapping[str, bool]]  # id of an added token to its flags, as in AddedToken


class _Kind(NamedTuple):
    """How to read the vocabularies that have one value of `tokenizer.ggml.model`, such as "llama".

    Attributes:
        read: function (metadata, tokens, token types, flags of tokens by id, name of the encoding,
            name of the file) -> (encoding, default of `add_bos_token`).
        settings: the keys of `_NEUTRAL` that `read` supports.
        add_eos: the default of `add_eos_token`.
    """

    read: Callable[
        [Mapping[str, Any], list[str], list[int], Flags, str, str], tuple[Encoding, bool]
    ]
    settings: frozenset[str] = frozenset()
    add_eos: bool = False


def from_gguf(metadata: Mapping[str, Any], *, source: str = "GGUF metadata") -> Tokenizer:
    """Create a tokenizer from the metadata of a GGUF file.

    Control tokens become special tokens, and user-defined tokens too unless they are plain text.
    Tokens marked as unused (Qwen2 pads its vocabulary to a round number) are left out of the
    encoding.

    Args:
        metadata: all key-value pairs of the file; strings may be `str` or UTF-8 `bytes`.
        source: the name of the file in error messages.

    Raises:
        ValueError: if a key is missing, or has an invalid or unsupported value.
    """
    meta = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    model = to_text(meta.get(_GGML + "model"))
    kind = _KINDS.get(model)
    if kind is None:
        kind_name = _MODELS.get(model, "an unknown algorithm")
        raise ValueError(
            f"{source}: {_GGML}model is {model!r}, {kind_name}; supported values: "
            + ", ".join(map(repr, _KINDS))
        )
    _check_keys(meta, kind, source)
    tokens = [
        to_text(token) or f"[EMPTY_{id}]"  # as llama.cpp names an empty token
        for id, token in enumerate(get_array(meta, _GGML + "tokens", source))
    ]
    types = [int(type) for type in get_numbers(meta, _GGML + "token_type", source)]
    if len(tokens) != len(types):
        raise ValueError(
            f"{source}: expected one item of {_GGML}token_type for each token, got {len(types)} "
            f"for {len(tokens)} items of {_GGML}tokens"
        )
    name = to_text(metadata.get("general.name"))
    flags = _added_token_flags(metadata, tokens, types)
    encoding, add_bos = kind.read(meta, tokens, types, flags, name, source)

    def token_id(name: str) -> int | None:
        id = get_id(meta, f"{_GGML}{name}_token_id", source)
        if id is not None and not 0 <= id < len(tokens):
            if name == "eos":
                return None  # logged with the other stop tokens
            raise ValueError(
                f"{source}: {_GGML}{name}_token_id is {id}, but there are {len(tokens)} tokens"
            )
        return id

    bos_id, eos_id = token_id("bos"), token_id("eos")
    if (add_bos_token := meta.get(_GGML + "add_bos_token")) is not None:
        add_bos = bool(add_bos_token)
    if add_bos and bos_id is None:
        raise ValueError(
            f"{source}: {_GGML}add_bos_token is set, but {_GGML}bos_token_id is missing"
        )
    declared = stop_tokens.gguf_stop_tokens(meta, source)
    stop_ids = stop_tokens.well_known_stop_ids(encoding).union(
        stop_tokens.resolve_stop_ids(encoding, declared)
    )
    prefix = "tokenizer.chat_template"
    template, named = build_chat_templates(
        {
            key.removeprefix(prefix).removeprefix(".") or "default": to_text(value)
            for key, value in meta.items()
            if key == prefix or key.startswith(f"{prefix}.")
        },
        None if bos_id is None else tokens[bos_id],
        None if eos_id is None else tokens[eos_id],
        encoding,
        stop_ids,
    )
    return Tokenizer(
        encoding=encoding,
        chat_template=template,
        named_templates=named,
        bos_id=bos_id,
        eos_id=eos_id,
        add_bos=add_bos,
        add_eos=bool(meta.get(_GGML + "add_eos_token", kind.add_eos)),
        stop_ids=stop_ids,
    )


def _check_keys(meta: Mapping[str, Any], kind: _Kind, source: str) -> None:
    """Reject settings that `kind` does not support, and log unknown keys."""
    for key, values in _NEUTRAL.items():
        if key not in kind.settings:
            get_one_of(meta, _GGML + key, values, source)
    known_keys = {_GGML + key for key in _READ_KEYS | _UNUSED_KEYS | _NEUTRAL.keys()}
    known_keys.add("tokenizer.huggingface.json")  # the original tokenizer.json
    warn_unknown_keys(
        {
            key: value
            for key, value in meta.items()
            if not key.startswith("tokenizer.chat_template") and not key.endswith("_token_id")
        },
        known_keys,
        "GGUF metadata",
    )


def _added_token_flags(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> Flags:
    """Return the flags (such as `rstrip`) of the added tokens of a model, by token id.

    GGUF files have no key for these flags; as in llama.cpp, the name or type of the model
    determines them. Without the flags, a prompt of Phi-3 would have a newline after each role that
    the model was trained without.
    """
    name = to_text(metadata.get("general.name")).lower()
    if "phi-3" in name or "phi3" in name:
        kept = {"<unk>", "<s>", "<|endoftext|>"}
        return {
            id: {"rstrip": True}
            for id, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if token not in kept and (kind in (CONTROL, USER_DEFINED) or token == "</s>")
        }
    pre = to_text(metadata.get(_GGML + "pre"))
    architecture = to_text(metadata.get("general.architecture"))
    if pre.startswith(("jina-v2-de", "jina-v2-es", "jina-v2-code")) or architecture in (
        "nomic-bert-moe",
        "jina-bert-v3",
    ):
        mask = "<mask>"
    elif "modern-bert" in name:
        mask = "[MASK]"
    else:
        return {}
    return {id: {"lstrip": True} for id, token in enumerate(tokens) if token == mask}


def _read_byte_level(
    meta: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    flags: Flags,
    name: str,
    source: str,
) -> tuple[Encoding, bool]:
    pre = to_text(meta.get(_GGML + "pre"))
    if pre in _CHARACTER_PRES:
        return _read_gemma4(meta, tokens, types, flags, name, source)
    if not pre:
        warn_once(
            log,
            f"{source}: {_GGML}pre is missing, so the split pattern is unknown; using llama.cpp's "
            "default, with which the model may give worse answers. Convert the model again",
        )
        pre = "default"
    get_one_of({_GGML + "pre": pre}, _GGML + "pre", list(PRE_TOKENIZERS), source)
    patterns, ignore_merges, normalization, add_bos = PRE_TOKENIZERS[pre]
    ordinary: dict[str, int] = {}
    special: dict[str, int] = {}
    added: list[AddedToken] = []
    for id, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        if token_type == UNUSED:
            continue
        if token_type not in (NORMAL, CONTROL, USER_DEFINED):
            raise ValueError(
                f"{source}: {_GGML}token_type[{id}] is {token_type}; supported values: 1, 3, 4, 5"
            )
        is_text = token_type == USER_DEFINED and is_plain_text(token)
        if is_text or id in flags:
            added.append(AddedToken(content=token, id=id, special=not is_text, **flags.get(id, {})))
        if is_text:
            continue
        vocab = ordinary if token_type == NORMAL else special
        if vocab.setdefault(token, id) != id:
            raise ValueError(f"{source}: {_GGML}tokens has {token!r} at {vocab[token]} and at {id}")
    encoding = from_byte_level(
        name or pre,
        tokens=ordinary,
        special_tokens=special,
        added_tokens=added,
        merges=[to_text(merge).split(" ") for merge in get_array(meta, _GGML + "merges", source)],
        patterns=patterns,
        ignore_merges=ignore_merges,
        normalization=normalization,
        where=f"{source}: {_GGML}tokens",
    )
    return encoding, add_bos


def _read_sentencepiece(
    meta: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    flags: Flags,
    name: str,
    source: str,
    *,
    model_type: int,
) -> tuple[Encoding, bool]:
    """Return the encoding of a SentencePiece vocabulary with scores, and whether to add BOS.

    The default of `add_space_prefix` is that of llama.cpp.
    """
    scores = [float(score) for score in get_numbers(meta, _GGML + "scores", source)]
    if len(scores) != len(tokens):
        raise ValueError(
            f"{source}: expected one item of {_GGML}scores for each token, got {len(scores)} for "
            f"{len(tokens)} items of {_GGML}tokens"
        )
    unk_id = get_id(meta, _GGML + "unknown_token_id", source)
    add_space = meta.get(_GGML + "add_space_prefix", model_type == BPE)
    charsmap_key = _GGML + "precompiled_charsmap"
    has_charsmap = meta.get(charsmap_key) is not None
    charsmap = get_numbers(meta, charsmap_key, source) if has_charsmap else []
    model = SentencePieceModel(
        pieces=tokens,
        scores=scores,
        types=types,
        model_type=model_type,
        special_ids={"unk": -1 if unk_id is None else unk_id},
        precompiled_charsmap=bytes(int(value) & 0xFF for value in charsmap),  # int8 or uint8
        add_dummy_prefix=bool(add_space),
        remove_extra_whitespaces=bool(meta.get(_GGML + "remove_extra_whitespaces", False)),
    )
    return _build_sentencepiece(model, flags, name, source), model_type == BPE


# Values of tokenizer.ggml.pre with which byte-level BPE ("gpt2") has merges of characters instead.
_CHARACTER_PRES = ("gemma4", "granite-embed-multi-311m", "sarvam-moe")


def _read_gemma4(
    meta: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    flags: Flags,
    name: str,
    source: str,
) -> tuple[Encoding, bool]:
    merges: list[tuple[str, str]] = []
    for i, merge in enumerate(map(to_text, get_array(meta, _GGML + "merges", source))):
        left, separator, right = merge.partition(" ")
        if not separator:
            raise ValueError(
                f"{source}: expected two tokens and a space for {_GGML}merges[{i}], got {merge!r}"
            )
        merges.append((left, right))
    unk_id = get_id(meta, _GGML + "unknown_token_id", source)
    model = SentencePieceModel(
        pieces=tokens,
        scores=[0.0] * len(tokens),
        types=types,
        model_type=BPE,
        special_ids={"unk": -1 if unk_id is None else unk_id},
        add_dummy_prefix=bool(meta.get(_GGML + "add_space_prefix", False)),
        remove_extra_whitespaces=False,
    )
    add_bos = to_text(meta.get(_GGML + "pre")) != "sarvam-moe"
    return _build_sentencepiece(model, flags, name, source, merges), add_bos


def _build_sentencepiece(
    model: SentencePieceModel,
    flags: Flags,
    name: str,
    source: str,
    merges: Sequence[tuple[str, str]] | None = None,
) -> Encoding:
    """Build an encoding with llama.cpp's handling of added tokens."""
    return build_encoding(
        model,
        name=name or source,
        where=f"{source}: {_GGML}tokens",
        prefix_after_tokens=True,
        raw_user_defined=True,
        added_tokens=[
            AddedToken(content=model.pieces[id], id=id, **values) for id, values in flags.items()
        ],
        merges=merges,
    )


_KINDS = {
    "gpt2": _Kind(_read_byte_level, frozenset({"add_eos_token", "add_sep_token"})),
    "llama": _Kind(
        functools.partial(_read_sentencepiece, model_type=BPE),
        frozenset({"add_eos_token", "add_space_prefix", "remove_extra_whitespaces"}),
    ),
    "gemma4": _Kind(_read_gemma4, frozenset({"add_space_prefix"})),
    "t5": _Kind(
        functools.partial(_read_sentencepiece, model_type=UNIGRAM),
        frozenset(_NEUTRAL),
        add_eos=True,
    ),
}


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """Return the keys `tokenizer.*` and `general.name*` of a GGUF file, with their values.

    Raises:
        ModuleNotFoundError: if the package gguf is not installed.
        ValueError: if the file is damaged.
    """
    try:
        import gguf  # takes about 0.2 s, and reading a large vocabulary takes seconds
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: reading GGUF files needs the package gguf, but {error}; pip install gguf",
            name=error.name,
        ) from None

    try:
        reader = gguf.GGUFReader(path)
        return {
            key: field.contents()
            for key, field in reader.fields.items()
            if key.startswith(("tokenizer.", "general.name", "general.architecture"))
        }
    except Exception as error:  # for a damaged file, the library raises errors of any type
        raise ValueError(f"{path} is not a readable GGUF file: {error}") from error
