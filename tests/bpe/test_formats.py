"""Vocabulary files: the same encoding from every format, and no damage that goes unnoticed."""

import base64
import json
import subprocess
import sys

import pytest

import bpe
from bpe.formats import byte_characters
from bpe.pretokenize import GPT2, LLAMA3, QWEN2, SMOLLM
from tests.bpe import tiny
from tests.bpe.conftest import MODELS

TEXT = "low lower 😀<|im_end|>é\x00\xff 12"
IDS = tiny.encoding().encode(TEXT, allowed_special="all")


@pytest.fixture
def write_json(tmp_path):
    def write(spec, name="tokenizer.json"):
        path = tmp_path / name
        path.write_text(json.dumps(spec))
        return path

    return write


def check(tokenizer: bpe.Tokenizer):
    assert tokenizer.encoding.encode(TEXT, allowed_special="all") == IDS
    assert tokenizer.encoding.decode(IDS) == TEXT


def test_byte_characters():
    table = byte_characters()
    assert len(set(table.values())) == 256
    assert (table[ord("a")], table[ord(" ")], table[ord("\n")]) == ("a", "Ġ", "Ċ")
    assert table[0xAD] == "Ń"


# tokenizer.json


def test_tokenizer_json(write_json):
    path = write_json(tiny.tokenizer_json())
    check(bpe.load(path))
    tokenizer = bpe.from_tokenizer_json(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template) == (None, None, None)
    assert tokenizer.stop_ids == {0, 2}


def test_old_files_write_merges_as_strings(write_json):
    spec = tiny.tokenizer_json()
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    check(bpe.load(write_json(spec)))


def test_folder(tmp_path, write_json):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        bpe.load(tmp_path)
    write_json(tiny.tokenizer_json())
    check(bpe.load(tmp_path))
    config = {
        "bos_token": None,
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
        "chat_template": "{{ eos_token }}",
    }
    write_json(config, "tokenizer_config.json")
    tokenizer = bpe.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (None, 2, False)
    assert tokenizer.chat_template.render([]) == "<|im_end|>"
    config["chat_template"] = [{"name": "default", "template": "d"}, {"name": "x", "template": "x"}]
    write_json(config, "tokenizer_config.json")
    assert bpe.load(tmp_path).chat_template.render([]) == "d"
    (tmp_path / "chat_template.jinja").write_text("newer")
    assert bpe.load(tmp_path).chat_template.render([]) == "newer"
    write_json({"eos_token": "</s>"}, "tokenizer_config.json")
    with pytest.raises(ValueError, match="eos_token '</s>'"):
        bpe.load(tmp_path)


def test_a_post_processor_may_add_bos(tmp_path, write_json):
    spec = tiny.tokenizer_json()
    spec["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel", "trim_offsets": False},
            {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
            },
        ],
    }
    tokenizer = bpe.load(write_json(spec))
    assert (tokenizer.bos_id, tokenizer.add_bos) == (0, True)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def a_split(pattern: str, **changes) -> dict:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return step | changes


@pytest.mark.parametrize(
    ("steps", "patterns"),
    [
        ([a_split(QWEN2), BYTE_LEVEL], [QWEN2]),
        ([a_split(LLAMA3), BYTE_LEVEL], [LLAMA3]),
        ([BYTE_LEVEL | {"use_regex": True}], [GPT2]),
        (
            [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL | {"use_regex": True}],
            [SMOLLM],
        ),
        ([a_split("a"), a_split("b"), BYTE_LEVEL], ["a", "b"]),
    ],
)
def test_pre_tokenizers(write_json, steps, patterns):
    spec = tiny.tokenizer_json()
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    encoding = bpe.load(write_json(spec)).encoding
    assert [pattern.pattern for pattern in encoding._patterns] == patterns


def test_normalizer_and_ignore_merges(write_json):
    spec = tiny.tokenizer_json()
    spec["normalizer"] = {"type": "NFC"}
    spec["model"]["ignore_merges"] = True
    encoding = bpe.load(write_json(spec)).encoding
    assert encoding.encode("e\u0301") == encoding.encode("\u00e9")
    assert encoding.decode_tokens_bytes(encoding.encode("lo")) == [b"lo"]


def at(path: str, value):
    """A change of one place in a tree of dicts and lists; `...` removes it."""

    def change(spec):
        *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in parents:
            spec = spec[key]
        if value is ...:
            del spec[last]
        else:
            spec[last] = value

    return change


def both(*changes):
    return lambda spec: [change(spec) for change in changes]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("model", ...), "model is missing"),
        (at("model/type", "Unigram"), "type is 'Unigram'"),
        (at("model/dropout", 0.1), "dropout is 0.1"),
        (at("model/byte_fallback", True), "byte_fallback is True"),
        (at("model/end_of_word_suffix", "</w>"), "end_of_word_suffix"),
        (at("model/surprise", 1), "surprise is not known"),
        (at("surprise", 1), "surprise is not known"),
        (at("normalizer", {"type": "Lowercase"}), "normalizer: .*Lowercase"),
        (at("pre_tokenizer", None), "pre_tokenizer"),
        (at("pre_tokenizer", {"type": "Whitespace"}), "pre_tokenizer: .*Whitespace"),
        (at("pre_tokenizer/add_prefix_space", True), "pre_tokenizer: .*add_prefix_space"),
        (at("pre_tokenizer", a_split("a")), "the last step must be ByteLevel"),
        (
            at(
                "pre_tokenizer",
                {
                    "type": "Sequence",
                    "pretokenizers": [a_split("a", behavior="Removed"), BYTE_LEVEL],
                },
            ),
            "Removed",
        ),
        (
            at(
                "pre_tokenizer",
                {"type": "Sequence", "pretokenizers": [a_split("("), BYTE_LEVEL]},
            ),
            "not a regular expression",
        ),
        (at("post_processor", {"type": "BertProcessing"}), "post_processor: .*BertProcessing"),
        (at("decoder", {"type": "WordPiece"}), "decoder: type is 'WordPiece'"),
        (at("added_tokens/0/lstrip", True), r"added_tokens\[0\]: lstrip is True"),
        (at("added_tokens/0/id", "x"), r"added_tokens\[0\]: id is a str"),
        (at("added_tokens/1/content", "<|endoftext|>"), "has the ids 0 and 1"),
        (at("added_tokens/0/id", 3), "'<.endoftext.>' is 3 in added_tokens and 0 in model.vocab"),
        (
            both(at("added_tokens/1/id", 0), at("model/vocab/<|im_start|>", ...)),
            "the tokens '<.im_start.>' and '<.endoftext.>' have the id 0",
        ),
        (at("model/vocab/a", ...), "no token for the bytes b'a'"),
        (at("model/vocab/a b", 5000), "has the character ' '"),
        (at("model/vocab/zz", 3), "both have the id 3"),
        (at("model/merges/0", ["o", "nothing"]), "merge 0, .*does not join two tokens"),
        (at("model/merges/0", ["o", "w", "l"]), "merge 0, .*does not join two tokens"),
        (at("model/merges/0", ["z", "z"]), "makes what is no token"),
        (at("model/merges/1", ["o", "w"]), "listed twice"),
        (at("model/merges/0", 7), "merge 0, 7, does not join two tokens"),
        (at("model/merges/0", [["o"], "w"]), "merge 0, .*does not join two tokens"),
        (at("model/merges", None), "merges is missing"),
        (at("model/vocab/a", "x"), r"vocab\['a'\] is 'x', not an id"),
        (at("normalizer", {"type": "Sequence"}), "normalizers is missing"),
    ],
)
def test_what_we_do_not_know_is_refused(write_json, change, message):
    spec = tiny.tokenizer_json()
    change(spec)
    path = write_json(spec)
    with pytest.raises(ValueError, match=message) as error:
        bpe.load(path)
    assert str(path) in str(error.value)


def test_bytes_of_no_text_may_be_missing(write_json):
    spec = tiny.tokenizer_json()
    for byte in (0x04, 0xC0, 0xFF):
        del spec["model"]["vocab"][tiny.as_text(bytes([byte]))]
    assert bpe.load(write_json(spec)).encoding.dropped_bytes == b"\x04\xc0\xff"
    spec["model"]["unk_token"] = "<|endoftext|>"
    with pytest.raises(ValueError, match="unk_token"):
        bpe.load(write_json(spec))


# GGUF


def test_gguf_metadata():
    tokenizer = bpe.from_gguf(tiny.gguf_metadata())
    check(tokenizer)
    assert tokenizer.encoding.name == "Tiny"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (0, 2, False)
    assert tokenizer.stop_ids == {0, 2}
    assert tokenizer.chat_template.eos_token == "<|im_end|>"
    assert tokenizer.chat_template.render([{"role": "user", "content": "x"}]) == "x"
    # The unused token at the end has no text.
    assert tokenizer.encoding.n_vocab == len(tiny.SPECIAL) + len(tiny.IDS)


def test_gguf_metadata_as_bytes():
    """A fast reader leaves texts undecoded."""

    def as_bytes(value):
        if isinstance(value, list):
            return [as_bytes(v) for v in value]
        return value.encode() if isinstance(value, str) else value

    check(bpe.from_gguf({key: as_bytes(v) for key, v in tiny.gguf_metadata().items()}))


def test_gguf_metadata_as_numpy_arrays():
    np = pytest.importorskip("numpy")
    types = np.array(tiny.gguf_metadata()["tokenizer.ggml.token_type"], np.int32)
    meta = tiny.gguf_metadata() | {
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": np.bool_(False),
        "tokenizer.ggml.eos_token_id": np.uint32(2),
    }
    tokenizer = bpe.from_gguf(meta)
    check(tokenizer)
    assert tokenizer.eos_id == 2 and type(tokenizer.eos_id) is int


def test_gguf_llama3():
    meta = tiny.gguf_metadata() | {"tokenizer.ggml.pre": "llama-bpe"}
    del meta["tokenizer.ggml.add_bos_token"]
    tokenizer = bpe.from_gguf(meta)
    assert tokenizer.add_bos
    # Llama 3 takes a whole piece that is a token for that token, whatever the merges say.
    meta["tokenizer.ggml.merges"] = ["o w"]
    assert bpe.from_gguf(meta).encoding.encode("lo") == [tiny.IDS[b"lo"]]
    meta["tokenizer.ggml.pre"] = "gpt-2"
    assert len(bpe.from_gguf(meta).encoding.encode("lo")) == 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "llama", "model is 'llama'"),
        ("model", ..., "model is ''"),
        ("pre", "surprise", "pre is 'surprise'"),
        ("pre", ..., "pre is ''"),
        ("surprise", 1, "tokenizer.ggml.surprise is not known"),
        ("add_eos_token", True, "add_eos_token is True"),
        ("add_space_prefix", True, "add_space_prefix is True"),
        ("tokens", ..., "tokens is missing"),
        ("tokens", "abc", "tokens is a str"),
        ("token_type", [1, 2], "token_type 2"),
        ("token_type", [6] * (len(tiny.IDS) + 4), r"token_type\[0\] is 6"),
        ("tokens", ["a"] * (len(tiny.IDS) + 4), "at 0 and at 1"),
        ("merges", ["o w", "o w"], "listed twice"),
        ("merges", ["o  w"], "does not join two tokens"),
        ("bos_token_id", -1, "bos_token_id is -1"),
    ],
)
def test_gguf_metadata_that_we_do_not_know_is_refused(key, value, message):
    meta = tiny.gguf_metadata()
    meta["tokenizer.ggml." + key] = value
    if value is ...:
        del meta["tokenizer.ggml." + key]
    with pytest.raises(ValueError, match=message) as error:
        bpe.from_gguf(meta, source="model.gguf")
    assert "model.gguf" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 100, b"\0" * 1000])
def test_a_damaged_gguf_file_is_named(tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.gguf"):
        bpe.load(path)


@pytest.mark.parametrize("model", MODELS)
def test_the_models(model, load_model):
    tokenizer = load_model(model)
    special = tokenizer.encoding.special_tokens
    assert tokenizer.eos_id == special["<|im_end|>"]
    assert tokenizer.stop_ids == {special["<|im_end|>"], special["<|endoftext|>"]}
    assert not tokenizer.add_bos
    assert tokenizer.chat_template is not None


# .tiktoken


@pytest.fixture
def tiktoken_file(tmp_path):
    def write(tokens, name="tiny.tiktoken"):
        path = tmp_path / name
        lines = [f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)]
        path.write_text("".join(lines))
        return path

    return write


def test_tiktoken(tiktoken_file):
    path = tiktoken_file(tiny.TOKENS)
    special = {"<|endoftext|>": 1000}
    tokenizer = bpe.from_tiktoken(path, pattern=GPT2, special_tokens=special)
    assert tokenizer.encoding.ranks == {token: i for i, token in enumerate(tiny.TOKENS)}
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (1000, {1000})
    with pytest.raises(ValueError, match="holds no split pattern"):
        bpe.load(path)
    with pytest.raises(ValueError, match="its SHA-256 is"):
        bpe.load(tiktoken_file(tiny.TOKENS, "cl100k_base.tiktoken"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("YQ==", "line 268 is not"),
        ("YQ 300", "line 268 is not"),
        ("YQ== x", "line 268 is not"),
        ("YQ== 300", "line 268 repeats the token b'a' of line 98"),
        ("enp6 3", "line 268 repeats the rank 3 of line 4"),
        ("enp6 268", "line 268 has the rank 268, but none has 267"),
        ("enp6 -1", "must be a number from 0 to 4294967295, got -1"),
    ],
)
def test_a_damaged_tiktoken_file_is_named(tiktoken_file, line, message):
    path = tiktoken_file(tiny.TOKENS)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message) as error:
        bpe.from_tiktoken(path, pattern=GPT2, special_tokens={})
    assert str(path) in str(error.value)
    path = tiktoken_file(tiny.TOKENS[1:])
    with pytest.raises(ValueError, match="no token for the bytes"):
        bpe.from_tiktoken(path, pattern=GPT2, special_tokens={})


def test_a_special_token_may_fill_a_gap_in_the_ranks(tiktoken_file):
    path = tiktoken_file(tiny.TOKENS)
    path.write_text(path.read_text() + "enp6 268\n")
    tokenizer = bpe.from_tiktoken(path, pattern=GPT2, special_tokens={"<|endoftext|>": 267})
    assert tokenizer.encoding.encode("zzz") == [268]


# Anything else


def test_other_paths(tmp_path):
    with pytest.raises(FileNotFoundError):
        bpe.load(tmp_path / "nothing.gguf")
    (tmp_path / "vocab.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="unknown kind"):
        bpe.load(tmp_path / "vocab.pkl")
    (tmp_path / "tokenizer.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list"):
        bpe.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a JSON file"):
        bpe.load(tmp_path)


def test_importing_is_light():
    """`import bpe` is on the way of every command; what it does not need, it must not load."""
    code = "import sys, bpe; print(sys.modules.keys() & {'jax', 'numpy', 'jinja2', 'gguf'})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
