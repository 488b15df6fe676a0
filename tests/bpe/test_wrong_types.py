"""Values of the wrong type in tokenizer files: a ValueError, or the value changes nothing."""

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

import bpe
from bpe.unigram import Unigram

VALUES = ("x", [], {}, -1, 0, None, math.nan, [1], True, 2**70, ["x"], {"x": 1})
G = "tokenizer.ggml."
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "ab", "▁"]
SENTENCEPIECE = {
    "general.architecture": "llama",
    "general.name": "model",
    "tokenizer.chat_template": "{{ messages }}",
    G + "bos_token_id": 1,
    G + "eos_token_id": 2,
    G + "eot_token_id": 2,
    G + "eom_token_id": 2,
    G + "unknown_token_id": 0,
    G + "add_bos_token": True,
    G + "add_eos_token": False,
    G + "add_space_prefix": True,
    G + "remove_extra_whitespaces": False,
    G + "tokens": PIECES,
    G + "token_type": [2, 3, 3] + [6] * 256 + [1] * 4,
    G + "scores": [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0],
}
CONFIG = {
    "bos_token": "<unk>",
    "eos_token": "<unk>",
    "added_tokens_decoder": {"0": {"content": "<unk>", "special": True, "lstrip": False}},
    "add_bos_token": True,
    "chat_template": "x",
}
MODELS = [
    {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -2.0], ["▁", -3.0]]},
    {
        "type": "BPE",
        "unk_token": "<unk>",
        "vocab": {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "▁": 4},
        "merges": [["a", "b"]],
    },
]
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}


def specification(model: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<unk>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": METASPACE,
        "post_processor": None,
        "decoder": METASPACE,
        "model": model,
    }


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(_list(value))
    for key, child in items:
        yield (*prefix, key)
        yield from paths(child, (*prefix, key))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def variants(root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield copies of a JSON object in which one value has another type."""
    for path in paths(root):
        for value in VALUES:
            copy = json.loads(json.dumps(root))
            parent = copy
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = value
            yield copy


def read_or_raise_value_error(read: Any, *arguments: Any) -> None:
    with contextlib.suppress(ValueError):
        read(*arguments)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_gguf_key_of_any_type_is_read_or_raises_value_error(kind):
    """A string as a token id, a score or a token type was a TypeError."""
    meta = SENTENCEPIECE | {G + "model": kind}
    if kind == "t5":
        meta[G + "precompiled_charsmap"] = []
    bpe.from_gguf(meta)
    for key, value in meta.items():
        for wrong in VALUES:
            read_or_raise_value_error(bpe.from_gguf, meta | {key: wrong})
            if isinstance(value, list) and value:
                read_or_raise_value_error(bpe.from_gguf, meta | {key: [*value[:-1], wrong]})


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["type"])
def test_json_key_of_any_type_is_read_or_raises_value_error(model, tmp_path):
    """A list as `added_tokens_decoder` was an AttributeError, one as `unk_token` a TypeError."""
    for name, root in (
        ("tokenizer.json", specification(model)),
        ("tokenizer_config.json", CONFIG),
    ):
        for text in map(json.dumps, (root, *variants(root))):
            (tmp_path / name).write_text(text, "utf-8")
            read_or_raise_value_error(bpe.from_folder, tmp_path)
        (tmp_path / name).write_text(json.dumps(root), "utf-8")
    bpe.from_folder(tmp_path)


def test_empty_token_of_gguf_file_gets_a_name():
    """llama.cpp names an empty token after its id; here the file was refused."""
    tokens = [*PIECES[:-1], ""]
    tokenizer = bpe.from_gguf(SENTENCEPIECE | {G + "model": "llama", G + "tokens": tokens})
    assert tokenizer.encoding.decode([len(PIECES) - 1]).strip() == f"[EMPTY_{len(PIECES) - 1}]"


def test_unigram_token_beyond_the_limit_raises_value_error():
    """The prefixes of a token of a megabyte would take a terabyte."""
    pieces = {"a": 1, "a" * 2**20: 2}
    with pytest.raises(ValueError, match="2"):
        Unigram(pieces, dict.fromkeys(pieces, -1.0), unk_id=0)
