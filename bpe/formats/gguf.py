"""Read a vocabulary from the metadata of a GGUF file, as llama.cpp does (`llama-vocab.cpp`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from bpe import stop_tokens
from bpe.formats.byte_level import from_byte_level
from bpe.formats.checks import SENTENCEPIECE, get_array, get_one_of, to_text, warn_unknown_keys
from bpe.formats.tokenizer import Tokenizer, build_chat_templates
from bpe.pretokenize import GPT2, LLAMA3, O200K, QWEN2, SMOLLM

# tokenizer.ggml.pre -> pattern, ignore_merges, normalization, and the default of add_bos_token. The
# groups are those of llama.cpp (`llama-vocab.cpp`), without groups that add a separator or have
# tokens of whitespace. The normalization of Qwen2 is not in GGUF files, and llama.cpp does not
# apply it; Hugging Face's tokenizer does, with which the model was trained.
_Pre = tuple[str, bool, Literal["NFC"] | None, bool]


_PRE_GROUPS: dict[str, _Pre] = {
    "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 jais trillion granite-docling"
    " jina-es jina-de jina-v2-es jina-v2-de": (GPT2, False, None, False),
    "smollm starcoder refact codeshell exaone minerva-7b mellum2":
        (SMOLLM, False, None, False),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": (LLAMA3, True, None, True),
    "dbrx smaug-bpe chatglm-bpe": (LLAMA3, False, None, False),
    "glm4 glm5": (LLAMA3, True, None, False),
    "qwen2 deepseek-r1-qwen": (QWEN2, False, "NFC", False),
    "megrez kormo stablelm2 hunyuan solar-open grok-2": (QWEN2, False, None, False),
    "gpt-4o llama4 kanana2 talkie minimax-m2": (O200K, False, None, False),
}  # fmt: skip


_PRE = {name: rule for names, rule in _PRE_GROUPS.items() for name in names.split()}


# The keys of tokenizer.ggml.* that change the ids unless they have one of these values. The keys in
# _UNUSED_KEYS do not change the ids.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_eos_token": (None, False),
    "add_sep_token": (None, False),
    "add_space_prefix": (None, False),
    "remove_extra_whitespaces": (None, False),
    "precompiled_charsmap": (None, []),
    "normalizer.lowercase": (None, False),
    "normalizer.strip_accents": (None, False),
}


_READ_KEYS = {"model", "pre", "tokens", "token_type", "merges", "add_bos_token"}


_UNUSED_KEYS = {"scores", "token_type_count"}


_MODELS = {  # values of tokenizer.ggml.model other than gpt2
    "bert": "a WordPiece vocabulary of an encoder model",
    "rwkv": "a vocabulary of RWKV",
    "no_vocab": "no vocabulary",
    "none": "no vocabulary",
}


_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type


def from_gguf(metadata: Mapping[str, Any], *, source: str = "GGUF metadata") -> Tokenizer:
    """Create a tokenizer from the metadata of a GGUF file.

    Control and user-defined tokens become special tokens. Tokens marked as unused (Qwen2 pads its
    vocabulary to a round number) are left out of the encoding.

    Args:
        metadata: all key-value pairs of the file; strings may be `str` or UTF-8 `bytes`.
        source: the name of the file in error messages.

    Raises:
        ValueError: if a key is missing, or has an invalid or unsupported value.
    """
    meta = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    ggml = "tokenizer.ggml."
    model = to_text(meta.get(ggml + "model"))
    if model in ("llama", "t5", "gemma4"):
        raise ValueError(f"{source}: {ggml}model is {model!r}: {SENTENCEPIECE}")
    if model != "gpt2":
        kind = _MODELS.get(model, "an unknown kind of vocabulary")
        raise ValueError(
            f"{source}: {ggml}model is {model!r}, {kind}; only byte-level BPE ('gpt2') is supported"
        )
    pre = to_text(meta.get(ggml + "pre"))
    get_one_of({ggml + "pre": pre}, ggml + "pre", list(_PRE), source)
    pattern, ignore_merges, normalization, add_bos = _PRE[pre]
    for key, values in _NEUTRAL.items():
        get_one_of(meta, ggml + key, values, source)
    known_keys = {ggml + key for key in _READ_KEYS | _UNUSED_KEYS | _NEUTRAL.keys()}
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

    tokens = [to_text(token) for token in get_array(meta, ggml + "tokens", source)]
    types = [int(t) for t in get_array(meta, ggml + "token_type", source)]
    if len(tokens) != len(types):
        raise ValueError(
            f"{source}: {ggml}tokens has {len(tokens)} items, {ggml}token_type {len(types)}"
        )
    ordinary: dict[str, int] = {}
    special: dict[str, int] = {}
    for id, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        if token_type == _UNUSED:
            continue
        if token_type not in (_NORMAL, _CONTROL, _USER_DEFINED):
            raise ValueError(
                f"{source}: {ggml}token_type[{id}] is {token_type}; supported values: 1, 3, 4, 5"
            )
        vocab = ordinary if token_type == _NORMAL else special
        if vocab.setdefault(token, id) != id:
            raise ValueError(f"{source}: {ggml}tokens has {token!r} at {vocab[token]} and at {id}")

    encoding = from_byte_level(
        to_text(metadata.get("general.name")) or pre,
        tokens=ordinary,
        special_tokens=special,
        merges=[to_text(merge).split(" ") for merge in get_array(meta, ggml + "merges", source)],
        patterns=pattern,
        ignore_merges=ignore_merges,
        normalization=normalization,
        where=f"{source}: {ggml}tokens",
    )

    def token_id(name: str) -> int | None:
        id = meta.get(f"{ggml}{name}_token_id")
        if id is not None and not 0 <= int(id) < len(tokens):
            if name == "eos":
                return None  # logged with the other stop tokens
            raise ValueError(
                f"{source}: {ggml}{name}_token_id is {id}, but there are {len(tokens)} tokens"
            )
        return None if id is None else int(id)

    bos_id, eos_id = token_id("bos"), token_id("eos")
    if (add_bos_token := meta.get(ggml + "add_bos_token")) is not None:
        add_bos = bool(add_bos_token)
    if add_bos and bos_id is None:
        raise ValueError(f"{source}: {ggml}add_bos_token is set, but {ggml}bos_token_id is missing")
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
        stop_ids=stop_ids,
    )


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a GGUF file that concerns its tokenizer.

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
            if key.startswith(("tokenizer.", "general.name"))
        }
    except Exception as error:  # for a damaged file, the library raises errors of any type
        raise ValueError(f"{path} is not a readable GGUF file: {error}") from error
