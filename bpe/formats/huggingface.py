"""Read the `tokenizer.json` of Hugging Face and the related files in its folder.

An unsupported step of the pipeline (normalizer, pre-tokenizer, post-processor) is an error.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpe import chat_template_files, normalizers, stop_tokens
from bpe.added_tokens import AddedToken
from bpe.encoding import Encoding
from bpe.formats import pipeline
from bpe.formats.byte_level import from_byte_level, is_plain_text
from bpe.formats.checks import (
    get_one_of,
    get_required,
    read_json,
    short_repr,
    token_text,
    warn_unknown_keys,
)
from bpe.formats.post_processor import read_post_processor
from bpe.formats.sentencepiece import (
    BPE,
    build_encoding,
    looks_special,
    parse_byte_piece,
    parse_model,
)
from bpe.formats.tokenizer import Tokenizer, build_chat_templates
from bpe.normalizers import SPACE_SYMBOL
from bpe.pretokenize import GPT2, QWEN2

if TYPE_CHECKING:
    from bpe.fast_piece_encoder import PieceModel
    from bpe.sentencepiece import SentencePiece


def from_folder(path: str | Path) -> Tokenizer:
    """Read the tokenizer and the chat templates of a model folder.

    The tokenizer is a `tokenizer.json`, a `tokenizer.model`, or a `vocab.json` with a `merges.txt`,
    as in GPT-2; `tokenizer_config.json` in the same folder has additional settings.

    Raises:
        FileNotFoundError: if the folder has none of these files.
        ValueError: if a file is damaged or has an unsupported setting.
    """
    path = Path(path)
    config_path = path / "tokenizer_config.json"
    config = read_json(config_path) if config_path.exists() else {}
    bos = token_text(config.get("bos_token"), f"{config_path}: bos_token")
    eos = token_text(config.get("eos_token"), f"{config_path}: eos_token")
    templates = chat_template_files.read_chat_templates(path, config)
    declared = list(stop_tokens.folder_stop_tokens(path))
    if not (path / "tokenizer.json").exists():
        if (path / "tokenizer.model").exists():
            return _from_tokenizer_model(
                path / "tokenizer.model", path.name, config, bos, eos, templates, declared
            )
        if (path / "vocab.json").exists() and (path / "merges.txt").exists():
            spec = _spec_of_gpt2_files(path, config, str(config_path))
            return _from_tokenizer_json(
                path / "vocab.json", path.name, bos, eos, templates, declared, spec
            )
        raise FileNotFoundError(
            f"{path}: expected a tokenizer.json, a tokenizer.model, or a vocab.json with a "
            "merges.txt in this folder, got none of these"
        )
    return _from_tokenizer_json(path / "tokenizer.json", path.name, bos, eos, templates, declared)


# tokenizer_class in tokenizer_config.json -> the split pattern, and the normalizer.
_GPT2_CLASSES: dict[str | None, tuple[str, str | None]] = {
    None: (GPT2, None),
    "GPT2Tokenizer": (GPT2, None),
    "RobertaTokenizer": (GPT2, None),
    "CodeGenTokenizer": (GPT2, None),
    "Qwen2Tokenizer": (QWEN2, "NFC"),
}


def _spec_of_gpt2_files(path: Path, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the tokenizer.json that is equivalent to the vocab.json and merges.txt of a folder."""
    vocab, merges_path = read_json(path / "vocab.json"), path / "merges.txt"
    kind = config.get("tokenizer_class")
    kind = kind.removesuffix("Fast") if isinstance(kind, str) else kind
    get_one_of({"tokenizer_class": kind}, "tokenizer_class", list(_GPT2_CLASSES), where)
    get_one_of(config, "add_prefix_space", [None, False], where)
    pattern, normalization = _GPT2_CLASSES[kind]
    try:
        lines = merges_path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{merges_path} is not UTF-8: {error}") from error
    merges: list[list[str]] = []
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        if len(parts := line.split(" ")) != 2:
            raise ValueError(
                f"{merges_path}: expected two tokens in line {number}, got {short_repr(line)}"
            )
        merges.append(parts)
    names = [config.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad", "cls", "sep")]
    added = {
        text: AddedToken(content=text, id=vocab[text])
        for name in [*names, "<|endoftext|>"]
        if (text := token_text(name, where)) is not None and text in vocab
    }
    added |= {token.content: token for token in _config_added_tokens(config, where)}
    around = None
    if kind == "RobertaTokenizer":
        cls, sep = (token_text(config.get(key, text), where) for key, text in _ROBERTA)
        around = {"type": "RobertaProcessing", "cls": [cls, 0], "sep": [sep, 0]}
    return {
        "added_tokens": [dataclasses.asdict(token) for token in added.values()],
        "normalizer": normalization and {"type": normalization},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        },
        "post_processor": around,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


_ROBERTA = (("cls_token", "<s>"), ("sep_token", "</s>"))


def from_tokenizer_json(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json` without related files: the result has no eos and no chat template.

    Raises:
        ValueError: if the file is damaged or has an unsupported setting.
    """
    path = Path(path)
    return _from_tokenizer_json(path, path.stem, None, None, {})


def from_tokenizer_model(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.model` of SentencePiece without related files: it has no chat template.

    Raises:
        ValueError: if the file is damaged or has an unsupported setting.
    """
    path = Path(path)
    return _from_tokenizer_model(path, path.stem, {}, None, None, {}, [])


def _from_tokenizer_model(
    path: Path,
    name: str,
    config: Mapping[str, Any],
    bos: str | None,
    eos: str | None,
    templates: Mapping[str, str],
    declared: Sequence[tuple[str, Any]],
) -> Tokenizer:
    where = str(path)
    model = parse_model(path.read_bytes(), where)
    added = _config_added_tokens(config, f"{path.with_name('tokenizer_config.json')}")
    # In transformers, "legacy" means that a text after a special token also gets a space before it.
    legacy = get_one_of(config, "legacy", [None, True, False], where) is not False
    encoding = build_encoding(
        model,
        name=name,
        where=where,
        prefix_after_tokens=legacy and bool(config),
        raw_user_defined=False,
        added_tokens=added,
    )
    ids = {
        key: id if 0 <= id < len(model.pieces) else None for key, id in model.special_ids.items()
    }
    special = encoding.special_tokens
    bos_id = special.get(bos or "", ids["bos"])
    eos_id = special.get(eos or "", ids["eos"])
    texts: dict[int | None, str] = {id: text for text, id in special.items()}
    declared_ids = stop_tokens.resolve_stop_ids(encoding, declared)
    stop_ids = stop_tokens.well_known_stop_ids(encoding).union(declared_ids)
    if eos_id is not None:
        stop_ids |= {eos_id}
    template, named = build_chat_templates(
        templates, texts.get(bos_id), texts.get(eos_id), encoding, stop_ids
    )
    is_bpe = model.model_type == BPE
    add_bos = get_one_of(config, "add_bos_token", [None, True, False], where)
    add_eos = get_one_of(config, "add_eos_token", [None, True, False], where)
    return Tokenizer(
        encoding=encoding,
        chat_template=template,
        named_templates=named,
        bos_id=bos_id,
        eos_id=eos_id,
        add_bos=bos_id is not None and (is_bpe if add_bos is None else add_bos),
        add_eos=eos_id is not None and (not is_bpe if add_eos is None else add_eos),
        stop_ids=stop_ids,
    )


def _config_added_tokens(config: Mapping[str, Any], where: str) -> list[AddedToken]:
    """Return the tokens of `added_tokens_decoder` in tokenizer_config.json."""
    tokens: list[AddedToken] = []
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, Mapping):
        raise ValueError(
            f"{where}: expected an object for added_tokens_decoder, got {short_repr(decoder)}"
        )
    for id, token in decoder.items():
        item = f"{where}: added_tokens_decoder[{id!r}]"
        if not id.isdecimal():
            raise ValueError(f"{item}: expected a token id as the key")
        if not isinstance(token, Mapping):
            raise ValueError(f"{item}: expected an object, got {short_repr(token)}")
        flags = {
            key: bool(get_one_of(token, key, [None, False, True], item))
            for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
        }
        content = get_required(token, "content", str, item)
        flags["special"] |= looks_special(content)
        tokens.append(AddedToken(content=content, id=int(id), **flags))
    return tokens


def _from_tokenizer_json(
    path: Path,
    name: str,
    bos: str | None,
    eos: str | None,
    templates: Mapping[str, str],
    declared: Sequence[tuple[str, Any]] = (),
    spec: Mapping[str, Any] | None = None,
) -> Tokenizer:
    spec = read_json(path) if spec is None else spec
    # `truncation` and `padding` are defaults for calls; they do not change the ids.
    known_keys = {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer"}
    warn_unknown_keys(spec, known_keys | {"post_processor", "decoder", "model"}, "tokenizer.json")
    model = get_required(spec, "model", dict, str(path))
    where = f"{path}: model"
    vocab = _read_vocab(model, where)
    added = read_added(spec, vocab, str(path))
    prefix_token, suffix_token = _tokens_around(
        spec.get("post_processor"),
        f"{path}: post_processor",
        {**vocab, **{token.content: token.id for token in added}},
    )
    if prefix_token is not None and bos is not None and prefix_token != bos:
        raise ValueError(f"{path}: post_processor adds {prefix_token!r}, but bos_token is {bos!r}")
    bos = bos or prefix_token
    eos = suffix_token or eos
    special = {token.content: token.id for token in added if token.special}
    text_tokens = {token.content for token in added if not token.special}
    merges = [  # strings in old files
        merge.split(" ") if isinstance(merge, str) else merge
        for merge in (get_required(model, "merges", list, where) if "merges" in model else ())
    ]
    eos_tokens = [text for _, text in declared if isinstance(text, str)]
    for token in (bos, eos, *eos_tokens):
        # A declared token is special, as in transformers, unless it is a byte or part of a merge.
        if token is None or token in special or token not in vocab:
            continue
        if not _is_ordinary(token, merges):
            special[token] = vocab[token]
    ordinary = {
        token: id for token, id in vocab.items() if token not in special.keys() | text_tokens
    }
    if _is_sentencepiece(spec):
        encoding = _sentencepiece(path, name, spec, vocab, ordinary, special, added, merges)
    else:
        encoding = _byte_level(path, name, spec, ordinary, special, added, merges)

    if bos is not None and bos not in special:
        raise ValueError(f"{path}: the vocabulary has no special token {bos!r}, the bos_token")
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
        # If no file of the tokenizer declares eos, use the first id that the other files declare.
        eos_id=special.get(eos or "", next(iter(declared_ids), None)),
        add_bos=prefix_token is not None,
        add_eos=suffix_token is not None,
        stop_ids=stop_ids,
    )


def _tokens_around(
    spec: Any, where: str, vocab: Mapping[str, int]
) -> tuple[str | None, str | None]:
    """Return the tokens that a post-processor adds before and after a text; None for no token.

    Raises:
        ValueError: if the post-processor adds several tokens on one side of the text, or a token
            that is not in `vocab`.
    """
    processor = read_post_processor(spec, where, vocab)
    tokens: list[str | None] = []
    for ids in (processor.prefix, processor.suffix):
        names = [token for token, id in vocab.items() if ids == (id,)]
        if bool(ids) != bool(names):
            raise ValueError(
                f"{where}: expected at most one token of the vocabulary before a text, and at most "
                f"one after the text, got {short_repr(spec)}"
            )
        tokens.append(names[0] if names else None)
    return tokens[0], tokens[1]


def _read_vocab(model: Mapping[str, Any], where: str) -> dict[str, int]:
    """Return token to id from the vocabulary of a BPE or Unigram model.

    A Unigram vocabulary is a list of [token, score], and the id of a token is its index.

    Raises:
        ValueError: if an item of the vocabulary is invalid.
    """
    if get_one_of(model, "type", ["BPE", "Unigram"], where) == "BPE":
        vocab = get_required(model, "vocab", dict, where)
        for token, id in vocab.items():
            if not isinstance(id, int):
                raise ValueError(
                    f"{where}: expected an integer for vocab[{token!r}], got {short_repr(id)}"
                )
        return vocab
    vocab = {}
    for id, item in enumerate(get_required(model, "vocab", list, where)):
        match item:
            case [str(token), int() | float()]:
                if vocab.setdefault(token, id) != id:
                    raise ValueError(f"{where}: {token!r} is vocab[{vocab[token]}] and vocab[{id}]")
            case _:
                raise ValueError(
                    f"{where}: expected a token and a score for vocab[{id}], got {short_repr(item)}"
                )
    return vocab


def _byte_level(
    path: Path,
    name: str,
    spec: Mapping[str, Any],
    ordinary: Mapping[str, int],
    special: Mapping[str, int],
    added: Sequence[AddedToken],
    merges: Sequence[Any],
) -> Encoding:
    model, where = spec["model"], f"{path}: model"
    get_one_of(model, "type", ["BPE"], where)
    _check_bpe(model, where)
    get_one_of(model, "fuse_unk", [None, False], where)
    ignore_merges = get_one_of(model, "ignore_merges", [None, False, True], where)
    get_one_of(
        get_required(spec, "decoder", dict, str(path)), "type", ["ByteLevel"], f"{path}: decoder"
    )
    where_normalizer = f"{path}: normalizer"
    normalization = pipeline.byte_level_normalization(spec.get("normalizer"), where_normalizer)
    for i, token in enumerate(added):
        # The normalization forms, the only normalizers here, do not change ASCII.
        if token.normalized and normalization and not token.content.isascii():
            raise ValueError(
                f"{path}: added_tokens[{i}]: normalized is True for {token.content!r}; "
                "supported values: None, False"
            )
    encoding = from_byte_level(
        name,
        tokens=ordinary,
        special_tokens=special,
        added_tokens=[dataclasses.replace(token, normalized=False) for token in added],
        merges=merges,
        patterns=pipeline.split_patterns(spec.get("pre_tokenizer"), f"{path}: pre_tokenizer"),
        ignore_merges=bool(ignore_merges),
        normalization=normalization,
        where=where,
    )
    if encoding.dropped_bytes and model.get("unk_token") is not None:
        raise ValueError(
            f"{where}: unk_token {model['unk_token']!r} is not supported, because the vocabulary "
            f"has no token for the bytes {encoding.dropped_bytes!r}"
        )
    return encoding


def _check_bpe(model: Mapping[str, Any], where: str) -> None:
    """Check the settings of a BPE model for which only one value is supported."""
    get_one_of(model, "dropout", [None, 0, 0.0], where)
    get_one_of(model, "continuing_subword_prefix", [None, ""], where)
    get_one_of(model, "end_of_word_suffix", [None, ""], where)
    get_required(model, "merges", list, where)
    warn_unknown_keys(model, _BPE_KEYS, "tokenizer.json: model")


_BPE_KEYS = {"type", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk"}
_BPE_KEYS |= {"byte_fallback", "ignore_merges", "unk_token", "vocab", "merges"}


def _sentencepiece(
    path: Path,
    name: str,
    spec: Mapping[str, Any],
    vocab: Mapping[str, int],
    ordinary: Mapping[str, int],
    special: Mapping[str, int],
    added: Sequence[AddedToken],
    merges: Sequence[Any],
) -> SentencePiece:
    """Build the encoding of a vocabulary of characters: a Unigram model, or BPE on characters."""
    from bpe.sentencepiece import SentencePiece  # loads NumPy

    model, where = spec["model"], f"{path}: model"
    steps, escapes = pipeline.read_normalizers(spec.get("normalizer"), f"{path}: normalizer")
    pre = pipeline.pre_tokenization(spec.get("pre_tokenizer"), escapes, f"{path}: pre_tokenizer")
    if not pre.escapes_spaces:
        raise ValueError(
            f"{path}: expected a normalizer or pre_tokenizer that writes spaces as U+2581, got none"
        )
    byte_ids = None
    if get_one_of(model, "byte_fallback", [None, False, True], where):
        by_byte = {parse_byte_piece(token): id for token, id in vocab.items()}
        if missing := [byte for byte in range(256) if byte not in by_byte]:
            raise ValueError(f"{where}: byte_fallback is true, but <0x{missing[0]:02X}> is missing")
        byte_ids = [by_byte[byte] for byte in range(256)]

    def is_byte(token: str) -> bool:
        return byte_ids is not None and parse_byte_piece(token) is not None

    def with_spaces(tokens: Mapping[str, int]) -> dict[str, int]:
        return {
            token.replace(SPACE_SYMBOL, " "): id
            for token, id in tokens.items()
            if not is_byte(token)
        }

    pieces = with_spaces({token: id for token, id in vocab.items() if token not in special})
    piece_model, unk_id = _piece_model(model, name, vocab, pieces, merges, byte_ids, where)
    unigram = model["type"] == "Unigram"
    unk_tokens = [token for token, id in special.items() if id == unk_id]
    if unk_id is not None and not unk_tokens:
        token = next(token for token, id in vocab.items() if id == unk_id)
        special = {**special, token: unk_id}
        ordinary = {key: id for key, id in ordinary.items() if key != token}
    try:
        return SentencePiece(
            name,
            model=piece_model,
            pieces=with_spaces(ordinary),
            special_tokens=special,
            added_tokens=added,
            byte_ids=byte_ids,
            unk_id=unk_id,
            fuse_unk=unigram or bool(get_one_of(model, "fuse_unk", [None, False, True], where)),
            normalizer=normalizers.sequence([*steps, *pre.steps]),
            normalize_added=True,
            pre_tokenizer=pre.pre_tokenizer,
            metaspace=pre.metaspace,
            split_before_space=pre.split_before_space,
            dummy_prefix=pipeline.decoder_strips_prefix(spec.get("decoder"), f"{path}: decoder"),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _piece_model(
    model: Mapping[str, Any],
    name: str,
    vocab: Mapping[str, int],
    pieces: Mapping[str, int],
    merges: Sequence[Any],
    byte_ids: Sequence[int] | None,
    where: str,
) -> tuple[PieceModel, int | None]:
    """Return the model that encodes segments, and the id of unknown characters."""
    from bpe.character_bpe import CharacterBpe
    from bpe.unigram import Unigram

    if model["type"] == "Unigram":
        warn_unknown_keys(
            model, {"type", "unk_id", "vocab", "byte_fallback"}, "tokenizer.json: model"
        )
        unk_id = get_required(model, "unk_id", int, where)
        if not 0 <= unk_id < len(vocab):
            raise ValueError(f"{where}: unk_id is {unk_id}, but there are {len(vocab)} tokens")
        scores = {token: float(score) for token, score in model["vocab"]}
        lowest = min(scores.values())
        known = {
            piece: scores.get(piece, scores.get(piece.replace(" ", SPACE_SYMBOL), lowest))
            for piece in pieces
            if pieces[piece] != unk_id
        }
        if bad := [piece for piece, score in known.items() if not math.isfinite(score)]:
            raise ValueError(
                f"{where}: expected a finite number for the score of {bad[0]!r}, got "
                f"{known[bad[0]]}"
            )
        known_pieces = {piece: id for piece, id in pieces.items() if id != unk_id}
        try:
            unigram = Unigram(
                known_pieces, known, unk_id=unk_id, byte_ids=byte_ids, lowest_score=lowest
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return unigram, unk_id
    _check_bpe(model, where)
    get_one_of(model, "ignore_merges", [None, False], where)
    unk_token = model.get("unk_token")
    if unk_token is not None and (not isinstance(unk_token, str) or unk_token not in vocab):
        raise ValueError(f"{where}: unk_token {unk_token!r} is not in vocab")
    unk_id = None if unk_token is None else vocab[unk_token]
    pairs: list[tuple[str, str]] = []
    for i, merge in enumerate(merges):
        match merge:
            case [str(left), str(right)]:
                pairs.append((left.replace(SPACE_SYMBOL, " "), right.replace(SPACE_SYMBOL, " ")))
            case _:
                raise ValueError(
                    f"{where}: expected two tokens for merges[{i}], got {short_repr(merge)}"
                )
    try:
        bpe = CharacterBpe(name, pieces, merges=pairs, byte_ids=byte_ids, unk_id=unk_id)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return bpe, unk_id


def read_added(spec: Mapping[str, Any], vocab: Mapping[str, Any], where: str) -> list[AddedToken]:
    """Return the added tokens of a `tokenizer.json`, special or not.

    A token that the file does not declare as special is special nevertheless if it looks like
    markup, so that user text cannot produce it.

    Args:
        spec: the content of the file.
        vocab: `vocab` of the model, token to id.
        where: the file, for error messages.

    Raises:
        ValueError: if a setting is invalid, or ids conflict.
    """
    tokens: dict[str, AddedToken] = {}
    is_text = looks_special if _is_sentencepiece(spec) else None
    for i, token in enumerate(get_required(spec, "added_tokens", list, where)):
        item = f"{where}: added_tokens[{i}]"
        text, id = get_required(token, "content", str, item), get_required(token, "id", int, item)
        if not text:
            raise ValueError(f"{item}: content is empty")
        flags = {
            key: bool(get_one_of(token, key, [None, False, True], item))
            for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
        }
        warn_unknown_keys(token, flags.keys() | {"content", "id"}, "tokenizer.json: added_tokens")
        is_markup = not is_plain_text(text) if is_text is None else is_text(text)
        flags["special"] |= is_markup
        new = AddedToken(content=text, id=id, **flags)
        if tokens.setdefault(text, new).id != id:
            raise ValueError(f"{item}: {text!r} has the ids {tokens[text].id} and {id}")
    _check_added_ids({token.content: token.id for token in tokens.values()}, vocab, where)
    return list(tokens.values())


def _is_ordinary(token: str, merges: Sequence[Any]) -> bool:
    """Return whether a token is a byte, or the result or a part of a merge."""
    return len(token) == 1 or any(
        token in merge or token == "".join(map(str, merge))
        for merge in merges
        if isinstance(merge, list)
    )


def _is_sentencepiece(spec: Mapping[str, Any]) -> bool:
    """Return whether a `tokenizer.json` describes a vocabulary of characters (SentencePiece).

    Such a vocabulary is a Unigram model, or has byte fallback, or writes spaces as U+2581.
    """
    model = spec["model"]
    if model.get("type") == "Unigram" or model.get("byte_fallback") is True:
        return True
    steps = [spec.get("normalizer"), spec.get("pre_tokenizer"), spec.get("decoder")]
    return any('"Metaspace"' in text or "\u2581" in text for text in map(_json_text, steps))


def _json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _check_added_ids(special: Mapping[str, int], vocab: Mapping[str, Any], where: str) -> None:
    texts: dict[int, str] = {}
    for text, id in special.items():
        if (vocab_id := vocab.get(text, id)) != id:
            raise ValueError(
                f"{where}: the token {text!r} has the id {id} in added_tokens, and {vocab_id} in "
                "model.vocab"
            )
        # Two tokens with one id, as in o200k_harmony, are valid only if the vocabulary has both.
        if texts.setdefault(id, text) != text and text not in vocab:
            raise ValueError(f"{where}: the tokens {text!r} and {texts[id]!r} have the id {id}")
