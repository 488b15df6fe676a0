"""Stop tokens: declarations in all files of a model, and well-known special tokens."""

import json
import logging

import pytest

import bpe
from bpe import stop_tokens
from tests.bpe import tiny

TURN = 267 + 3  # an added token that is not well known
EOT, IM_START, IM_END = 0, 1, 2


def folder(path, **files):
    """Write a tokenizer folder with the special token `<turn_over>` and the given JSON files."""
    spec = tiny.tokenizer_json()
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": TURN, "content": "<turn_over>"})
    for name, content in {"tokenizer": spec, **files}.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / f"{name}.json").write_text(text)
    return path


@pytest.mark.parametrize(
    "files",
    [
        {"generation_config": {"eos_token_id": TURN}},
        {"generation_config": {"eos_token_id": [IM_END, TURN]}},
        {"config": {"eos_token_id": TURN}},
        {"config": {"eos_token_id": [IM_END, TURN]}},
        {"config": {"eos_token_id": None, "text_config": {"eos_token_id": [TURN]}}},
        {"tokenizer_config": {"eos_token": "<turn_over>"}},
        {"tokenizer_config": {"eos_token": {"content": "<turn_over>", "lstrip": False}}},
        {"special_tokens_map": {"eos_token": "<turn_over>"}},
        {"special_tokens_map": {"eos_token": {"content": "<turn_over>"}}},
    ],
    ids=str,
)
def test_each_file_of_folder_adds_stop_ids(tmp_path, files):
    """Bug: a model with two stop tokens generated the second one as text, up to the limit."""
    assert bpe.load(folder(tmp_path)).stop_ids == {EOT, IM_END}
    assert bpe.load(folder(tmp_path, **files)).stop_ids == {EOT, IM_END, TURN}


def test_stop_ids_of_folder_files_are_combined(tmp_path):
    low = tiny.IDS[b"low"]
    tokenizer = bpe.load(
        folder(
            tmp_path,
            generation_config={"eos_token_id": TURN},
            config={"eos_token_id": low},
            tokenizer_config={"eos_token": "<|endoftext|>"},
            special_tokens_map={"eos_token": "<|im_start|>"},
        )
    )
    assert tokenizer.stop_ids == {EOT, IM_START, IM_END, TURN, low}
    assert tokenizer.eos_id == EOT  # the declaration of the tokenizer has priority


def test_eos_id_without_eos_token_is_first_declared_id(tmp_path):
    """In training, pairs of prompt and completion end with `eos_id`."""
    assert bpe.load(folder(tmp_path)).eos_id is None
    config = {"eos_token_id": [TURN, IM_END]}
    assert bpe.load(folder(tmp_path, generation_config=config)).eos_id == TURN


@pytest.mark.parametrize(
    "value", [10**6, -1, 2**80, "</s>", "2", 2.0, True, {"id": 2}, [10**6, IM_END]], ids=str
)
@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_unknown_stop_id_is_logged_and_ignored(tmp_path, caplog, name, value):
    caplog.set_level(logging.WARNING)
    tokenizer = bpe.load(folder(tmp_path, **{name: {"eos_token_id": value}}))
    assert tokenizer.stop_ids == {EOT, IM_END}
    assert [f"{name}.json" in record.getMessage() for record in caplog.records] == [True]
    bpe.load(tmp_path)
    assert len(caplog.records) == 1  # logged once


@pytest.mark.parametrize("content", ["{", "[1]", "null", ""])
@pytest.mark.parametrize("name", ["generation_config", "special_tokens_map"])
def test_damaged_optional_file_is_logged_and_ignored(tmp_path, caplog, name, content):
    caplog.set_level(logging.WARNING)
    tokenizer = bpe.load(folder(tmp_path, **{name: content}))
    assert tokenizer.stop_ids == {EOT, IM_END}
    assert [f"{name}.json" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("key", ["eos", "eot", "eom"])
def test_gguf_metadata_adds_stop_ids(caplog, key):
    name = f"tokenizer.ggml.{key}_token_id"
    meta = tiny.gguf_metadata()
    tokenizer = bpe.from_gguf({**meta, name: IM_START})
    assert tokenizer.stop_ids == {EOT, IM_START, IM_END}
    caplog.set_level(logging.WARNING)
    for bad in (10**6, 2**32 - 1, -1):
        tokenizer = bpe.from_gguf({**meta, name: bad}, source="model.gguf")
        assert tokenizer.stop_ids == {EOT, IM_END}
        assert name in caplog.records[-1].getMessage() and str(bad) in caplog.text
    assert tokenizer.eos_id == (None if key == "eos" else IM_END)


@pytest.mark.parametrize(
    ("special", "ends"),
    [
        (["<|eot_id|>", "<|eom_id|>", "<|start_header_id|>"], ["<|eot_id|>", "<|eom_id|>"]),
        (["<end_of_turn>", "<start_of_turn>", "<eos>", "<bos>"], ["<end_of_turn>", "<eos>"]),
        (["<s>", "</s>", "[INST]"], ["</s>"]),
        (["<|end|>", "<|user|>"], ["<|end|>"]),
        # o200k_harmony: <|end|> ends a message, after which the model continues.
        (["<|end|>", "<|return|>", "<|call|>"], ["<|return|>", "<|call|>"]),
        # Tokens that separate files.
        (["<|file_sep|>", "<|repo_name|>", "<|endoftext|>"], ["<|endoftext|>"]),
        ([], []),
    ],
)
def test_well_known_special_tokens_are_stop_ids(special, ends):
    ranks = {bytes([byte]): byte for byte in range(256)}
    ids = {token: 256 + i for i, token in enumerate(special)}
    encoding = bpe.Encoding("x", pattern=r"[\s\S]", ranks=ranks, special_tokens=ids)
    assert stop_tokens.well_known_stop_ids(encoding) == {ids[token] for token in ends}


def test_ordinary_token_with_well_known_text_is_no_stop_id():
    """`</s>` is also an HTML end tag, and could be an ordinary token of a vocabulary."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"</": 256, b"s>": 257, b"</s>": 258}
    encoding = bpe.Encoding("x", pattern=r"[\s\S]+", ranks=ranks, special_tokens={})
    assert stop_tokens.well_known_stop_ids(encoding) == set()


@pytest.mark.parametrize("ending", ["<turn_over>", "\n<turn_over>", "[over]", " [over]"])
def test_assistant_span_includes_declared_stop_token(tmp_path, ending):
    """A model that is trained without the stop token never ends its message."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ " + json.dumps(ending) + " }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    folder(
        tmp_path,
        tokenizer_config={"eos_token": "<|endoftext|>", "chat_template": template},
        generation_config={"eos_token_id": [EOT, TURN]},
    )
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"][-1]["content"] = ending.strip()
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = bpe.load(tmp_path)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "low"}]
    ids, spans = tokenizer.chat_template.encode_with_assistant_spans(tokenizer.encoding, messages)
    (start, end) = spans[0]
    assert tokenizer.encoding.decode(ids[start:end]) == f"low{ending}"
    assert ids[end - 1] == TURN
