"""SentencePiece vocabularies: ids and texts equal those of sentencepiece and tokenizers."""

import base64
import json
import pickle
import random
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
from bpe import explain, normalizers
from bpe.fast_piece_encoder import FastPieceEncoder
from bpe.normalizers import Lowercase
from bpe.save import save, tokenizer_json
from bpe.unigram import Unigram
from tests.bpe.comparisons import score_of
from tests.bpe.conftest import GOLDEN
from tests.naming import naming

CONTENT = json.loads((GOLDEN / "sentencepiece.json").read_text())
TEXTS = CONTENT["texts"]
MODELS, LAYOUTS = list(CONTENT["models"]), list(CONTENT["tokenizers"])


@pytest.fixture(scope="module")
def load_model(tmp_path_factory):
    @cache
    def load(name):
        path = tmp_path_factory.mktemp(name) / "tokenizer.model"
        path.write_bytes(base64.b64decode(CONTENT["models"][name]["model"]))
        return bpe.load(path)

    return load


@pytest.fixture(scope="module")
def load_layout(tmp_path_factory):
    @cache
    def load(name):
        path = tmp_path_factory.mktemp(name) / "tokenizer.json"
        path.write_text(json.dumps(CONTENT["tokenizers"][name]["tokenizer.json"]))
        return bpe.load(path)

    return load


@pytest.mark.parametrize("name", MODELS)
def test_tokenizer_model_matches_sentencepiece(load_model, name):
    encoding = load_model(name).encoding
    expected = CONTENT["models"][name]
    user_defined = {"<start_of_turn>", "<sep>"} & encoding.special_tokens.keys()
    for text, ids, decoded in zip(TEXTS, expected["ids"], expected["decoded"], strict=True):
        actual = encoding.encode(text, allowed_special=user_defined, disallowed_special=())
        if not isinstance(encoding.model, Unigram) or actual == ids:
            assert actual == ids, text
        else:  # sentencepiece adds scores in float32, so it can choose a path of almost equal score
            scores = [sum(map(score_of(encoding.model), path)) for path in (actual, ids)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-4)
        if encoding.unk_id not in ids and "\u2581" not in text:
            assert encoding.decode(ids) == decoded


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokenizer_json_matches_tokenizers(load_layout, name):
    tokenizer = load_layout(name)
    encoding = tokenizer.encoding
    for text, expected in zip(TEXTS, CONTENT["tokenizers"][name]["ids"], strict=True):
        ids = encoding.encode(text, allowed_special="all")
        ids = [tokenizer.bos_id] * tokenizer.add_bos + ids + [tokenizer.eos_id] * tokenizer.add_eos
        assert ids == expected, text


def test_newline_is_a_grapheme_of_its_own_before_a_combining_mark(load_layout):
    """Regression: the mark was lost with the newline, which the charsmap makes a space.

    tokenizers 0.23.3 gives [3, 0] for this tokenizer.json, as for a space and the mark.
    """
    encoding = load_layout("t5").encoding
    assert encoding.encode("\n\u0951") == encoding.encode(" \u0951") == [3, 0]


def test_lower_case_has_no_final_sigma():
    """Regression: of the letters of a word, the last sigma became another letter."""
    assert Lowercase()("\u039f\u03a3 Aa", "first") == "\u03bf\u03c3 aa"


@pytest.mark.parametrize("name", MODELS)
def test_fast_encoder_matches_encoding_text_by_text(load_model, name):
    encoding = load_model(name).encoding
    texts = [*TEXTS, "", " ", "a\x00b", "\n" * 50, "no space" * 30]
    assert isinstance(encoding._fast_encoder, FastPieceEncoder)
    fast = encoding._encode_fast(texts * 3, frozenset())
    assert [ids.tolist() for ids in fast] == [encoding.encode_ordinary(t) for t in texts] * 3
    long = " ".join(texts) * 20
    assert len(long) > 1 << 15
    (ids,) = encoding._encode_fast([long], frozenset())
    slow = [id for item in encoding._items(long, frozenset()) for id in encoding._encode_item(item)]
    assert ids.tolist() == slow
    assert encoding.encode_to_numpy(long, disallowed_special=()).dtype == np.uint32


@pytest.mark.parametrize("name", ["llama", "gemma"])
@given(text=st.text())
@settings(max_examples=100)
def test_encode_then_decode_returns_the_text(load_model, name, text):
    encoding = load_model(name).encoding
    ids = encoding.encode_ordinary(text)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    # The rules of these vocabularies replace some characters; "▁" is a space.
    if set(text).isdisjoint("\u2581\tA\u030a\nfi\u0660\u0661\uff21\u200b"):
        assert encoding.decode(ids) == text
        stream = bpe.StreamDecoder(encoding)
        assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_stream_keeps_space_after_prompt_and_joins_bytes(load_model):
    encoding = load_model("llama").encoding
    ids = encoding.encode_ordinary("\U0001f600 x")
    assert encoding.decode_single_token_bytes(ids[0]) == b" "
    after = bpe.StreamDecoder(encoding, after_prompt=True)
    assert [after.push(id) for id in ids] == [" ", "", "", "", "\U0001f600", *" x"][: len(ids)] or (
        "".join(map(bpe.StreamDecoder(encoding, after_prompt=True).push, ids)) == " \U0001f600 x"
    )
    start = bpe.StreamDecoder(encoding)
    pieces = [start.push(id) for id in ids]
    assert pieces[:4] == ["", "", "", ""]
    assert "".join(pieces) == "\U0001f600 x"


def test_parts_are_encoded_as_one_text(load_layout):
    """Bug: a dummy prefix was put before every part, but tokenizers puts one before the text."""
    for name in ("llama2", "mistral", "phi3"):
        encoding = load_layout(name).encoding
        specials = [t for t in ("[INST]", "<|user|>", "</s>") if t in encoding.special_tokens]
        for special in specials:
            parts = [("low", False), (special, True), (" x", False), (" low", False)]
            whole = "".join(text for text, _ in parts)
            ids = encoding.encode_parts(parts)
            assert sum(ids, []) == encoding.encode(whole, allowed_special="all")
            assert ids[1] == [encoding.special_tokens[special]]


def test_special_tokens_are_text_unless_allowed(load_layout):
    encoding = load_layout("llama2").encoding
    assert encoding.special_tokens["</s>"] not in encoding.encode_ordinary("a</s>")
    assert encoding.decode(encoding.encode_ordinary("a</s>")) == "a</s>"
    with pytest.raises(ValueError, match="</s>"):
        encoding.encode("a</s>")


def test_html_tag_is_ordinary_token_and_turn_marker_is_special(load_model):
    encoding = load_model("gemma").encoding
    assert b"<h1>" in encoding.decode_tokens_bytes(encoding.encode_ordinary("x<h1>y"))
    assert "<start_of_turn>" in encoding.special_tokens
    turn = encoding.special_tokens["<start_of_turn>"]
    assert encoding.encode("<start_of_turn>", allowed_special="all") == [turn]


def test_byte_ids_are_token_ids_and_decode_to_bytes(load_model):
    encoding = load_model("llama").encoding
    byte_ids = [encoding.encode_ordinary("\x01")[-1], encoding.encode_ordinary("\U0001f600")[-1]]
    assert set(byte_ids) <= set(encoding.token_ids)
    assert encoding.decode_single_token_bytes(byte_ids[0]) == b"\x01"
    assert sorted(encoding.token_ids) == list(range(encoding.n_vocab))


def test_pickled_encoding_encodes_the_same(load_model, load_layout):
    for encoding in (load_model("unigram").encoding, load_layout("mistral").encoding):
        ids = encoding.encode_ordinary("low lower")
        assert pickle.loads(pickle.dumps(encoding)).encode_ordinary("low lower") == ids


def gguf_metadata(tokenizer_model, kind: str, **more) -> dict:
    """Return the GGUF metadata of a tokenizer.model, as llama.cpp's converter writes them."""
    from bpe.formats.sentencepiece import parse_model

    model = parse_model(tokenizer_model, "tokenizer.model")
    return {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": model.pieces,
        "tokenizer.ggml.scores": model.scores,
        "tokenizer.ggml.token_type": model.types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{"tokenizer.ggml." + key: value for key, value in more.items()},
    }


def test_gguf_encodes_to_ids_of_tokenizer_model():
    charsmapped = set("\tA\u030a\nfi\u0660\u0661\uff21\u200b")
    data = base64.b64decode(CONTENT["models"]["llama"]["model"])
    tokenizer = bpe.from_gguf(gguf_metadata(data, "llama"))
    assert (tokenizer.add_bos, tokenizer.add_eos, tokenizer.bos_id) == (True, False, 1)
    assert tokenizer.stop_ids == {2}
    for text, ids in zip(TEXTS, CONTENT["models"]["llama"]["ids"], strict=True):
        if charsmapped.isdisjoint(text):
            assert tokenizer.encoding.encode_ordinary(text) == ids
    plain = bpe.from_gguf(gguf_metadata(data, "llama", add_space_prefix=False)).encoding
    assert plain.encode_ordinary(" low") == tokenizer.encoding.encode_ordinary("low")
    assert plain.decode(plain.encode_ordinary(" low")) == " low"


def test_gguf_unigram_adds_eos():
    data = base64.b64decode(CONTENT["models"]["unigram"]["model"])
    options = {"add_space_prefix": True, "remove_extra_whitespaces": True}
    tokenizer = bpe.from_gguf(gguf_metadata(data, "t5", **options))
    assert (tokenizer.add_bos, tokenizer.add_eos) == (False, True)
    for text, ids in zip(TEXTS, CONTENT["models"]["unigram"]["ids"], strict=True):
        actual = tokenizer.encoding.encode_ordinary(text)
        if set("\tA\u030a\nfi\u0660\u0661\uff21\u200ba").isdisjoint(text):
            assert actual == ids


@pytest.mark.parametrize(
    ("key", "value", "facts"),
    [
        ("scores", [0.0], ["scores", 1]),
        ("scores", ..., ["scores"]),
        ("token_type", [1] * 600, ["tokens", "UNKNOWN"]),
        ("tokens", ["a"] * 600, ["tokens", "'a'"]),
        ("add_sep_token", True, ["add_sep_token"]),
    ],
)
def test_damaged_gguf_names_the_key(key, value, facts):
    meta = gguf_metadata(base64.b64decode(CONTENT["models"]["llama"]["model"]), "llama")
    meta["tokenizer.ggml." + key] = value
    if value is ...:
        del meta["tokenizer.ggml." + key]
    with pytest.raises(ValueError, match=naming("m.gguf", *facts)):
        bpe.from_gguf(meta, source="m.gguf")


@pytest.mark.parametrize(
    ("layout", "change", "facts"),
    [
        ("t5", lambda s: s["model"].pop("unk_id"), ["model", "unk_id"]),
        ("t5", lambda s: s["model"].update(unk_id=10**6), ["unk_id", 10**6]),
        ("t5", lambda s: s["model"]["vocab"].append(["x", "y"]), ["model", "vocab"]),
        ("t5", lambda s: s["model"]["vocab"].append(s["model"]["vocab"][9]), ["model", "vocab[9]"]),
        ("llama2", lambda s: s["model"]["vocab"].pop("<0x0A>"), ["byte_fallback", "<0x0A>"]),
        ("llama2", lambda s: s["model"].update(unk_token="?"), ["unk_token", "'?'"]),
        ("llama2", lambda s: s["model"]["merges"].append(["a"]), ["merges"]),
        ("llama2", lambda s: s["decoder"]["decoders"].append({"type": "CTC"}), ["decoder", "CTC"]),
        ("mistral", lambda s: s.update(pre_tokenizer=None), ["pre_tokenizer", "U+2581"]),
        ("xlmr", lambda s: s["normalizer"].update(precompiled_charsmap="AAAA"), ["normalizer"]),
    ],
)
def test_damaged_tokenizer_json_names_the_field(tmp_path, layout, change, facts):
    spec = json.loads(json.dumps(CONTENT["tokenizers"][layout]["tokenizer.json"]))
    change(spec)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=naming(path, *facts)):
        bpe.load(path)


@pytest.mark.parametrize("cut", [1, 2, 10, 100, 5000])
def test_damaged_tokenizer_model_names_the_file(tmp_path, cut):
    data = base64.b64decode(CONTENT["models"]["llama"]["model"])
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data[:-cut] if cut < 100 else b"\xff" * cut)
    with pytest.raises(ValueError, match=naming(path)):
        bpe.load(path)


def test_tokenizer_model_of_random_bytes_raises_value_error(tmp_path):
    data = bytearray(base64.b64decode(CONTENT["models"]["unigram"]["model"]))
    chance = random.Random(5)
    path = tmp_path / "tokenizer.model"
    for _ in range(50):
        damaged = bytearray(data)
        for _ in range(3):
            damaged[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            bpe.load(path).encoding.encode_ordinary("low lower \U0001f600")
        except ValueError as error:
            assert str(path) in str(error)


def test_explain_draws_merges_of_characters(load_model):
    encoding = load_model("llama").encoding
    text = explain.explain(encoding, "the")
    assert str(encoding.encode_ordinary("the")[-1]) in text
    steps = explain.merge_steps(encoding.model.vocab, b" the")
    assert b"".join(steps[-1].parts) == b" the"


def test_explain_lists_lattice_and_best_path(load_model):
    encoding = load_model("unigram").encoding
    lines = explain.lattice_diagram(encoding, " the\U0001f600").splitlines()
    ids = encoding.encode_ordinary("the\U0001f600")
    best = [line for line in lines if line.startswith("* ")]
    assert len(best) == len(ids)
    assert sum(float(line.split()[-1]) for line in best[:-1]) > -1000
    assert "not a token" in best[-1]
    assert all(str(id) in lines[-1] for id in ids)
    assert explain.explain(encoding, "the")


def gguf_tokenizer(name: str, **more) -> bpe.Tokenizer:
    data = base64.b64decode(CONTENT["models"][name]["model"])
    return bpe.from_gguf(gguf_metadata(data, "llama", **more))


@pytest.mark.parametrize(("name", "prefix"), [("llama", True), ("gemma", False)])
def test_saved_vocabulary_loads_with_same_ids(tmp_path, name, prefix):
    encoding = gguf_tokenizer(name, add_space_prefix=prefix).encoding
    path = tmp_path / "tokenizer.json"
    save(encoding, path)
    loaded = bpe.load(path).encoding
    assert loaded.special_tokens == encoding.special_tokens
    for text in [*TEXTS, " ".join(TEXTS)]:
        ids = encoding.encode(text, allowed_special="all")
        assert loaded.encode(text, allowed_special="all") == ids
        assert loaded.decode(ids) == encoding.decode(ids)


@pytest.mark.parity
@pytest.mark.parametrize(("name", "prefix"), [("llama", True), ("gemma", False)])
def test_saved_vocabulary_has_same_ids_in_tokenizers(name, prefix):
    tokenizers = pytest.importorskip("tokenizers")
    encoding = gguf_tokenizer(name, add_space_prefix=prefix).encoding
    huggingface = tokenizers.Tokenizer.from_str(tokenizer_json(encoding))
    for text in [*TEXTS, " ".join(TEXTS)]:
        ids = encoding.encode(text, allowed_special="all")
        assert huggingface.encode(text).ids == ids
        assert huggingface.decode(ids, skip_special_tokens=False) == encoding.decode(ids)


@pytest.mark.parity
def test_saved_runs_of_spaces_of_equal_score_have_same_ids_in_tokenizers():
    """In Llama 2, all runs of spaces have one score."""
    tokenizers = pytest.importorskip("tokenizers")
    runs = ["\u2581" * n for n in range(1, 9)]
    meta = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", *runs, "a", "\u2581a"],
        "tokenizer.ggml.scores": [0.0, 0.0, -9.0, *[-1e9] * 7, -8.0, -1.0],
        "tokenizer.ggml.token_type": [2, 3, *[1] * 10],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    encoding = bpe.from_gguf(meta).encoding
    huggingface = tokenizers.Tokenizer.from_str(tokenizer_json(encoding))
    for n in range(60):
        for text in (" " * n, " " * n + "a", "a" + " " * n + "a "):
            assert huggingface.encode(text).ids == encoding.encode(text)


def test_merges_in_order_of_rank_are_saved(tmp_path):
    merges = ["\u2581 a", "é a", "\u2581a éa"]
    tokens = ["<unk>", "<end>", "\u2581", "a", "\u2581a", "é", "éa", "\u2581aéa", "  "]
    types = [2, 3, *[1] * 6, 4]
    meta = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens + [f"<0x{byte:02X}>" for byte in range(256)],
        "tokenizer.ggml.token_type": types + [6] * 256,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
    }
    encoding = bpe.from_gguf(meta).encoding
    save(encoding, tmp_path / "tokenizer.json")
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    assert [" ".join(pair) for pair in spec["model"]["merges"]] == merges
    loaded = bpe.load(tmp_path / "tokenizer.json").encoding
    for text in (" aéa", "a  aé", "<end> a", "\n\u4e16"):
        ids = encoding.encode(text, allowed_special="all")
        assert loaded.encode(text, allowed_special="all") == ids


def test_save_refuses_what_tokenizers_cannot_represent(tmp_path, load_model, load_layout):
    refused = {
        "unigram": load_model("unigram").encoding,
        "first text": load_model("llama").encoding,
        "spaces": gguf_tokenizer("llama", remove_extra_whitespaces=True).encoding,
        "tokenizer.json": load_layout("llama2").encoding,
        "unused": gguf_tokenizer("llama", token_type=[2, 3, 3, *[6] * 256, *[5] * 341]).encoding,
    }
    for encoding in refused.values():
        with pytest.raises(ValueError, match=naming("tokenizer.json", "copy the files")):
            save(encoding, tmp_path / "tokenizer.json")
        with pytest.raises(ValueError, match=naming(".tiktoken")):
            save(encoding, tmp_path / "t.tiktoken")
    assert not list(tmp_path.iterdir())


def test_unused_tokens_of_one_character_and_of_unigram():
    """Bug: an unused token of one character raised RecursionError; Unigram used unused tokens."""
    data = base64.b64decode(CONTENT["models"]["llama"]["model"])
    meta = gguf_metadata(data, "llama", add_space_prefix=False)
    types, tokens = meta["tokenizer.ggml.token_type"], meta["tokenizer.ggml.tokens"]
    types[tokens.index("e")] = 5
    encoding = bpe.from_gguf(meta).encoding
    assert encoding.encode_ordinary("e") == [tokens.index("e")]
    assert encoding.decode(encoding.encode_ordinary("e")) == "e"
    data = base64.b64decode(CONTENT["models"]["unigram"]["model"])
    meta = gguf_metadata(data, "t5")
    tokens = meta["tokenizer.ggml.tokens"]
    id = bpe.from_gguf(meta).encoding.encode_ordinary("the")[0]
    meta["tokenizer.ggml.token_type"][id] = 5
    assert id not in bpe.from_gguf(meta).encoding.encode_ordinary("the")


def test_gguf_of_phi3_strips_whitespace_after_tokens():
    """Bug: the newline after a role was encoded; GGUF files do not have this flag of tokens."""
    data = base64.b64decode(CONTENT["models"]["llama"]["model"])
    meta = gguf_metadata(data, "llama")
    meta["tokenizer.ggml.tokens"] += ["<|endoftext|>", "<|user|>", "<|end|>"]
    meta["tokenizer.ggml.scores"] += [0.0] * 3
    meta["tokenizer.ggml.token_type"] += [3, 3, 4]
    first = len(meta["tokenizer.ggml.tokens"]) - 3
    encoding = bpe.from_gguf(meta | {"general.name": "Phi 3 Mini"}).encoding
    assert len(encoding.encode("<|user|>\n", allowed_special="all")) > 1  # as in llama.cpp
    encoding = bpe.from_gguf(meta | {"general.name": "Phi-3 Mini"}).encoding
    low = encoding.encode_ordinary("low")
    ids = encoding.encode("<|user|>\n low<|end|>\n</s> low", allowed_special="all")
    assert ids == [first + 1, *low, first + 2, 2, *low]
    for kept in ("<|endoftext|>", "<s>"):
        ids = encoding.encode(f"{kept} low", allowed_special="all")
        assert ids == [encoding.special_tokens[kept], *encoding.encode_ordinary(" low")]
    parts = [("<|user|>", True), ("\n low", False), ("<|end|>", True), ("\n", False)]
    assert encoding.encode_parts(parts) == [[first + 1], low, [first + 2], []]


def test_gguf_of_multilingual_encoder_strips_whitespace_before_mask():
    data = base64.b64decode(CONTENT["models"]["unigram"]["model"])
    meta = gguf_metadata(data, "t5", add_space_prefix=True)
    meta["tokenizer.ggml.tokens"].append("<mask>")
    meta["tokenizer.ggml.scores"].append(0.0)
    meta["tokenizer.ggml.token_type"].append(3)
    meta["general.architecture"] = "nomic-bert-moe"
    encoding = bpe.from_gguf(meta).encoding
    ids = encoding.encode("low <mask>", allowed_special="all")
    assert ids == [*encoding.encode_ordinary("low"), encoding.special_tokens["<mask>"]]


def test_lowercase_has_no_final_sigma():
    """Bug: Python writes a final sigma at the end of a word, tokenizers does not."""
    assert normalizers.Lowercase()("ΟΔΟΣ İ", "start") == "οδοσ i\u0307"
