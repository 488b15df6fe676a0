"""Vocabulary files: the same encoding from every format, and an error for damaged files."""

import base64
import json
import subprocess
import sys

import pytest

import bpe
from bpe.formats import bytes_to_unicode
from bpe.log_once import warn_once
from bpe.pretokenize import GPT2, LLAMA3, O200K, QWEN2, SMOLLM, split
from tests.bpe import tiny
from tests.bpe.conftest import MODELS
from tests.naming import names, naming

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


def test_bytes_to_unicode_matches_gpt2():
    characters = bytes_to_unicode()
    assert len(set(characters.values())) == 256
    assert [characters[ord(c)] for c in "a \n"] == ["a", "Ġ", "Ċ"]
    assert characters[0xAD] == "Ń"


# tokenizer.json


def test_tokenizer_json_loads_tiny_encoding(write_json):
    path = write_json(tiny.tokenizer_json())
    check(bpe.load(path))
    tokenizer = bpe.from_tokenizer_json(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template) == (None, None, None)
    assert tokenizer.stop_ids == {0, 2}


def test_tokenizer_json_with_merges_as_strings_loads(write_json):
    spec = tiny.tokenizer_json()
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    check(bpe.load(write_json(spec)))


def test_folder_files_set_special_tokens_and_template(tmp_path, write_json):
    with pytest.raises(FileNotFoundError, match=naming(tmp_path, "tokenizer.json")):
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
    write_json({"bos_token": "<s>"}, "tokenizer_config.json")
    with pytest.raises(ValueError, match=naming("bos_token", "'<s>'")):
        bpe.load(tmp_path)


def test_folder_with_unknown_eos_token_uses_generation_config(tmp_path, write_json, caplog):
    """Bug: the folder was rejected, although the eos_token is not needed."""
    write_json(tiny.tokenizer_json())
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}")
    write_json({"eos_token": "</s>"}, "tokenizer_config.json")
    write_json({"eos_token_id": 2}, "generation_config.json")
    tokenizer = bpe.load(tmp_path)
    assert tokenizer.eos_id == 2 and 2 in tokenizer.stop_ids
    assert tokenizer.chat_template.render([]) == "</s>"
    assert [names(record.getMessage(), "eos_token", "'</s>'") for record in caplog.records] == [
        True
    ]


@pytest.mark.parametrize("token", ["low", "!"])
def test_folder_with_ordinary_eos_token_stops_at_it(tmp_path, write_json, token):
    """The token stays an ordinary token, because merges need it."""
    write_json(tiny.tokenizer_json())
    before = bpe.load(tmp_path).encoding
    write_json({"eos_token": token}, "tokenizer_config.json")
    tokenizer = bpe.load(tmp_path)
    assert before.encode_single_token(token) in tokenizer.stop_ids
    assert tokenizer.encoding.special_tokens == before.special_tokens


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_folder_with_eos_token_in_model_vocab_only_makes_it_special(tmp_path, write_json, file):
    """The eos_token becomes a special token with the id of the vocabulary, as in transformers."""
    spec = tiny.tokenizer_json()
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != "<|im_end|>"]
    spec["model"]["vocab"]["<|im_end|>"] = ids["<|im_end|>"]
    write_json(spec)
    write_json({"eos_token": "<|im_end|>"}, file)
    tokenizer = bpe.load(tmp_path)
    assert tokenizer.eos_id == ids["<|im_end|>"] and tokenizer.eos_id in tokenizer.stop_ids
    assert tokenizer.encoding.special_tokens["<|im_end|>"] == ids["<|im_end|>"]


def test_post_processor_with_prefix_token_sets_add_bos(tmp_path, write_json):
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


def split_step(pattern: str, **changes) -> dict:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return step | changes


@pytest.mark.parametrize(
    ("steps", "patterns"),
    [
        ([split_step(QWEN2), BYTE_LEVEL], [QWEN2]),
        ([split_step(LLAMA3), BYTE_LEVEL], [LLAMA3]),
        ([BYTE_LEVEL | {"use_regex": True}], [GPT2]),
        (
            [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL | {"use_regex": True}],
            [SMOLLM],
        ),
        ([split_step("a"), split_step("b"), BYTE_LEVEL], ["a", "b"]),
    ],
)
def test_pre_tokenizer_steps_become_patterns(write_json, steps, patterns):
    spec = tiny.tokenizer_json()
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    encoding = bpe.load(write_json(spec)).encoding
    assert [pattern.pattern for pattern in encoding._patterns] == patterns


@pytest.mark.parametrize(
    ("form", "text", "same"),
    [("NFC", "e\u0301", "\u00e9"), ("NFD", "\u00e9", "e\u0301"), ("NFKC", "\ufb01", "fi"),
     ("NFKD", "\ufb01\u00e9", "fie\u0301")],
)  # fmt: skip
def test_normalization_form_is_applied(write_json, form, text, same):
    spec = tiny.tokenizer_json()
    spec["normalizer"] = {"type": form}
    encoding = bpe.load(write_json(spec)).encoding
    assert encoding.encode(text) == encoding.encode(same)
    assert encoding.decode(encoding.encode(text)) == same


def test_normalizer_and_ignore_merges_are_applied(write_json):
    spec = tiny.tokenizer_json()
    spec["normalizer"] = {"type": "NFC"}
    spec["model"]["ignore_merges"] = True
    encoding = bpe.load(write_json(spec)).encoding
    assert encoding.encode("e\u0301") == encoding.encode("\u00e9")
    assert encoding.decode_tokens_bytes(encoding.encode("lo")) == [b"lo"]


def set_value(path: str, value):
    """Return a function that sets one value in nested dicts and lists; `...` removes it."""

    def change(spec):
        *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in parents:
            spec = spec[key]
        if value is ...:
            del spec[last]
        else:
            spec[last] = value

    return change


def all_changes(*changes):
    return lambda spec: [change(spec) for change in changes]


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (set_value("model", ...), ["model"]),
        (set_value("model/dropout", 0.1), ["model", "dropout", 0.1]),
        (set_value("model/end_of_word_suffix", "</w>"), ["model", "end_of_word_suffix", "'</w>'"]),
        (set_value("normalizer", {"type": "Lowercase"}), ["normalizer", "Lowercase"]),
        (set_value("pre_tokenizer", None), ["pre_tokenizer"]),
        (set_value("pre_tokenizer", {"type": "Whitespace"}), ["pre_tokenizer", "Whitespace"]),
        (set_value("pre_tokenizer/add_prefix_space", True), ["pre_tokenizer", "add_prefix_space"]),
        (set_value("pre_tokenizer", split_step("a")), ["pre_tokenizer", "ByteLevel"]),
        (
            set_value(
                "pre_tokenizer",
                {
                    "type": "Sequence",
                    "pretokenizers": [split_step("a", behavior="Removed"), BYTE_LEVEL],
                },
            ),
            ["pre_tokenizer", "'Removed'"],
        ),
        (
            set_value(
                "pre_tokenizer",
                {"type": "Sequence", "pretokenizers": [split_step("("), BYTE_LEVEL]},
            ),
            ["pattern", "'('"],
        ),
        (
            set_value("post_processor", {"type": "BertProcessing"}),
            ["post_processor", "BertProcessing"],
        ),
        (set_value("decoder", {"type": "WordPiece"}), ["decoder", "type", "'WordPiece'"]),
        (set_value("added_tokens/0/lstrip", 1.5), ["added_tokens[0]", "lstrip", 1.5]),
        (set_value("added_tokens/0/id", "x"), ["added_tokens[0]", "id", "str"]),
        (set_value("added_tokens/1/content", "<|endoftext|>"), ["'<|endoftext|>'", 0, 1]),
        (
            set_value("added_tokens/0/id", 3),
            ["'<|endoftext|>'", 3, "added_tokens", 0, "model.vocab"],
        ),
        (
            all_changes(
                set_value("added_tokens/1/id", 0), set_value("model/vocab/<|im_start|>", ...)
            ),
            ["'<|im_start|>'", "'<|endoftext|>'", 0],
        ),
        (set_value("model/vocab/a", ...), ["b'a'"]),
        (set_value("model/vocab/zz", 3), [r"b'\x00'", "b'zz'", 3]),
        (set_value("model/merges/0", ["o", "nothing"]), ["merge 0", "['o', 'nothing']"]),
        (set_value("model/merges/0", ["o", "w", "l"]), ["merge 0", "['o', 'w', 'l']"]),
        (set_value("model/merges/0", ["z", "z"]), ["(b'z', b'z')"]),
        (set_value("model/merges/1", ["o", "w"]), ["(b'o', b'w')"]),
        (set_value("model/merges/0", 7), ["merge 0", 7]),
        (set_value("model/merges/0", [["o"], "w"]), ["merge 0", "[['o'], 'w']"]),
        (set_value("model/merges", None), ["model", "merges"]),
        (set_value("model/vocab/a", "x"), ["model", "vocab['a']", "'x'"]),
        (set_value("normalizer", {"type": "Sequence"}), ["normalizer", "normalizers"]),
    ],
)
def test_tokenizer_json_with_unsupported_setting_names_it(write_json, change, facts):
    spec = tiny.tokenizer_json()
    change(spec)
    path = write_json(spec)
    with pytest.raises(ValueError, match=naming(path, *facts)):
        bpe.load(path)


def test_bytes_without_token_are_dropped_bytes(write_json):
    spec = tiny.tokenizer_json()
    for byte in (0x04, 0xC0, 0xFF):
        del spec["model"]["vocab"][tiny.as_text(bytes([byte]))]
    assert bpe.load(write_json(spec)).encoding.dropped_bytes == b"\x04\xc0\xff"
    spec["model"]["unk_token"] = "<|endoftext|>"
    with pytest.raises(ValueError, match="unk_token"):
        bpe.load(write_json(spec))


@pytest.mark.parametrize(
    "change",
    [
        set_value("surprise", 1),
        set_value("model/surprise", 1),
        set_value("added_tokens/0/surprise", 1),
        set_value("padding", {"strategy": "BatchLongest", "pad_id": 0}),
        set_value("truncation", {"max_length": 8, "strategy": "LongestFirst"}),
        set_value("added_tokens/0/normalized", True),
        set_value("added_tokens/0/special", False),
        all_changes(
            set_value("normalizer", {"type": "NFC"}), set_value("added_tokens/0/normalized", True)
        ),
        set_value("model/unk_token", "<|endoftext|>"),
        set_value("model/dropout", 0.0),
    ],
)
def test_tokenizer_json_with_irrelevant_keys_loads(tmp_path, write_json, change):
    """Bug: a key that `tokenizers` does not read raised an error."""
    spec = tiny.tokenizer_json()
    change(spec)
    write_json(spec)
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}},
        "clean_up_tokenization_spaces": True,
        "extra_special_tokens": {},
        "model_max_length": 10**30,
        "processor_class": "x",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unsloth_fixed": True,
    }
    write_json(config, "tokenizer_config.json")
    assert bpe.load(tmp_path).encoding.encode(TEXT, allowed_special="all") == IDS


def test_unknown_key_is_logged_once(write_json, caplog):
    warn_once.cache_clear()
    path = write_json(tiny.tokenizer_json() | {"surprise": 1, "another": None})
    for _ in range(2):
        check(bpe.load(path))
    (record,) = caplog.records
    assert "'surprise'" in record.getMessage() and "another" not in record.getMessage()


# Chat templates


def templates(folder) -> dict[str, str]:
    """Return the source of each template by name."""
    tokenizer = bpe.load(folder)
    named = {name: template.source for name, template in tokenizer.named_templates.items()}
    default = tokenizer.chat_template
    return named | ({} if default is None else {"default": default.source})


@pytest.fixture
def model_folder(tmp_path, write_json):
    write_json(tiny.tokenizer_json())
    return tmp_path


def test_chat_template_sources_follow_order_of_transformers(model_folder, write_json):
    write_json({"chat_template": "old"}, "chat_template.json")
    assert templates(model_folder) == {"default": "old"}
    listed = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    write_json({"chat_template": listed}, "chat_template.json")
    assert templates(model_folder) == {"default": "d", "tool_use": "t"}
    write_json({"chat_template": "config"}, "tokenizer_config.json")
    assert templates(model_folder) == {"default": "config"}
    listed.append({"name": "rag", "template": "r"})
    write_json({"chat_template": listed}, "tokenizer_config.json")
    assert templates(model_folder) == {"default": "d", "tool_use": "t", "rag": "r"}
    (model_folder / "chat_template.jinja").write_text("newer")
    assert templates(model_folder) == {"default": "newer"}
    (model_folder / "additional_chat_templates").mkdir()
    (model_folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    assert templates(model_folder) == {"default": "newer", "tool_use": "{{ tools }}"}
    (model_folder / "chat_template.jinja").unlink()
    assert templates(model_folder) == {"tool_use": "{{ tools }}"}
    assert bpe.load(model_folder).chat_template is None


def test_tool_use_template_with_tools_is_used(model_folder, write_json):
    source = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    listed = {"default": source, "tool_use": "{{ tools[0].name }}" + source}
    write_json({"chat_template": listed, "eos_token": "<|im_end|>"}, "tokenizer_config.json")
    tokenizer = bpe.load(model_folder)
    template, tools = tokenizer.chat_template, [{"name": "low"}]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    plain, with_tools = "a<|im_end|>b<|im_end|>", "lowa<|im_end|>b<|im_end|>"
    assert template.render(messages) == plain
    assert template.render(messages, tools=tools) == with_tools
    encoding = tokenizer.encoding
    assert encoding.decode(template.encode(encoding, messages, tools=tools)) == with_tools
    (span,) = template.assistant_spans(messages, tools=tools)
    assert with_tools[slice(*span)] == "b<|im_end|>"
    ids, spans = template.encode_with_assistant_spans(encoding, messages, tools=tools)
    assert [encoding.decode(ids[a:b]) for a, b in spans] == ["b<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.json", "{"),
        ("chat_template.json", "[]"),
        ("chat_template.json", "{}"),
        ("chat_template.json", '{"chat_template": 5}'),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("tokenizer_config.json", '{"chat_template": [5]}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", '{"chat_template": [{"template": "x"}]}'),
        ("chat_template.jinja", "\udcff"),
    ],
)
def test_error_names_damaged_chat_template_file(model_folder, name, content):
    (model_folder / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=name):
        bpe.load(model_folder)


# GGUF


def test_gguf_metadata_loads_tiny_encoding():
    tokenizer = bpe.from_gguf(tiny.gguf_metadata())
    check(tokenizer)
    assert tokenizer.encoding.name == "Tiny"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (0, 2, False)
    assert tokenizer.stop_ids == {0, 2}
    assert tokenizer.chat_template.eos_token == "<|im_end|>"
    assert tokenizer.chat_template.render([{"role": "user", "content": "x"}]) == "x"
    # The unused token at the end is left out.
    assert tokenizer.encoding.n_vocab == len(tiny.SPECIAL) + len(tiny.IDS)


def test_gguf_metadata_as_bytes_loads():
    """Some readers return strings as UTF-8 bytes."""

    def as_bytes(value):
        if isinstance(value, list):
            return [as_bytes(v) for v in value]
        return value.encode() if isinstance(value, str) else value

    check(bpe.from_gguf({key: as_bytes(v) for key, v in tiny.gguf_metadata().items()}))


def test_gguf_metadata_as_numpy_arrays_loads():
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


def test_gguf_llama3_adds_bos_and_ignores_merges():
    meta = tiny.gguf_metadata() | {"tokenizer.ggml.pre": "llama-bpe"}
    del meta["tokenizer.ggml.add_bos_token"]
    tokenizer = bpe.from_gguf(meta)
    assert tokenizer.add_bos
    # In Llama 3, a piece that equals a token becomes this token, even without merges for it.
    meta["tokenizer.ggml.merges"] = ["o w"]
    assert bpe.from_gguf(meta).encoding.encode("lo") == [tiny.IDS[b"lo"]]
    meta["tokenizer.ggml.pre"] = "gpt-2"
    assert len(bpe.from_gguf(meta).encoding.encode("lo")) == 2


@pytest.mark.parametrize(
    ("names", "pattern", "bos"),
    [
        ("gpt-2 phi-2 exaone4 gigachat jina-es", GPT2, False),
        ("smollm starcoder refact codeshell", SMOLLM, False),
        ("jina-v1-en jina-v2-code roberta-bpe modern-bert", GPT2, False),
        ("llama-bpe llama3 llama-v3 falcon3 lfm2 jina-v5-nano", LLAMA3, True),
        ("smaug-bpe dbrx glm4 chatglm-bpe", LLAMA3, False),
        ("qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan f2llmv2", QWEN2, False),
        ("gpt-4o llama4 granite-embed-multi-97m", O200K, False),
    ],
)
def test_gguf_pre_tokenizers_of_one_group_have_same_pattern(names, pattern, bos):
    """Bug: only the first name of a group was recognized."""
    for name in names.split():
        meta = tiny.gguf_metadata() | {"tokenizer.ggml.pre": name}
        del meta["tokenizer.ggml.add_bos_token"]
        tokenizer = bpe.from_gguf(meta)
        assert [rule.pattern for rule in tokenizer.encoding._patterns] == [pattern]
        assert tokenizer.add_bos == bos


PIECES_TEXT = "Hi, 12345678 we'll 1990年の日本 ไทย x\n\n\ty.<sentinel:3>  한국어"


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        (
            "kimi-k2",
            "Hi|,| |123|456|78| we'll| |199|0|"
            "年|の|日本| ไทย| x|\n\n|\ty|.<|sentinel|:|3|>| | 한국어",
        ),
        (
            "afmoe",
            "Hi|,| |12|345|678| we|'ll| |1|990|"
            "年の日本| |ไ|ทย| x|\n\n|\ty|.<|sentinel|:|3|>|  |한국어",
        ),
        (
            "youtu",
            "Hi|,| |1|2|3|4|5|6|7|8| we'll| |1|9|9|0|"
            "年の日本| ไทย| x|\n\n|\ty|.<|sentinel|:|3|>|  |한국어",
        ),
        (
            "spark2_5",
            "Hi|,| |1|2|3|4|5|6|7|8| we|'ll| |1|9|9|0|"
            "年の日本| ไทย| x|\n|\n|\ty|.<|sentinel|:|3|>| | 한국어",
        ),
        (
            "minicpm5",
            "Hi|,| |123|456|78| we|'ll| |199|0|"
            "年の日本| ไทย| x|\n\n|\ty|.<|sentinel|:|3|>| | 한국어",
        ),
        (
            "ufakzeka",
            "Hi|,| |1|2|3|4|5|6|7|8| we|'ll| |1|9|9|0|"
            "年の日本| ไทย| x|\n\n|\ty|.<|sentinel|:|3|>| | 한국어",
        ),
        (
            "chameleon",
            "Hi|,| |1|2|3|4|5|6|7|8| we|'|ll| |1|9|9|0|"
            "年の日本| ไทย| x|\n|\n|\t|y|.|<|sentinel|:|3|>|  |한국어",
        ),
    ],
)
def test_gguf_pre_name_splits_as_llama_cpp(name, pieces):
    meta = tiny.gguf_metadata() | {"tokenizer.ggml.pre": name}
    encoding = bpe.from_gguf(meta).encoding
    assert "|".join(split(encoding._patterns, PIECES_TEXT)) == pieces


def test_gguf_of_encoder_adds_eos():
    """Bug: GGUF files of RoBERTa and Qwen3-Embedding were refused because of these flags."""
    flags = {"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.add_sep_token": True}
    tokenizer = bpe.from_gguf(tiny.gguf_metadata() | flags)
    assert (tokenizer.add_bos, tokenizer.add_eos) == (False, True)


@pytest.mark.parametrize("pre", ["gemma4", "sarvam-moe", "granite-embed-multi-311m"])
def test_gguf_pre_name_of_characters_reads_merges_of_characters(pre):
    meta = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["<unk>", "\u2581", "a", "\u2581a", "é"]
        + [f"<0x{byte:02X}>" for byte in range(256)],
        "tokenizer.ggml.token_type": [2, 1, 1, 1, 1] + [6] * 256,
        "tokenizer.ggml.merges": ["\u2581 a"],
        "tokenizer.ggml.bos_token_id": 0,
    }
    tokenizer = bpe.from_gguf(meta)
    assert tokenizer.encoding.encode_ordinary("a aé\n") == [2, 3, 4, 5 + 10]
    assert tokenizer.add_bos == (pre != "sarvam-moe")


def test_gguf_metadata_with_irrelevant_keys_loads():
    """Bug: flags that are off, and a copy of tokenizer.json, raised errors."""
    more = {
        "tokenizer.ggml.add_sep_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.remove_extra_whitespaces": False,
        "tokenizer.ggml.token_type_count": 1,
        "tokenizer.ggml.scores": [0.0],
        "tokenizer.ggml.seperator_token_id": 2,
        "tokenizer.ggml.fim_pre_token_id": 1,
        "tokenizer.ggml.surprise": 1,
        "tokenizer.huggingface.json": "{}",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "t",
        "general.type": "model",
    }
    tokenizer = bpe.from_gguf(tiny.gguf_metadata() | more)
    check(tokenizer)
    assert tokenizer.chat_template.render([], tools=[]) == "t"
    assert tokenizer.named_templates["tool_use"].source == "t"


@pytest.mark.parametrize(
    ("key", "value", "facts"),
    [
        ("model", "bert", ["model", "'bert'"]),
        ("remove_extra_whitespaces", True, ["remove_extra_whitespaces"]),
        ("normalizer.lowercase", True, ["normalizer.lowercase"]),
        ("precompiled_charsmap", [1, 2], ["precompiled_charsmap"]),
        ("model", ..., ["model", "''"]),
        ("pre", "surprise", ["pre", "'surprise'"]),
        ("pre", "whitespace", ["pre", "'whitespace'"]),
        ("add_space_prefix", True, ["add_space_prefix", True]),
        ("tokens", ..., ["tokens"]),
        ("tokens", "abc", ["tokens", "str"]),
        ("token_type", [1, 2], ["tokens", len(tiny.IDS) + 4, 2]),
        ("token_type", [6] * (len(tiny.IDS) + 4), ["token_type[0]", 6]),
        ("tokens", ["a"] * (len(tiny.IDS) + 4), ["tokens", "'a'", 0, 1]),
        ("merges", ["o w", "o w"], ["(b'o', b'w')"]),
        ("merges", ["o  w"], ["merge 0", "['o', '', 'w']"]),
        ("bos_token_id", -1, ["bos_token_id", "-1"]),
    ],
)
def test_gguf_metadata_with_unsupported_value_names_it(key, value, facts):
    meta = tiny.gguf_metadata()
    meta["tokenizer.ggml." + key] = value
    if value is ...:
        del meta["tokenizer.ggml." + key]
    with pytest.raises(ValueError, match=naming("model.gguf", *facts)):
        bpe.from_gguf(meta, source="model.gguf")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 100, b"\0" * 1000])
def test_error_names_damaged_gguf_file(tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.gguf"):
        bpe.load(path)


@pytest.mark.parametrize("model", MODELS)
def test_pulled_models_declare_stop_tokens_and_template(model, load_model):
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


def test_tiktoken_file_loads_ranks(tiktoken_file):
    path = tiktoken_file(tiny.TOKENS)
    special = {"<|endoftext|>": 1000}
    tokenizer = bpe.from_tiktoken(path, pattern=GPT2, special_tokens=special)
    assert tokenizer.encoding.ranks == {token: i for i, token in enumerate(tiny.TOKENS)}
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (1000, {1000})
    with pytest.raises(ValueError, match=naming(path, "pattern", "cl100k_base")):
        bpe.load(path)
    with pytest.raises(ValueError, match=naming("cl100k_base.tiktoken", "SHA-256")):
        bpe.load(tiktoken_file(tiny.TOKENS, "cl100k_base.tiktoken"))


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        ("YQ==", ["line 268", "b'YQ=='"]),
        ("YQ 300", ["line 268", "b'YQ 300'"]),
        ("YQ== x", ["line 268", "b'YQ== x'"]),
        ("YQ== 300", ["line 268", "b'a'", "line 98"]),
        ("enp6 3", ["line 268", "rank 3", "line 4"]),
        ("enp6 268", ["line 268", "rank 268", 267]),
        ("enp6 -1", [2**32 - 1, "-1"]),
    ],
)
def test_damaged_tiktoken_file_names_the_line(tiktoken_file, line, facts):
    path = tiktoken_file(tiny.TOKENS)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=naming(path, *facts)):
        bpe.from_tiktoken(path, pattern=GPT2, special_tokens={})
    path = tiktoken_file(tiny.TOKENS[1:])
    with pytest.raises(ValueError, match=naming(path, r"b'\x00'")):
        bpe.from_tiktoken(path, pattern=GPT2, special_tokens={})


def test_tiktoken_gap_at_special_token_id_is_valid(tiktoken_file):
    path = tiktoken_file(tiny.TOKENS)
    path.write_text(path.read_text() + "enp6 268\n")
    tokenizer = bpe.from_tiktoken(path, pattern=GPT2, special_tokens={"<|endoftext|>": 267})
    assert tokenizer.encoding.encode("zzz") == [268]


# Other files


def test_unreadable_paths_raise(tmp_path):
    with pytest.raises(FileNotFoundError):
        bpe.load(tmp_path / "nothing.gguf")
    (tmp_path / "vocab.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=naming(tmp_path / "vocab.pkl")):
        bpe.load(tmp_path / "vocab.pkl")
    (tmp_path / "tokenizer.json").write_text("[1]")
    with pytest.raises(ValueError, match=naming(tmp_path / "tokenizer.json", "list")):
        bpe.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=naming(tmp_path / "tokenizer.json", "JSON")):
        bpe.load(tmp_path)


def test_import_bpe_loads_no_heavy_modules():
    """Every command imports bpe, so it must not import slow packages that it may not need."""
    code = "import sys, bpe; print(sys.modules.keys() & {'jax', 'numpy', 'jinja2', 'gguf'})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.parity
@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": "config"},
        {"tokenizer_config.json": [{"name": "default", "template": "d"}]},
        {
            "tokenizer_config.json": [
                {"name": "default", "template": "d"},
                {"name": "rag", "template": "r"},
            ]
        },
        {"tokenizer_config.json": "config", "chat_template.jinja": "jinja"},
        {"tokenizer_config.json": "config", "additional_chat_templates/rag.jinja": "r"},
        {"chat_template.jinja": "jinja", "additional_chat_templates/tool_use.jinja": "t"},
        {"chat_template.json": "old", "tokenizer_config.json": "config"},
    ],
    ids=str,
)
def test_chat_templates_match_transformers(model_folder, write_json, files):
    from transformers import PreTrainedTokenizerFast

    spec = tiny.tokenizer_json()
    spec["decoder"] |= {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    write_json(spec)
    (model_folder / "additional_chat_templates").mkdir()
    for name, content in files.items():
        if name.endswith(".json"):
            write_json({"chat_template": content}, name)
        else:
            (model_folder / name).write_text(content)
    theirs = PreTrainedTokenizerFast.from_pretrained(model_folder).chat_template
    assert templates(model_folder) == (theirs if isinstance(theirs, dict) else {"default": theirs})


def test_folder_with_vocab_json_and_merges_txt_loads(tmp_path, write_json):
    spec = tiny.tokenizer_json()
    write_json(spec["model"]["vocab"], "vocab.json")
    lines = [" ".join(pair) for pair in spec["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", "utf-8")
    added = {str(id): {"content": token, "special": True} for token, id in tiny.SPECIAL.items()}
    config = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": added}
    write_json(config | {"eos_token": "<|endoftext|>"}, "tokenizer_config.json")
    tokenizer = bpe.load(tmp_path)
    check(tokenizer)
    assert tokenizer.eos_id == 0
    write_json(config | {"tokenizer_class": "OtherTokenizer"}, "tokenizer_config.json")
    with pytest.raises(ValueError, match=naming("tokenizer_config.json", "tokenizer_class")):
        bpe.load(tmp_path)
    write_json(config, "tokenizer_config.json")
    (tmp_path / "merges.txt").write_text("o w l\n")
    with pytest.raises(ValueError, match=naming("merges.txt", 1)):
        bpe.load(tmp_path)


@pytest.mark.parametrize("content", ["  ", "low!"])
def test_added_token_of_plain_text_is_matched_in_every_text(write_json, content):
    """Bug: GPT-NeoX was rejected, because its added tokens are runs of spaces."""
    spec = tiny.tokenizer_json()
    token = {"id": 900, "content": content, "special": False, "normalized": True}
    spec["added_tokens"].append(token)
    encoding = bpe.load(write_json(spec)).encoding
    assert 900 in encoding.encode_ordinary(f"a{content}b")
    assert encoding.decode(encoding.encode_ordinary(f"a{content}b")) == f"a{content}b"
    long = f"a{content}b " * 8000
    (fast,) = encoding._encode_fast([long], frozenset())
    assert fast.tolist().count(900) == 8000
