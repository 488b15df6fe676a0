"""The named encodings: identical files to OpenAI's, and the same ids as tiktoken."""

import hashlib
import json
import lzma
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bpe
from bpe import openai_encodings
from bpe.save import tiktoken_lines
from tests.bpe import comparisons
from tests.bpe.tiktoken_cache import fill, gpt2_files
from tests.naming import naming

NAMES = bpe.list_encoding_names()


@pytest.mark.parametrize("name", openai_encodings.TIKTOKEN_SHA256)
def test_tiktoken_lines_match_published_hash(name):
    text = tiktoken_lines(bpe.get_encoding(name))
    assert hashlib.sha256(text.encode()).hexdigest() == openai_encodings.TIKTOKEN_SHA256[name]


def test_gpt2_files_match_published_hash():
    merges, vocab = (hashlib.sha256(file).hexdigest() for file in gpt2_files())
    assert merges == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    assert vocab == "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


@pytest.mark.parametrize("name", NAMES)
def test_ids_match_golden_file(name, golden):
    encoding = bpe.get_encoding(name)
    recorded = golden("vocabularies")
    for text, digest in zip(recorded["texts"], recorded["digests"][name], strict=True):
        ids = encoding.encode(text, disallowed_special=())
        sha256 = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:8]
        assert f"{len(ids)} {sha256}" == digest, text
        assert encoding.decode(ids) == text
    special = recorded["special_tokens"][name]
    assert special.items() <= encoding.special_tokens.items()
    if name != "o200k_harmony":
        assert encoding.special_tokens == special


def test_harmony_special_tokens_cover_all_ids():
    harmony = bpe.get_encoding("o200k_harmony")
    assert len(harmony.special_tokens) == 1091 and harmony.n_vocab == 201088
    for token in ("<|endofprompt|>", "<|reserved_200018|>"):
        assert harmony.encode(token, allowed_special="all") == [200018]
    assert harmony.decode([200018]) == "<|endofprompt|>"
    assert len(harmony.decode(range(201088))) > 1_000_000


def test_hamburger_has_tokens_of_openai_guide():
    encoding = bpe.get_encoding("gpt2")
    assert encoding.decode_tokens_bytes(encoding.encode("hamburger")) == [b"ham", b"bur", b"ger"]
    assert len(encoding.encode(" pear")) == 1


@pytest.mark.parametrize(
    ("model", "name"),
    {
        "gpt-4": "cl100k_base",
        "gpt-4-0314": "cl100k_base",
        "gpt-4o-mini": "o200k_base",
        "gpt-4.1-nano": "o200k_base",
        "gpt-5-anything": "o200k_base",
        "gpt-oss-20b": "o200k_harmony",
        "ft:gpt-3.5-turbo:me::1": "cl100k_base",
        "text-davinci-003": "p50k_base",
        "text-davinci-edit-001": "p50k_edit",
        "text-embedding-ada-002": "cl100k_base",
        "ada": "r50k_base",
        "gpt-2": "gpt2",
    }.items(),
)
def test_model_name_maps_to_encoding(model, name):
    assert bpe.encoding_name_for_model(model) == name
    assert bpe.encoding_for_model(model) is bpe.get_encoding(name)


def test_unknown_name_lists_valid_names():
    with pytest.raises(ValueError, match=naming("'cl100k'", *bpe.list_encoding_names())):
        bpe.get_encoding("cl100k")
    with pytest.raises(ValueError, match=naming(100)):
        bpe.get_encoding(100)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match=naming("'llama'")):
        bpe.encoding_for_model("llama")


def test_damaged_data_file_is_rejected(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "o200k_base.xz").write_bytes(lzma.compress(b"\1a"))
    monkeypatch.setattr(openai_encodings, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match=naming("o200k_base.xz", "SHA-256")):
        openai_encodings.load_ranks("o200k_base")


def test_truncated_openai_file_is_rejected(tmp_path):
    """Bug: a truncated file was loaded without an error, and encoded text differently."""
    path = tmp_path / "r50k_base.tiktoken"
    lines = tiktoken_lines(bpe.get_encoding("r50k_base"))
    path.write_text(lines)
    assert bpe.load(path).encoding.encode("hello world") == [31373, 995]
    path.write_text(lines[: len(lines) // 2])
    with pytest.raises(ValueError, match=naming(path, "SHA-256")):
        bpe.load(path)


def test_named_encoding_pickles():
    encoding = pickle.loads(pickle.dumps(bpe.get_encoding("gpt2")))
    assert encoding.encode("hello world") == [31373, 995]


@given(st.binary(max_size=60), st.sampled_from(NAMES))
def test_arbitrary_bytes_round_trip(data, name):
    encoding = bpe.get_encoding(name)
    assert encoding.decode_bytes(encoding.encode_piece(data)) == data


@pytest.mark.parity
def test_gpt2_ids_match_tokenizers(tmp_path):
    assert comparisons.byte_level_json(tmp_path).different == ()


@pytest.mark.parity
def test_names_and_models_match_tiktoken(tmp_path, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    fill(tmp_path)
    assert set(tiktoken.list_encoding_names()) == set(NAMES)
    for model, name in tiktoken.model.MODEL_TO_ENCODING.items():
        assert bpe.encoding_name_for_model(model) == name
    assert len(tiktoken.model.MODEL_TO_ENCODING) == len(openai_encodings.MODEL_TO_ENCODING)
    assert tiktoken.model.MODEL_PREFIX_TO_ENCODING == openai_encodings.MODEL_PREFIX_TO_ENCODING


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_encodings_match_tiktoken(name, tmp_path, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    fill(tmp_path)
    theirs, ours = tiktoken.get_encoding(name), bpe.get_encoding(name)
    assert ours.n_vocab == theirs.n_vocab
    assert ours.max_token_value == theirs.max_token_value
    assert ours.special_tokens == theirs._special_tokens
    assert ours.special_tokens_set == theirs.special_tokens_set
    assert ours.ranks == theirs._mergeable_ranks
    assert comparisons.tiktoken_encoding(name).different == ()
