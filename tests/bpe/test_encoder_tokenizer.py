"""Test the tokenizers of encoders: special tokens around texts and pairs, lower case, GGUF."""

import json

import gguf
import pytest

import bpe
from bpe.encoder_tokenizer import wordpiece_from_gguf
from bpe.formats.bert import load_wordpiece
from bpe.formats.post_processor import read_post_processor
from bpe.post_processor import PostProcessor, Slot
from tests.naming import naming
from tests.serve.tiny_encoders import VOCAB

ROBERTA = {"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 2]}
BERT = {"type": "BertProcessing", "cls": ["[CLS]", 1], "sep": ["[SEP]", 2]}
QWEN = {
    "type": "Sequence",
    "processors": [
        {"type": "ByteLevel", "trim_offsets": False},
        {
            "type": "TemplateProcessing",
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<end>", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
                {"SpecialToken": {"id": "<end>", "type_id": 1}},
            ],
            "special_tokens": {"<end>": {"id": "<end>", "ids": [7], "tokens": ["<end>"]}},
        },
    ],
}


@pytest.mark.parametrize(
    ("spec", "single", "pair", "types"),
    [
        (None, [10, 11], [10, 11, 12], [0, 0, 0]),
        (ROBERTA, [0, 10, 11, 2], [0, 10, 11, 2, 2, 12, 2], [0] * 7),
        (BERT, [1, 10, 11, 2], [1, 10, 11, 2, 12, 2], [0, 0, 0, 0, 1, 1]),
        (QWEN, [10, 11, 7], [10, 11, 12, 7], [0, 0, 1, 1]),
    ],
)
def test_post_processor_returns_special_tokens_and_token_type_ids(spec, single, pair, types):
    processor = read_post_processor(spec, "file", {})
    assert processor.process([10, 11]) == single
    assert processor.process_pair([10, 11], [12]) == (pair, types)
    assert [*processor.prefix, 10, 11, *processor.suffix] == single


@pytest.mark.parametrize(
    "spec",
    [
        {"type": "Unknown"},
        {"type": "Sequence", "processors": [BERT, ROBERTA]},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}}]},
        {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B"}}]},
        {"type": "TemplateProcessing", "single": [3]},
    ],
)
def test_unsupported_post_processor_is_rejected(spec):
    with pytest.raises(ValueError, match=naming("the file: post_processor")):
        read_post_processor(spec, "the file: post_processor", {})


def test_max_length_cuts_longer_text_of_pair_first():
    processor = read_post_processor(BERT, "file", {})
    long, short = list(range(100, 110)), [200, 201]
    assert processor.process_pair(long, short, 8)[0] == [1, 100, 101, 102, 2, 200, 201, 2]
    assert processor.process_pair(short, long, 8)[0] == [1, 200, 201, 2, 100, 101, 102, 2]
    assert processor.process(long, 4) == [1, 100, 101, 2]
    with pytest.raises(ValueError):
        processor.process(long, 1)


def test_post_processor_without_slot_for_text_is_rejected():
    with pytest.raises(ValueError):
        PostProcessor((Slot((1,)),))


def test_wordpiece_folder_gives_ids_of_load_wordpiece(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    peer, ours = load_wordpiece(tmp_path), bpe.load_encoder_tokenizer(tmp_path)
    for text in ("Paris is the capital", "zebra [MASK]!", ""):
        assert ours.encode(text) == peer.encode(text)
        assert ours.encode(text, max_length=4) == peer.encode(text, max_length=4)
        assert ours.encode_pair(text, "of") == peer.encode_pair(text, "of")
    assert (len(ours), ours.prefix_ids, ours.suffix_ids) == (64, (1,), (2,))


def byte_level_folder(tmp_path, post_processor):
    """Write the tokenizer.json of a byte-level BPE with 256 bytes and three special tokens."""
    alphabet = bpe.formats.bytes_to_unicode()
    vocab = {alphabet[byte]: byte + 3 for byte in range(256)}
    special = {"<S>": 0, "<pad>": 1, "</s>": 2}
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": text, "special": True} for text, id in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": post_processor,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab | special, "merges": []},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    return tmp_path


def test_byte_level_folder_adds_the_tokens_of_its_post_processor(tmp_path):
    post_processor = ROBERTA | {"cls": ["<S>", 0]}
    folder = byte_level_folder(tmp_path, post_processor)
    tokenizer = bpe.load_encoder_tokenizer(folder)
    a, b = ord("a") + 3, ord("B") + 3
    assert tokenizer.encode("aB") == [0, a, b, 2]
    assert tokenizer.encode("aB", add_special_tokens=False) == [a, b]
    assert tokenizer.encode_pair("a", "B<pad>") == ([0, a, 2, 2, b, 1, 2], [0] * 7)
    assert len(tokenizer) == 259
    # Special tokens keep their case.
    lower = bpe.load_encoder_tokenizer(folder, lowercase=True)
    assert lower.encode("AB<S>") == [0, a, a + 1, 0, 2]
    # For generation, the token before a text is bos; the token after a text is not used.
    assert bpe.load(folder).bos_id == 0


def test_special_token_without_an_embedding_row_is_dropped(tmp_path):
    """Bug: its id was looked up in the table, which returned the last row."""
    folder = byte_level_folder(tmp_path, ROBERTA | {"cls": ["<S>", 0]})
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    far = spec["added_tokens"][0] | {"id": 259, "content": "<far>"}
    path.write_text(json.dumps(spec | {"added_tokens": [*spec["added_tokens"], far]}))
    assert bpe.load_encoder_tokenizer(folder).encode("<far>") == [0, 259, 2]
    tokenizer = bpe.load_encoder_tokenizer(folder, num_rows=259)
    assert tokenizer.encode("<far>") == [0, *(byte + 3 for byte in b"<far>"), 2]
    assert len(tokenizer) == 259 and "<far>" not in tokenizer.special_tokens
    for rows in (2, 200):  # without </s>, which is added to each text, or without bytes
        with pytest.raises(ValueError, match=naming(folder, 259, rows)):
            bpe.load_encoder_tokenizer(folder, num_rows=rows)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    with pytest.raises(ValueError, match=naming(folder, len(VOCAB) - 1, 3)):
        bpe.load_encoder_tokenizer(folder, num_rows=3)


def test_gguf_wordpiece_gives_ids_of_vocab_txt(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_tokenizer_model("bert")
    kinds = [3 if token.startswith("[") else 1 for token in VOCAB]
    writer.add_token_list(
        [
            token if kind == 3 else token[2:] if token.startswith("##") else "\u2581" + token
            for token, kind in zip(VOCAB, kinds, strict=True)
        ]
    )
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_sep_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, folder = bpe.load_encoder_tokenizer(path), bpe.load_encoder_tokenizer(tmp_path)
    for text in ("Paris is the capital", "zebra [MASK] x!"):
        assert ours.encode(text) == folder.encode(text)
        assert ours.encode_pair(text, "of") == folder.encode_pair(text, "of")


@pytest.mark.parametrize(
    ("keys", "pair"),
    [
        ({}, "0a22b2"),  # of a version of llama.cpp without the key
        ({"add_sep_token": True}, "0a22b2"),
        ({"add_sep_token": True, "seperator_token_id": 1}, "0a21b2"),
        ({"add_sep_token": False}, "0a2b2"),
    ],
)
def test_gguf_of_xlm_roberta_puts_sep_before_the_second_text(tmp_path, keys, pair):
    """Bug: the flag was refused for Unigram, and pairs had one </s> between the texts."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "bert")
    writer.add_tokenizer_model("t5")
    writer.add_token_list(["<s>", "<pad>", "</s>", "<unk>", "a", "b"])
    writer.add_token_scores([0.0, 0.0, 0.0, 0.0, -1.0, -1.0])
    writer.add_token_types([3, 3, 3, 2, 1, 1])
    writer.add_add_space_prefix(False)
    for name, id in {"bos": 0, "eos": 2, "unknown": 3}.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", id)
    writer.add_add_bos_token(True)
    for key, value in keys.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(f"tokenizer.ggml.{key}", value)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    tokenizer = bpe.load_encoder_tokenizer(tmp_path / "model.gguf")
    assert tokenizer.encode("a") == [0, 4, 2]
    expected = [{"a": 4, "b": 5}.get(item) or int(item) for item in pair]
    assert tokenizer.encode_pair("a", "b") == (expected, [0] * len(expected))


@pytest.mark.parametrize(
    ("tokens", "keys", "ids"),
    [
        (["\u2581he", "\u2581\u211d"], {}, [4]),
        (["\u2581he", "\u2581H\u00c9"], {}, [5]),
        (["\u2581he", "\u2581H\u00c9"], {"lowercase": True}, [4]),
        (["\u2581he", "\u2581h\u00e9"], {"lowercase": True, "strip_accents": False}, [5]),
        (["\u2581he", "\u2581H\u00c9"], {"lowercase": False}, [5]),
    ],
)
def test_wordpiece_of_gguf_is_uncased_if_lower_case_changes_no_token(tokens, keys, ids):
    """Regression: \u211d, which BERT's uncased vocabulary has, counted as upper case."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    metadata = {
        "tokenizer.ggml.tokens": special + tokens,
        "tokenizer.ggml.token_type": [3] * 4 + [1] * len(tokens),
        **{f"tokenizer.ggml.normalizer.{key}": value for key, value in keys.items()},
    }
    wordpiece = wordpiece_from_gguf(metadata, "m.gguf")
    assert wordpiece.encode("H\u00c9", add_special_tokens=False) == ids
