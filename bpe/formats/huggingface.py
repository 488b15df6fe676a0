"""Read the `tokenizer.json` of Hugging Face and the related files in its folder.

An unsupported step of the pipeline (normalizer, pre-tokenizer, post-processor) is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from bpe import chat_template_files, stop_tokens
from bpe.formats.byte_level import from_byte_level
from bpe.formats.checks import (
    SENTENCEPIECE,
    get_one_of,
    get_required,
    read_json,
    short_repr,
    token_text,
    warn_unknown_keys,
)
from bpe.formats.tokenizer import Tokenizer, build_chat_templates
from bpe.pretokenize import GPT2, SMOLLM


def from_folder(path: str | Path) -> Tokenizer:
    """Read `tokenizer.json`, `tokenizer_config.json` and the chat templates of a model folder.

    Raises:
        FileNotFoundError: if there is no `tokenizer.json`.
        ValueError: if a file is damaged or has an unsupported setting.
    """
    path = Path(path)
    if not (path / "tokenizer.json").exists():
        if _is_sentencepiece_model(path / "tokenizer.model"):
            raise ValueError(f"{path / 'tokenizer.model'}: {SENTENCEPIECE}")
        raise FileNotFoundError(f"{path}: no tokenizer.json in this folder")
    config_path = path / "tokenizer_config.json"
    config = read_json(config_path) if config_path.exists() else {}
    bos = token_text(config.get("bos_token"), f"{config_path}: bos_token")
    eos = token_text(config.get("eos_token"), f"{config_path}: eos_token")
    templates = chat_template_files.read_chat_templates(path, config)
    declared = list(stop_tokens.folder_stop_tokens(path))
    return _from_tokenizer_json(path / "tokenizer.json", path.name, bos, eos, templates, declared)


def from_tokenizer_json(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json` without related files, and so without eos and chat template.

    Raises:
        ValueError: if the file is damaged or has an unsupported setting.
    """
    path = Path(path)
    return _from_tokenizer_json(path, path.stem, None, None, {})


def _from_tokenizer_json(
    path: Path,
    name: str,
    bos: str | None,
    eos: str | None,
    templates: Mapping[str, str],
    declared: Sequence[tuple[str, Any]] = (),
) -> Tokenizer:
    spec = read_json(path)
    # `truncation` and `padding` are defaults for calls; they do not change the ids.
    known_keys = {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer"}
    warn_unknown_keys(spec, known_keys | {"post_processor", "decoder", "model"}, "tokenizer.json")
    model = get_required(spec, "model", dict, str(path))
    where = f"{path}: model"
    if _is_sentencepiece(spec):
        raise ValueError(f"{path}: {SENTENCEPIECE}")
    get_one_of(model, "type", ["BPE"], where)
    get_one_of(model, "dropout", [None, 0, 0.0], where)
    get_one_of(model, "continuing_subword_prefix", [None, ""], where)
    get_one_of(model, "end_of_word_suffix", [None, ""], where)
    get_one_of(model, "byte_fallback", [None, False], where)
    get_one_of(model, "fuse_unk", [None, False], where)
    ignore_merges = get_one_of(model, "ignore_merges", [None, False, True], where)
    known_keys = {"type", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk"}
    known_keys |= {"byte_fallback", "ignore_merges", "unk_token", "vocab", "merges"}
    warn_unknown_keys(model, known_keys, "tokenizer.json: model")
    get_one_of(
        get_required(spec, "decoder", dict, str(path)), "type", ["ByteLevel"], f"{path}: decoder"
    )

    vocab = get_required(model, "vocab", dict, where)
    for token, id in vocab.items():
        if not isinstance(id, int):
            raise ValueError(f"{where}: vocab[{token!r}] is {short_repr(id)}, not an integer")
    merges = [  # strings in old files
        merge.split(" ") if isinstance(merge, str) else merge
        for merge in get_required(model, "merges", list, where)
    ]
    prefix_token = _prefix_token(spec.get("post_processor"), f"{path}: post_processor")
    if prefix_token is not None and bos is not None and prefix_token != bos:
        raise ValueError(f"{path}: post_processor adds {prefix_token!r}, but bos_token is {bos!r}")
    bos = bos or prefix_token
    special = read_added_tokens(spec, vocab, str(path))
    eos_tokens = [text for _, text in declared if isinstance(text, str)]
    for token in (bos, eos, *eos_tokens):
        # A declared token is special, as in transformers, unless it is a byte or part of a merge.
        if token is None or token in special or token not in vocab:
            continue
        if not _is_ordinary(token, merges):
            special[token] = vocab[token]
    encoding = from_byte_level(
        name,
        tokens={token: id for token, id in vocab.items() if token not in special},
        special_tokens=special,
        merges=merges,
        patterns=_split_patterns(spec.get("pre_tokenizer"), f"{path}: pre_tokenizer"),
        ignore_merges=bool(ignore_merges),
        normalization=_normalization(spec.get("normalizer"), f"{path}: normalizer"),
        where=where,
    )
    if encoding.dropped_bytes and model.get("unk_token") is not None:
        raise ValueError(f"{where}: unk_token for missing bytes is not supported")

    if bos is not None and bos not in special:
        raise ValueError(f"{path}: the bos_token {bos!r} is not a special token of the vocabulary")
    if eos is None or eos not in special:  # special_tokens_map.json may declare it
        eos = next((text for text in eos_tokens if text in special), eos)
    declared_ids = stop_tokens.resolve_stop_ids(encoding, declared)
    stop_ids = stop_tokens.well_known_stop_ids(encoding).union(declared_ids)
    template, named = build_chat_templates(templates, bos, eos, encoding, stop_ids)
    return Tokenizer(
        encoding=encoding,
        chat_template=template,
        named_templates=named,
        bos_id=None if bos is None else special[bos],
        # Without a declaration in the tokenizer's files, the first one in the model's files.
        eos_id=special.get(eos or "", next(iter(declared_ids), None)),
        add_bos=prefix_token is not None,
        stop_ids=stop_ids,
    )


def _is_ordinary(token: str, merges: Sequence[Any]) -> bool:
    """Return whether a token is a byte, the result of a merge, or a part of one."""
    return len(token) == 1 or any(
        token in merge or token == "".join(map(str, merge))
        for merge in merges
        if isinstance(merge, list)
    )


def _is_sentencepiece(spec: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer.json comes from SentencePiece: byte fallback, spaces as U+2581."""
    model = spec["model"]
    if model.get("type") == "Unigram" or model.get("byte_fallback") is True:
        return True
    steps = [spec.get("normalizer"), spec.get("pre_tokenizer"), spec.get("decoder")]
    return any('"Metaspace"' in text or "\u2581" in text for text in map(_json_text, steps))


def _json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_sentencepiece_model(path: Path) -> bool:
    """Return whether a file begins like a protocol buffer of SentencePiece."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(1) == b"\n"


def read_added_tokens(
    spec: Mapping[str, Any], vocab: Mapping[str, Any], where: str
) -> dict[str, int]:
    """Return the special tokens of a tokenizer.json, text to id.

    Args:
        spec: the content of the file.
        vocab: `vocab` of the model, token to id.
        where: the file, for error messages.

    Raises:
        ValueError: if a token has an unsupported setting, or ids conflict.
    """
    special: dict[str, int] = {}
    for i, token in enumerate(get_required(spec, "added_tokens", list, where)):
        item = f"{where}: added_tokens[{i}]"
        text, id = get_required(token, "content", str, item), get_required(token, "id", int, item)
        for key in ("single_word", "lstrip", "rstrip"):
            get_one_of(token, key, [None, False], item)
        # The normalizer of BPE is NFC, which does not change ASCII; that of WordPiece may.
        may_change = spec["model"]["type"] != "BPE" or not text.isascii()
        if spec.get("normalizer") is not None and may_change:
            get_one_of(token, "normalized", [None, False], item)
        known_keys = {"content", "id", "special", "single_word", "lstrip", "rstrip", "normalized"}
        warn_unknown_keys(token, known_keys, "tokenizer.json: added_tokens")
        if special.setdefault(text, id) != id:
            raise ValueError(f"{item}: {text!r} has the ids {special[text]} and {id}")
    texts: dict[int, str] = {}
    for text, id in special.items():
        if (vocab_id := vocab.get(text, id)) != id:
            raise ValueError(
                f"{where}: {text!r} is {id} in added_tokens and {vocab_id} in model.vocab"
            )
        # Two tokens with one id, as in o200k_harmony, are valid only if the vocabulary has both.
        if texts.setdefault(id, text) != text and text not in vocab:
            raise ValueError(f"{where}: the tokens {text!r} and {texts[id]!r} have the id {id}")
    return special


def _normalization(spec: Any, where: str) -> Literal["NFC"] | None:
    steps = [] if spec is None else [spec]
    if isinstance(spec, dict) and spec.get("type") == "Sequence":
        steps = get_required(spec, "normalizers", list, where)
    if not steps:
        return None
    if steps == [{"type": "NFC"}]:
        return "NFC"
    raise ValueError(f"{where}: {short_repr(spec)} is not supported; use null or NFC")


def _split_patterns(spec: Any, where: str) -> str | list[str]:
    """Return the split patterns that are equivalent to Hugging Face's pre-tokenizers."""
    steps = [spec]
    if isinstance(spec, dict) and spec.get("type") == "Sequence":
        steps = get_required(spec, "pretokenizers", list, where)
    patterns: list[str] = []
    for i, step in enumerate(steps):
        match step:
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(r"\p{N}")
            case {"type": "Digits", "individual_digits": False}:
                patterns.append(r"\p{N}+")
            case {
                "type": "Split",
                "pattern": {"Regex": str(pattern)},
                "behavior": "Isolated",
                "invert": False,
            }:
                patterns.append(pattern)
            case {"type": "ByteLevel", "add_prefix_space": False}:
                if i != len(steps) - 1:
                    raise ValueError(f"{where}: ByteLevel is not the last step")
                if step.get("use_regex", True):
                    patterns.append(GPT2)
                if patterns == [r"\p{N}", GPT2]:
                    return SMOLLM  # equivalent, in one pass
                return patterns or [r"[\s\S]+"]
            case _:
                raise ValueError(f"{where}: {short_repr(step)} is not supported")
    raise ValueError(f"{where}: the last step must be ByteLevel, not {short_repr(steps[-1:])}")


def _prefix_token(spec: Any, where: str) -> str | None:
    """Return the token that the post-processor adds before a text, or None."""
    token = None
    steps = [spec] if spec is not None else []
    if isinstance(spec, dict) and spec.get("type") == "Sequence":
        steps = get_required(spec, "processors", list, where)
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                pass  # changes offsets only
            case {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]}:
                pass  # adds nothing
            case {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": str(token)}}, {"Sequence": {"id": "A"}}],
            }:
                pass
            case _:
                raise ValueError(f"{where}: {short_repr(step)} is not supported")
    return token
