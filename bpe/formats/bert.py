"""Read the WordPiece vocabulary of a BERT model from `tokenizer.json` or `vocab.txt`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bpe.formats.checks import get_one_of, get_required, read_json, short_repr, warn_unknown_keys
from bpe.formats.huggingface import read_added
from bpe.wordpiece import WordPiece


def load_wordpiece(path: str | Path) -> WordPiece:
    """Read the WordPiece vocabulary of a BERT model.

    Args:
        path: a `tokenizer.json`, a `vocab.txt` (one token per line, with ids from 0), or a Hugging
            Face folder with one of them. For a `vocab.txt`, the settings are read from
            `tokenizer_config.json` in the same folder.

    Raises:
        FileNotFoundError: if the file does not exist, or the folder has neither file.
        ValueError: if a file is damaged or has an unsupported setting.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).exists()]
        if not files:
            raise FileNotFoundError(f"{path}: no tokenizer.json or vocab.txt in this folder")
        path = files[0]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".json":
        return _wordpiece_json(path)
    if path.suffix == ".txt":
        return _wordpiece_txt(path)
    raise ValueError(
        f"{path}: expected a tokenizer.json or a vocab.txt, got a file with the suffix "
        f"{path.suffix!r}"
    )


def _wordpiece_txt(path: Path) -> WordPiece:
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    vocab: dict[str, int] = {}
    for id, line in enumerate(lines):
        token = line.removesuffix("\r")
        if not token:
            raise ValueError(f"{path}: expected a token in line {id + 1}, got an empty line")
        if vocab.setdefault(token, id) != id:
            raise ValueError(f"{path}: line {id + 1} repeats {token!r} of line {vocab[token] + 1}")
    config_path = path.with_name("tokenizer_config.json")
    config = read_json(config_path) if config_path.exists() else {}
    where = str(config_path)
    get_one_of(config, "do_basic_tokenize", [None, True], where)
    return _wordpiece(
        vocab,
        str(path),
        lowercase=get_one_of(config, "do_lower_case", [None, True, False], where) is not False,
        strip_accents=get_one_of(config, "strip_accents", [None, True, False], where),
        handle_chinese_chars=get_one_of(
            config, "tokenize_chinese_chars", [None, True, False], where
        )
        is not False,
    )


def _wordpiece_json(path: Path) -> WordPiece:
    spec = read_json(path)
    known_keys = {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer"}
    warn_unknown_keys(spec, known_keys | {"post_processor", "decoder", "model"}, "tokenizer.json")
    model, where = get_required(spec, "model", dict, str(path)), f"{path}: model"
    get_one_of(model, "type", ["WordPiece"], where)
    known_keys = {
        "type",
        "unk_token",
        "continuing_subword_prefix",
        "max_input_chars_per_word",
        "vocab",
    }
    warn_unknown_keys(model, known_keys, "tokenizer.json: model")
    vocab = get_required(model, "vocab", dict, where)
    for token, id in vocab.items():
        if not isinstance(id, int):
            raise ValueError(
                f"{where}: expected an integer for vocab[{token!r}], got {short_repr(id)}"
            )

    normalizer, where = get_required(spec, "normalizer", dict, str(path)), f"{path}: normalizer"
    get_one_of(normalizer, "type", ["BertNormalizer"], where)
    get_one_of(normalizer, "clean_text", [True], where)
    known_keys = {"type", "clean_text", "handle_chinese_chars", "strip_accents", "lowercase"}
    warn_unknown_keys(normalizer, known_keys, "tokenizer.json: normalizer")
    pre_tokenizer = get_required(spec, "pre_tokenizer", dict, str(path))
    get_one_of(pre_tokenizer, "type", ["BertPreTokenizer"], f"{path}: pre_tokenizer")

    special = {}
    for token in read_added(spec, vocab, str(path)):
        for key in ("single_word", "lstrip", "rstrip", "normalized"):
            if getattr(token, key):
                raise ValueError(
                    f"{path}: {key} of {token.content!r} in added_tokens is True; supported: False"
                )
        special[token.content] = token.id
    if missing := special.keys() - vocab.keys():
        raise ValueError(f"{path}: {min(missing)!r} of added_tokens is not in model.vocab")
    cls, sep = _cls_and_sep(spec.get("post_processor"), f"{path}: post_processor")
    return _wordpiece(
        vocab,
        str(path),
        special_tokens=special,
        lowercase=get_required(normalizer, "lowercase", bool, where),
        strip_accents=get_one_of(normalizer, "strip_accents", [None, True, False], where),
        handle_chinese_chars=get_required(normalizer, "handle_chinese_chars", bool, where),
        continuing_subword_prefix=get_required(
            model, "continuing_subword_prefix", str, f"{path}: model"
        ),
        max_input_chars_per_word=get_required(
            model, "max_input_chars_per_word", int, f"{path}: model"
        ),
        unk_token=get_required(model, "unk_token", str, f"{path}: model"),
        cls_token=cls,
        sep_token=sep,
    )


def _wordpiece(vocab: Mapping[str, int], where: str, **options: Any) -> WordPiece:
    try:
        return WordPiece(vocab, **options)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _cls_and_sep(spec: Any, where: str) -> tuple[str, str]:
    """Return the tokens that a post-processor with BERT's templates adds before and after a text.

    Raises:
        ValueError: if `spec` has other templates.
    """
    match spec:
        case {"type": "BertProcessing", "cls": [str(cls), int()], "sep": [str(sep), int()]}:
            return cls, sep
        case {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": str(cls), "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": str(sep), "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": str(cls2), "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": str(sep2), "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
                {"SpecialToken": {"id": str(sep3), "type_id": 1}},
            ],
        } if cls == cls2 and sep == sep2 == sep3:
            return cls, sep
    raise ValueError(
        f"{where}: expected BERT's [CLS] A [SEP] and [CLS] A [SEP] B [SEP], got {short_repr(spec)}"
    )
