"""Reading a vocabulary from the metadata of a GGUF file, after llama.cpp's `llama-vocab.cpp`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from bpe import stop_tokens
from bpe.formats.byte_level import from_byte_level
from bpe.formats.checks import SENTENCEPIECE, get_array, get_one_of, to_text, warn_unknown_keys
from bpe.formats.tokenizer import Tokenizer, build_chat_templates
from bpe.pretokenize import GPT2, LLAMA3, O200K, QWEN2, SMOLLM

# tokenizer.ggml.pre -> pattern, ignore_merges, normalization, and whether a text begins with bos
# unless the file says otherwise. The groups are those of llama.cpp (`llama-vocab.cpp`), of which
# left out are those that add a separator or belong to vocabularies with tokens of white space. A
# GGUF file does not say that Qwen2 normalizes (llama.cpp does not); Hugging Face's tokenizer, with
# which the model was trained, does.
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


# What tokenizer.ggml.* may say beside the vocabulary: keys that change the ids of a text where they
# have another value, and keys that do not change them.
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


_MODELS = {  # of tokenizer.ggml.model, but for gpt2
    "bert": "a WordPiece vocabulary, which only encoders have",
    "rwkv": "a vocabulary of RWKV",
    "no_vocab": "no vocabulary",
    "none": "no vocabulary",
}


_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type


def from_gguf(metadata: Mapping[str, Any], *, source: str = "GGUF metadata") -> Tokenizer:
    """Makes a tokenizer from the metadata of a GGUF file.

    Control and user-defined tokens are special tokens. Tokens marked as unused (Qwen2 fills its
    vocabulary up to a round number) have no text: the encoding does not know their ids.

    Args:
        metadata: all key-value pairs of the file; texts may be `str` or UTF-8 `bytes`.
        source: what error messages call the file.

    Raises:
        ValueError: if a key is missing, unknown, or says what we do not know.
    """
    meta = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    ggml = "tokenizer.ggml."
    model = to_text(meta.get(ggml + "model"))
    if model in ("llama", "t5", "gemma4"):
        raise ValueError(f"{source}: {ggml}model is {model!r}: {SENTENCEPIECE}")
    if model != "gpt2":
        what = _MODELS.get(model, "of an unknown kind")
        raise ValueError(
            f"{source}: {ggml}model is {model!r}, {what}; byte-level BPE ('gpt2') can be read"
        )
    pre = to_text(meta.get(ggml + "pre"))
    get_one_of({ggml + "pre": pre}, ggml + "pre", list(_PRE), source)
    pattern, ignore_merges, normalization, add_bos = _PRE[pre]
    for key, values in _NEUTRAL.items():
        get_one_of(meta, ggml + key, values, source)
    known = {ggml + key for key in _READ_KEYS | _UNUSED_KEYS | _NEUTRAL.keys()}
    known.add("tokenizer.huggingface.json")  # the tokenizer.json that the rest was made from
    warn_unknown_keys(
        {
            key: value
            for key, value in meta.items()
            if not key.startswith("tokenizer.chat_template") and not key.endswith("_token_id")
        },
        known,
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
    for id, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == _UNUSED:
            continue
        if kind not in (_NORMAL, _CONTROL, _USER_DEFINED):
            raise ValueError(f"{source}: {ggml}token_type[{id}] is {kind}; 1, 3, 4 and 5 are known")
        table = ordinary if kind == _NORMAL else special
        if table.setdefault(token, id) != id:
            raise ValueError(f"{source}: {ggml}tokens has {token!r} at {table[token]} and at {id}")

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
                return None  # noted with the other tokens that end a generation
            raise ValueError(f"{source}: {ggml}{name}_token_id is {id}, of {len(tokens)} tokens")
        return None if id is None else int(id)

    bos_id, eos_id = token_id("bos"), token_id("eos")
    if (declared := meta.get(ggml + "add_bos_token")) is not None:
        add_bos = bool(declared)
    if add_bos and bos_id is None:
        raise ValueError(f"{source}: {ggml}add_bos_token is set, but {ggml}bos_token_id is missing")
    declared = stop_tokens.gguf_stop_tokens(meta, source)
    stop_ids = stop_tokens.well_known_stop_ids(encoding).union(
        stop_tokens.resolve_stop_ids(encoding, declared)
    )
    first = "tokenizer.chat_template"
    template, named = build_chat_templates(
        {
            key.removeprefix(first).removeprefix(".") or "default": to_text(value)
            for key, value in meta.items()
            if key == first or key.startswith(f"{first}.")
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
    try:
        import gguf  # some 0.2 s, and then seconds for a large vocabulary
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: GGUF files are read by the package gguf, but {error}; pip install gguf",
            name=error.name,
        ) from None

    try:
        reader = gguf.GGUFReader(path)
        return {
            key: field.contents()
            for key, field in reader.fields.items()
            if key.startswith(("tokenizer.", "general.name"))
        }
    except Exception as error:  # of a damaged file, the library raises what it stumbles over
        raise ValueError(f"{path}: not a readable GGUF file: {error}") from error
