"""Reading vocabularies: `.tiktoken` files, Hugging Face's `tokenizer.json`, and GGUF metadata.

Each reader is strict where the ids change. A vocabulary read half right still encodes, only
differently from what the model was trained on, and nobody notices but the model. So a step or a
value that cannot be followed raises a ValueError naming the file and the key. A key that neither
`tokenizers` nor llama.cpp reads is passed over, as they do, and logged once.

SentencePiece vocabularies (Llama 2, Mistral, Gemma) cannot be read.

Two of the formats write bytes as text, in GPT-2's way: each of the 256 bytes has a printable
character that stands for it. The 188 printable ones of Latin-1 stand for themselves, the others,
in order, for U+0100 and up: a space is "Ġ", a newline "Ċ".
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bpe import stop, template_files
from bpe.chat import ChatTemplate
from bpe.encoding import Encoding
from bpe.log_once import warn_once
from bpe.pretokenize import GPT2, LLAMA3, O200K, QWEN2, SMOLLM
from bpe.vocabularies import PUBLISHED, VOCABULARIES
from bpe.wordpiece import WordPiece

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """What a model file says about text.

    Attributes:
        encoding: text to ids and back.
        chat_template: how a conversation becomes text, if the model knows conversations.
        named_templates: the model's other templates ("tool_use", "rag"), by name.
        bos_id: the token that begins a text, if there is one.
        eos_id: the token that ends a text or turn, if there is one.
        add_bos: whether plain text (not a rendered chat template, which writes its own) must be
            given to the model with `bos_id` in front.
        stop_ids: the tokens after which generation ends; `stop.py` says which.
    """

    encoding: Encoding
    chat_template: ChatTemplate | None = None
    named_templates: Mapping[str, ChatTemplate] = field(default_factory=dict)
    bos_id: int | None = None
    eos_id: int | None = None
    add_bos: bool = False
    stop_ids: frozenset[int] = frozenset()


def load(path: str | Path) -> Tokenizer:
    """Reads a tokenizer from a file or folder, whatever its format.

    Args:
        path: a `.gguf` file, a `.tiktoken` file of OpenAI's, a `tokenizer.json`, or a Hugging Face
            folder (`tokenizer.json`, `tokenizer_config.json`, chat templates).

    Raises:
        FileNotFoundError: if there is nothing at `path`, or no tokenizer in the folder.
        ValueError: if the format is unknown, or the file is damaged or says what we do not know.
    """
    path = Path(path)
    if path.is_dir():
        return from_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".gguf":
        return from_gguf(_read_gguf(path), source=str(path))
    if path.suffix == ".json":
        return from_tokenizer_json(path)
    if path.suffix == ".tiktoken":
        # OpenAI's files hold only the ranks; pattern and special tokens go by the name.
        if (expected := PUBLISHED.get(path.stem)) is None:
            raise ValueError(
                f"{path}: a .tiktoken file holds no split pattern, and only those of "
                f"{', '.join(PUBLISHED)} are known by name; call "
                "bpe.from_tiktoken(path, pattern=..., special_tokens=...)"
            )
        if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != expected:
            raise ValueError(
                f"{path}: its SHA-256 is {found}, that of OpenAI's file of this name is {expected}"
            )
        known = VOCABULARIES[path.stem]
        return from_tiktoken(path, pattern=known.pattern, special_tokens=known.special_tokens)
    raise ValueError(
        f"{path}: unknown kind of vocabulary; a .gguf, a .tiktoken, a tokenizer.json or a folder "
        "holding one can be read"
    )


# tiktoken


def from_tiktoken(
    path: str | Path, *, pattern: str | Sequence[str], special_tokens: Mapping[str, int]
) -> Tokenizer:
    """Reads a `.tiktoken` file: on each line a token in base64, a space, and its rank.

    Args:
        path: the file.
        pattern: its split pattern (see `bpe.pretokenize`).
        special_tokens: spelling to id.

    Raises:
        ValueError: if the file is damaged, has gaps in its ranks, or lacks a byte.
    """
    path = Path(path)
    ranks: dict[bytes, int] = {}
    line_of: dict[int, int] = {}  # rank to the number of its line
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        here = f"{path}: line {number}"
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except (ValueError, binascii.Error):
            raise ValueError(f"{here} is not 'base64 rank': {line[:80]!r}") from None
        if token in ranks:
            raise ValueError(f"{here} repeats the token {token!r} of line {line_of[ranks[token]]}")
        if line_of.setdefault(rank, number) != number:
            raise ValueError(f"{here} repeats the rank {rank} of line {line_of[rank]}")
        ranks[token] = rank
    for rank, number in line_of.items():
        # p50k_base leaves out the id of <|endoftext|>; any other gap is a line that was lost.
        if rank > 0 and rank - 1 not in line_of and rank - 1 not in special_tokens.values():
            raise ValueError(f"{path}: line {number} has the rank {rank}, but none has {rank - 1}")
    try:
        encoding = Encoding(path.stem, pattern=pattern, ranks=ranks, special_tokens=special_tokens)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    eos_id = special_tokens.get("<|endoftext|>")
    stop_ids = stop.spelled_ids(encoding)
    return Tokenizer(encoding=encoding, eos_id=eos_id, stop_ids=stop_ids)


# Hugging Face


def from_folder(path: str | Path) -> Tokenizer:
    """Reads `tokenizer.json`, `tokenizer_config.json` and the chat templates of a model folder.

    Raises:
        FileNotFoundError: if there is no `tokenizer.json`.
        ValueError: if a file is damaged or says what cannot be followed.
    """
    path = Path(path)
    if not (path / "tokenizer.json").exists():
        if _is_sentencepiece_model(path / "tokenizer.model"):
            raise ValueError(f"{path / 'tokenizer.model'}: {_SENTENCEPIECE}")
        raise FileNotFoundError(f"{path}: no tokenizer.json in this folder")
    config_path = path / "tokenizer_config.json"
    config = _read_json(config_path) if config_path.exists() else {}
    bos = _token_text(config.get("bos_token"), f"{config_path}: bos_token")
    eos = _token_text(config.get("eos_token"), f"{config_path}: eos_token")
    templates = template_files.read(path, config)
    declared = list(stop.declared_in_folder(path))
    return _from_tokenizer_json(path / "tokenizer.json", path.name, bos, eos, templates, declared)


def from_tokenizer_json(path: str | Path) -> Tokenizer:
    """Reads a `tokenizer.json` alone, which names no eos and has no chat template.

    Raises:
        ValueError: if the file is damaged or says what we do not know.
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
    spec = _read_json(path)
    # `truncation` and `padding` are settings of a call that the file happens to keep.
    known = {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer"}
    _note_others(spec, known | {"post_processor", "decoder", "model"}, "tokenizer.json")
    model = _get(spec, "model", dict, str(path))
    where = f"{path}: model"
    if _is_sentencepiece(spec):
        raise ValueError(f"{path}: {_SENTENCEPIECE}")
    _one_of(model, "type", ["BPE"], where)
    _one_of(model, "dropout", [None, 0, 0.0], where)
    _one_of(model, "continuing_subword_prefix", [None, ""], where)
    _one_of(model, "end_of_word_suffix", [None, ""], where)
    _one_of(model, "byte_fallback", [None, False], where)
    _one_of(model, "fuse_unk", [None, False], where)
    ignore_merges = _one_of(model, "ignore_merges", [None, False, True], where)
    known = {"type", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk"}
    known |= {"byte_fallback", "ignore_merges", "unk_token", "vocab", "merges"}
    _note_others(model, known, "tokenizer.json: model")
    _one_of(_get(spec, "decoder", dict, str(path)), "type", ["ByteLevel"], f"{path}: decoder")

    vocab = _get(model, "vocab", dict, where)
    for token, id in vocab.items():
        if not isinstance(id, int):
            raise ValueError(f"{where}: vocab[{token!r}] is {_short(id)}, not an id")
    special = _added_tokens(spec, vocab, str(path))
    merges = [  # strings in old files
        merge.split(" ") if isinstance(merge, str) else merge
        for merge in _get(model, "merges", list, where)
    ]
    encoding = _from_byte_level(
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

    begin = _begin_token(spec.get("post_processor"), f"{path}: post_processor")
    if begin is not None and bos is not None and begin != bos:
        raise ValueError(f"{path}: post_processor adds {begin!r}, but bos_token is {bos!r}")
    bos = bos or begin
    for key, token in {"bos_token": bos, "eos_token": eos}.items():
        if token is not None and token not in special:
            raise ValueError(f"{path}: added_tokens lacks the {key} {token!r}")
    if eos is None:  # special_tokens_map.json may name it
        eos = next((v for _, v in declared if isinstance(v, str) and v in special), None)
    declared_ids = stop.known_ids(encoding, declared)
    stop_ids = stop.spelled_ids(encoding).union(declared_ids)
    template, named = _chat_templates(templates, bos, eos, encoding, stop_ids)
    return Tokenizer(
        encoding=encoding,
        chat_template=template,
        named_templates=named,
        bos_id=None if bos is None else special[bos],
        # Where the tokenizer's files name none, the first that the model's name.
        eos_id=special[eos] if eos is not None else next(iter(declared_ids), None),
        add_bos=begin is not None,
        stop_ids=stop_ids,
    )


_SENTENCEPIECE = (
    "a SentencePiece vocabulary, which cannot be read; byte-level BPE vocabularies, as of GPT-2, "
    "Llama 3 and Qwen, can"
)


def _is_sentencepiece(spec: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json was made of a SentencePiece model: bytes apart, spaces as U+2581."""
    model = spec["model"]
    if model.get("type") == "Unigram" or model.get("byte_fallback") is True:
        return True
    steps = [spec.get("normalizer"), spec.get("pre_tokenizer"), spec.get("decoder")]
    return any('"Metaspace"' in text or "\u2581" in text for text in map(_json_text, steps))


def _json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_sentencepiece_model(path: Path) -> bool:
    """Whether a file begins as the protocol buffer of SentencePiece: with the field of pieces."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(1) == b"\n"


def _added_tokens(spec: Mapping[str, Any], vocab: Mapping[str, Any], where: str) -> dict[str, int]:
    special: dict[str, int] = {}
    for i, token in enumerate(_get(spec, "added_tokens", list, where)):
        here = f"{where}: added_tokens[{i}]"
        text, id = _get(token, "content", str, here), _get(token, "id", int, here)
        for key in ("single_word", "lstrip", "rstrip"):
            _one_of(token, key, [None, False], here)
        # Of BPE it is NFC, which leaves ASCII alone; of WordPiece, it may lower case.
        is_changed = spec["model"]["type"] != "BPE" or not text.isascii()
        if spec.get("normalizer") is not None and is_changed:
            _one_of(token, "normalized", [None, False], here)
        known = {"content", "id", "special", "single_word", "lstrip", "rstrip", "normalized"}
        _note_others(token, known, "tokenizer.json: added_tokens")
        if special.setdefault(text, id) != id:
            raise ValueError(f"{here}: {text!r} has the ids {special[text]} and {id}")
    spelling: dict[int, str] = {}
    for text, id in special.items():
        if (known := vocab.get(text, id)) != id:
            raise ValueError(
                f"{where}: {text!r} is {id} in added_tokens and {known} in model.vocab"
            )
        # Two spellings of one token, as o200k_harmony has, are damage unless the vocabulary agrees.
        if spelling.setdefault(id, text) != text and text not in vocab:
            raise ValueError(f"{where}: the tokens {text!r} and {spelling[id]!r} have the id {id}")
    return special


def _normalization(spec: Any, where: str) -> Literal["NFC"] | None:
    steps = [] if spec is None else [spec]
    if isinstance(spec, dict) and spec.get("type") == "Sequence":
        steps = _get(spec, "normalizers", list, where)
    if not steps:
        return None
    if steps == [{"type": "NFC"}]:
        return "NFC"
    raise ValueError(f"{where}: {_short(spec)} is not known; null and NFC are")


def _split_patterns(spec: Any, where: str) -> str | list[str]:
    """The split patterns that Hugging Face's pre-tokenizers amount to."""
    steps = [spec]
    if isinstance(spec, dict) and spec.get("type") == "Sequence":
        steps = _get(spec, "pretokenizers", list, where)
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
                    return SMOLLM  # the same in one pass
                return patterns or [r"[\s\S]+"]
            case _:
                raise ValueError(f"{where}: {_short(step)} is not known")
    raise ValueError(f"{where}: the last step must be ByteLevel, not {_short(steps[-1:])}")


def _begin_token(spec: Any, where: str) -> str | None:
    """The token that the post-processor puts in front of a text, if any."""
    begin = None
    steps = [spec] if spec is not None else []
    if isinstance(spec, dict) and spec.get("type") == "Sequence":
        steps = _get(spec, "processors", list, where)
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                pass  # only moves offsets
            case {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]}:
                pass  # adds nothing
            case {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": str(begin)}}, {"Sequence": {"id": "A"}}],
            }:
                pass
            case _:
                raise ValueError(f"{where}: {_short(step)} is not known")
    return begin


# WordPiece


def load_wordpiece(path: str | Path) -> WordPiece:
    """Reads the WordPiece vocabulary of a BERT model.

    Args:
        path: a `tokenizer.json`, a `vocab.txt` (one piece a line, ids counted from 0), or a Hugging
            Face folder with either; beside a `vocab.txt`, `tokenizer_config.json` says whether case
            is kept.

    Raises:
        FileNotFoundError: if there is no such file, or neither of them in the folder.
        ValueError: if a file is damaged or says what we do not know.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"{path}: no tokenizer.json or vocab.txt in this folder")
        path = found[0]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".json":
        return _wordpiece_json(path)
    if path.suffix == ".txt":
        return _wordpiece_txt(path)
    raise ValueError(f"{path}: a WordPiece vocabulary is a tokenizer.json or a vocab.txt")


def _wordpiece_txt(path: Path) -> WordPiece:
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error
    vocab: dict[str, int] = {}
    for id, line in enumerate(lines):
        piece = line.removesuffix("\r")
        if not piece:
            raise ValueError(f"{path}: line {id + 1} is empty")
        if vocab.setdefault(piece, id) != id:
            raise ValueError(f"{path}: line {id + 1} repeats {piece!r} of line {vocab[piece] + 1}")
    config_path = path.with_name("tokenizer_config.json")
    config = _read_json(config_path) if config_path.exists() else {}
    where = str(config_path)
    _one_of(config, "do_basic_tokenize", [None, True], where)
    return _wordpiece(
        vocab,
        str(path),
        lowercase=_one_of(config, "do_lower_case", [None, True, False], where) is not False,
        strip_accents=_one_of(config, "strip_accents", [None, True, False], where),
        split_ideographs=_one_of(config, "tokenize_chinese_chars", [None, True, False], where)
        is not False,
    )


def _wordpiece_json(path: Path) -> WordPiece:
    spec = _read_json(path)
    known = {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer"}
    _note_others(spec, known | {"post_processor", "decoder", "model"}, "tokenizer.json")
    model, where = _get(spec, "model", dict, str(path)), f"{path}: model"
    _one_of(model, "type", ["WordPiece"], where)
    known = {"type", "unk_token", "continuing_subword_prefix", "max_input_chars_per_word", "vocab"}
    _note_others(model, known, "tokenizer.json: model")
    vocab = _get(model, "vocab", dict, where)
    for token, id in vocab.items():
        if not isinstance(id, int):
            raise ValueError(f"{where}: vocab[{token!r}] is {_short(id)}, not an id")

    normalizer, where = _get(spec, "normalizer", dict, str(path)), f"{path}: normalizer"
    _one_of(normalizer, "type", ["BertNormalizer"], where)
    _one_of(normalizer, "clean_text", [True], where)
    known = {"type", "clean_text", "handle_chinese_chars", "strip_accents", "lowercase"}
    _note_others(normalizer, known, "tokenizer.json: normalizer")
    splitter = _get(spec, "pre_tokenizer", dict, str(path))
    _one_of(splitter, "type", ["BertPreTokenizer"], f"{path}: pre_tokenizer")

    special = _added_tokens(spec, vocab, str(path))
    if missing := special.keys() - vocab.keys():
        raise ValueError(f"{path}: model.vocab lacks {min(missing)!r}, one of added_tokens")
    cls, sep = _cls_and_sep(spec.get("post_processor"), f"{path}: post_processor")
    return _wordpiece(
        vocab,
        str(path),
        special_tokens=special,
        lowercase=_get(normalizer, "lowercase", bool, where),
        strip_accents=_one_of(normalizer, "strip_accents", [None, True, False], where),
        split_ideographs=_get(normalizer, "handle_chinese_chars", bool, where),
        prefix=_get(model, "continuing_subword_prefix", str, f"{path}: model"),
        longest_word=_get(model, "max_input_chars_per_word", int, f"{path}: model"),
        unk=_get(model, "unk_token", str, f"{path}: model"),
        cls=cls,
        sep=sep,
    )


def _wordpiece(vocab: Mapping[str, int], where: str, **options: Any) -> WordPiece:
    try:
        return WordPiece(vocab, **options)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _cls_and_sep(spec: Any, where: str) -> tuple[str, str]:
    """The tokens that the post-processor puts before and after a text."""
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
    raise ValueError(f"{where}: {_short(spec)} is not known")


# GGUF

# tokenizer.ggml.pre -> pattern, ignore_merges, normalization, and whether a text begins with bos
# unless the file says otherwise. The groups are those of llama.cpp (`llama-vocab.cpp`), of which
# left out are those that add a separator or belong to vocabularies with tokens of white space. A
# GGUF file does not say that Qwen2 normalizes (llama.cpp does not); Hugging Face's tokenizer, with
# which the model was trained, does.
_Pre = tuple[str, bool, Literal["NFC"] | None, bool]
_GGUF_PRE_GROUPS: dict[str, _Pre] = {
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
_GGUF_PRE = {name: rule for names, rule in _GGUF_PRE_GROUPS.items() for name in names.split()}
# What tokenizer.ggml.* may say beside the vocabulary: keys that change the ids of a text where they
# have another value, and keys that do not change them.
_GGUF_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_eos_token": (None, False),
    "add_sep_token": (None, False),
    "add_space_prefix": (None, False),
    "remove_extra_whitespaces": (None, False),
    "precompiled_charsmap": (None, []),
    "normalizer.lowercase": (None, False),
    "normalizer.strip_accents": (None, False),
}
_GGUF_READ = {"model", "pre", "tokens", "token_type", "merges", "add_bos_token"}
_GGUF_UNUSED = {"scores", "token_type_count"}
_GGUF_MODELS = {  # of tokenizer.ggml.model, but for gpt2
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
    model = _text(meta.get(ggml + "model"))
    if model in ("llama", "t5", "gemma4"):
        raise ValueError(f"{source}: {ggml}model is {model!r}: {_SENTENCEPIECE}")
    if model != "gpt2":
        what = _GGUF_MODELS.get(model, "of an unknown kind")
        raise ValueError(
            f"{source}: {ggml}model is {model!r}, {what}; byte-level BPE ('gpt2') can be read"
        )
    pre = _text(meta.get(ggml + "pre"))
    _one_of({ggml + "pre": pre}, ggml + "pre", list(_GGUF_PRE), source)
    pattern, ignore_merges, normalization, add_bos = _GGUF_PRE[pre]
    for key, values in _GGUF_NEUTRAL.items():
        _one_of(meta, ggml + key, values, source)
    known = {ggml + key for key in _GGUF_READ | _GGUF_UNUSED | _GGUF_NEUTRAL.keys()}
    known.add("tokenizer.huggingface.json")  # the tokenizer.json that the rest was made from
    _note_others(
        {
            key: value
            for key, value in meta.items()
            if not key.startswith("tokenizer.chat_template") and not key.endswith("_token_id")
        },
        known,
        "GGUF metadata",
    )

    tokens = [_text(token) for token in _get_array(meta, ggml + "tokens", source)]
    types = [int(t) for t in _get_array(meta, ggml + "token_type", source)]
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

    encoding = _from_byte_level(
        _text(metadata.get("general.name")) or pre,
        tokens=ordinary,
        special_tokens=special,
        merges=[_text(merge).split(" ") for merge in _get_array(meta, ggml + "merges", source)],
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
    declared = stop.declared_in_gguf(meta, source)
    stop_ids = stop.spelled_ids(encoding).union(stop.known_ids(encoding, declared))
    first = "tokenizer.chat_template"
    template, named = _chat_templates(
        {
            key.removeprefix(first).removeprefix(".") or "default": _text(value)
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


def _read_gguf(path: Path) -> dict[str, Any]:
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


# Common to the formats that write bytes as characters


def byte_characters() -> dict[int, str]:
    """GPT-2's character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


# What a vocabulary may do without: control characters other than tab, newline and return, bytes
# that never occur in UTF-8, and first bytes of planes where hardly a character is assigned. A
# vocabulary has tokens only for the bytes of its training text. One that lacks others is damaged.
_DISPENSABLE = bytes(
    [*(b for b in range(32) if b not in b"\t\n\r"), 0x7F, 0xC0, 0xC1, *range(0xF1, 0x100)]
)


def _from_byte_level(
    name: str,
    *,
    tokens: Mapping[str, int],
    special_tokens: Mapping[str, int],
    merges: Iterable[Any],
    patterns: str | Sequence[str],
    ignore_merges: bool,
    normalization: Literal["NFC"] | None,
    where: str,
) -> Encoding:
    if spaces := [token for token in special_tokens if token.isspace()]:
        # As in GPT-NeoX and Phi-2. They are matched in every text, unlike special tokens.
        raise ValueError(f"{where}: added tokens of white space, as {spaces[0]!r}, cannot be read")
    byte_of = {character: byte for byte, character in byte_characters().items()}
    as_bytes: dict[str, bytes] = {}
    for token, id in tokens.items():
        try:
            as_bytes[token] = bytes([byte_of[character] for character in token])
        except KeyError as error:
            raise ValueError(
                f"{where}: token {id}, {token!r}, has the character {error.args[0]!r}, "
                "which stands for no byte"
            ) from None
    ranks = {token_bytes: tokens[token] for token, token_bytes in as_bytes.items()}
    dropped = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
    if lost := dropped.translate(None, _DISPENSABLE):
        raise ValueError(f"{where}: no token for the bytes {lost!r}")

    pairs: list[tuple[bytes, bytes]] = []
    for i, merge in enumerate(merges):
        match merge:
            case [str(left), str(right)] if left in as_bytes and right in as_bytes:
                pairs.append((as_bytes[left], as_bytes[right]))
            case _:
                raise ValueError(f"{where}: merge {i}, {_short(merge)}, does not join two tokens")
    try:
        return Encoding(
            name,
            pattern=patterns,
            ranks=ranks,
            special_tokens=special_tokens,
            merges=pairs,
            ignore_merges=ignore_merges,
            normalization=normalization,
            dropped_bytes=dropped,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _chat_templates(
    sources: Mapping[str, str],
    bos: str | None,
    eos: str | None,
    encoding: Encoding,
    stop_ids: Collection[int],
) -> tuple[ChatTemplate | None, dict[str, ChatTemplate]]:
    """The template called "default", and the others by name."""
    ends = [encoding.decode_single_token_bytes(id).decode(errors="replace") for id in stop_ids]
    make = functools.partial(
        ChatTemplate, bos_token=bos or "", eos_token=eos or "", stop_tokens=ends
    )
    named = {name: make(source) for name, source in sources.items() if source}
    if (default := named.pop("default", None)) is not None:
        default.tool_use = named.get("tool_use")
    return default, named


# Checks of structure


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def _get(mapping: Any, key: str, kind: type, where: str) -> Any:
    value = mapping.get(key) if isinstance(mapping, Mapping) else None
    if not isinstance(value, kind):
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"{where}: {key} is {found}, not a {kind.__name__}")
    return value


def _get_array(metadata: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """An array of GGUF metadata, which readers give as a list or as an array of numpy's."""
    value = metadata.get(key)
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"{where}: {key} is {found}, not an array")
    return list(value)


def _one_of(mapping: Mapping[str, Any], key: str, values: Sequence[Any], where: str) -> Any:
    value = mapping.get(key)
    if value not in values:
        allowed = ", ".join(map(repr, values))
        raise ValueError(f"{where}: {key} is {_short(value)}; of what we can read, it is {allowed}")
    return value


def _note_others(mapping: Mapping[str, Any], known: Collection[str], source: str) -> None:
    """Log, once for each set of keys, that keys which nothing reads are passed over."""
    others = sorted(key for key, value in mapping.items() if value is not None and key not in known)
    if others:
        names = ", ".join(map(repr, others[:20]))
        warn_once(log, f"{source}: passing over keys not known to change the ids: {names}")


def _text(value: Any) -> str:
    return (
        value.decode("utf-8") if isinstance(value, bytes) else "" if value is None else str(value)
    )


def _token_text(value: Any, where: str) -> str | None:
    """A token in tokenizer_config.json: a string, or an object with the string in it."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} is {_short(value)}, not a string")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
