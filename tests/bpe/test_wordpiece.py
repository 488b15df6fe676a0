"""WordPiece: examples, golden files of tokenizers, and comparison with tokenizers."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
from tests.bpe.conftest import GOLDEN
from tests.naming import naming

FILE = GOLDEN / "wordpiece-tokenizer.json"
SPEC = json.loads(FILE.read_text(encoding="utf-8"))
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "##a", "pear"]
TOKENS += ["##s", ",", "'", "don", "t", "数"]
TINY = bpe.WordPiece({token: id for id, token in enumerate(TOKENS)})


def tokenize(text: str, wordpiece: bpe.WordPiece = TINY, **options) -> list[str]:
    return wordpiece.convert_ids_to_tokens(wordpiece.encode(text, **options))


def load(tmp_path, **changes) -> bpe.WordPiece:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(SPEC | changes), encoding="utf-8")
    return bpe.load_wordpiece(path)


def test_encode_word_uses_longest_tokens():
    assert tokenize("unaffable") == ["[CLS]", "un", "##aff", "##able", "[SEP]"]
    assert tokenize("una", add_special_tokens=False) == ["un", "##a"]


def test_uncoverable_word_becomes_one_unk():
    assert tokenize("unaffair pears", add_special_tokens=False) == ["[UNK]", "pear", "##s"]
    word = "un" + "a" * 98
    assert tokenize(word, add_special_tokens=False) == ["un", *["##a"] * 98]
    assert tokenize(word + "a", add_special_tokens=False) == ["[UNK]"]


def test_pre_tokenize_normalizes_and_splits():
    assert TINY.pre_tokenize("Don't naïvely\t数数 Ünø!") == [
        "don", "'", "t", "naively", "数", "数", "unø", "!",
    ]  # fmt: skip
    assert TINY.pre_tokenize("\u200b\x00\ufffd\ue000 \u00a0\u2028\n") == []
    cased = bpe.WordPiece(TINY.vocab, lowercase=False, handle_chinese_chars=False)
    assert cased.pre_tokenize("Ün 数数") == ["Ün", "数数"]
    assert bpe.WordPiece(TINY.vocab, lowercase=False, strip_accents=True).pre_tokenize("Ün") == [
        "Un"
    ]


def test_surrogates_are_joined_or_removed():
    assert TINY.pre_tokenize("a\ud83d\ude00b \ud83dc") == ["a😀b", "c"]


def test_special_tokens_in_text_are_encoded_if_allowed():
    assert tokenize("pear[SEP]", add_special_tokens=False) == ["pear", "[SEP]"]
    assert TINY.sep_id not in TINY.encode(
        "pear[SEP]", add_special_tokens=False, allowed_special=set()
    )
    assert tokenize("[MASK][SEP]", add_special_tokens=False, allowed_special={"[MASK]"}) == [
        "[MASK]", "[UNK]", "[UNK]", "[UNK]",
    ]  # fmt: skip


def test_max_length_truncates_text():
    assert tokenize("pears pears", max_length=4) == ["[CLS]", "pear", "##s", "[SEP]"]
    assert tokenize("pears", max_length=1, add_special_tokens=False) == ["pear"]
    assert tokenize("pears", max_length=2) == ["[CLS]", "[SEP]"]
    with pytest.raises(ValueError, match=naming("max_length=1", 2)):
        TINY.encode("pears", max_length=1)
    with pytest.raises(ValueError, match=naming("max_length=2", 3)):
        TINY.encode_pair("pears", "pears", max_length=2)


def test_encode_batch_matches_encode():
    texts = ["pears", "", "don't"]
    assert TINY.encode_batch(texts, max_length=3) == [TINY.encode(t, max_length=3) for t in texts]


def test_decode_joins_words():
    ids = TINY.encode("Unaffable pears, pear")
    assert TINY.decode(ids) == "unaffable pears , pear"
    assert TINY.decode(ids, skip_special_tokens=False) == "[CLS] unaffable pears , pear [SEP]"
    with pytest.raises(KeyError):
        TINY.decode([99])


def test_vocabulary_without_special_token_is_rejected():
    with pytest.raises(ValueError, match=naming("'[SEP]'")):
        bpe.WordPiece({"[UNK]": 0, "[CLS]": 1})
    with pytest.raises(ValueError, match=naming("id")):
        bpe.WordPiece({"[UNK]": 0, "[CLS]": 0, "[SEP]": 1})


@pytest.mark.parametrize("name", ["uncased", "cased"])
def test_ids_match_golden_file(name, golden, tmp_path):
    recorded = golden("wordpiece")
    changes = {"normalizer": SPEC["normalizer"] | {"lowercase": name == "uncased"}}
    wordpiece = load(tmp_path, **changes)
    for text, ids in zip(recorded["texts"], recorded[name]["ids"], strict=True):
        assert wordpiece.encode(text) == ids, text
    for length, expected in recorded[name]["pairs"].items():
        for pair, (ids, types) in zip(recorded["pairs"], expected, strict=True):
            limit = None if length == "None" else int(length)
            assert wordpiece.encode_pair(*pair, max_length=limit) == (ids, types), (pair, length)


# Files


def write_folder(tmp_path, lines: list[str], **config):
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_folder_with_vocab_txt_loads(tmp_path):
    wordpiece = bpe.load_wordpiece(write_folder(tmp_path, TOKENS))
    assert wordpiece.vocab == TINY.vocab and wordpiece.lowercase
    assert wordpiece.pad_id == 0 and len(wordpiece) == len(TOKENS)
    wordpiece = bpe.load_wordpiece(
        write_folder(tmp_path, TOKENS, do_lower_case=False, tokenize_chinese_chars=False)
    )
    assert not wordpiece.lowercase and not wordpiece.handle_chinese_chars


def test_tokenizer_json_and_vocab_txt_give_same_ids(tmp_path, golden):
    vocab = SPEC["model"]["vocab"]
    folder = write_folder(tmp_path, sorted(vocab, key=vocab.__getitem__))
    from_json, from_txt = bpe.load_wordpiece(FILE), bpe.load_wordpiece(folder / "vocab.txt")
    for text in golden("wordpiece")["texts"]:
        assert from_json.encode(text) == from_txt.encode(text)


@pytest.mark.parametrize(
    ("lines", "facts"),
    [
        ([*TOKENS, "pear"], ["line 17", "'pear'", "line 10"]),
        ([*TOKENS[:6], "", *TOKENS[6:]], ["line 7"]),
        (TOKENS[3:], ["'[UNK]'"]),
    ],
)
def test_damaged_vocab_txt_names_the_line(tmp_path, lines, facts):
    with pytest.raises(ValueError, match=naming("vocab.txt", *facts)):
        bpe.load_wordpiece(write_folder(tmp_path, lines))


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"model": {"type": "BPE"}}, ["model", "type", "'BPE'"]),
        ({"normalizer": None}, ["normalizer"]),
        (
            {"normalizer": SPEC["normalizer"] | {"clean_text": False}},
            ["normalizer", "clean_text", False],
        ),
        ({"pre_tokenizer": {"type": "Whitespace"}}, ["pre_tokenizer", "type", "'Whitespace'"]),
        ({"post_processor": None}, ["post_processor", None]),
        ({"added_tokens": [{"id": 5, "content": "[PAD]"}]}, ["'[PAD]'", 5, "added_tokens"]),
        (
            {"added_tokens": [{"id": 0, "content": "[PAD]", "normalized": True}]},
            ["normalized", True],
        ),
        ({"added_tokens": [{"id": 99, "content": "[X]"}]}, ["model.vocab", "'[X]'"]),
        ({"model": SPEC["model"] | {"vocab": {"a": "b"}}}, ["vocab['a']", "'b'"]),
        (
            {"model": SPEC["model"] | {"max_input_chars_per_word": None}},
            ["max_input_chars_per_word"],
        ),
    ],
)
def test_tokenizer_json_with_unsupported_setting_names_it(tmp_path, changes, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        load(tmp_path, **changes)


def test_error_names_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=naming(tmp_path, "tokenizer.json", "vocab.txt")):
        bpe.load_wordpiece(tmp_path)
    with pytest.raises(FileNotFoundError, match=naming(tmp_path / "vocab.txt")):
        bpe.load_wordpiece(tmp_path / "vocab.txt")
    (tmp_path / "vocab.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=naming(tmp_path / "vocab.bin", "vocab.txt", "'.bin'")):
        bpe.load_wordpiece(tmp_path / "vocab.bin")


# Live


@pytest.fixture(scope="module")
def reference():
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(FILE))


@pytest.mark.parity
def test_every_character_matches_tokenizers(reference):
    """Compare every code point, within a word and separately."""
    wordpiece = bpe.load_wordpiece(FILE)
    # These letters have a lower case only after Unicode 14, the version of Python 3.11, and U+11938
    # decomposes into two characters since Unicode 13.
    newer = {0x11938, 0x1C89, 0xA7CB, 0xA7CC, 0xA7CE, 0xA7D2, 0xA7D4, 0xA7DA, 0xA7DC}
    newer |= {*range(0x10D50, 0x10D66), *range(0x16EA0, 0x16EB9)}
    normalizer, splitter = reference.normalizer, reference.pre_tokenizer
    for code in range(0x110000):
        if 0xD800 <= code < 0xE000 or code in newer:
            continue
        text = f"a{chr(code)}b {chr(code)}"
        expected = [w for w, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]
        assert wordpiece.pre_tokenize(text) == expected, hex(code)


@pytest.mark.parity
def test_arbitrary_text_matches_tokenizers(reference):
    wordpiece = bpe.load_wordpiece(FILE)
    characters = st.sampled_from(
        "aBé ç\u0301\u0300數字한\u00ad\u200d\x00\x85\t\n,.'$[]MASKSEP😀İßΣ"
    )

    @settings(max_examples=1000)
    @given(st.one_of(st.text(), st.text(characters)), st.text(characters), st.integers(3, 20))
    def compare(first: str, second: str, length: int) -> None:
        reference.no_truncation()
        assert wordpiece.encode(first) == reference.encode(first).ids
        reference.enable_truncation(length)
        assert wordpiece.encode(first, max_length=length) == reference.encode(first).ids
        pair = reference.encode(first, second)
        assert wordpiece.encode_pair(first, second, max_length=length) == (pair.ids, pair.type_ids)

    compare()


@pytest.mark.parity
def test_all_minilm_ids_match_tokenizers(reference):
    """Compare the published vocabulary, if the model was pulled, on texts of this repository."""
    import tokenizers

    from tests.bpe.conftest import models_folder

    folder = models_folder() / "all-minilm-l6-v2"
    if not folder.exists():
        pytest.skip("all-minilm-l6-v2 was not pulled")
    wordpiece = bpe.load_wordpiece(folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    root = GOLDEN.parent.parent.parent
    for path in [*sorted(root.glob("*.md")), *sorted(root.glob("tests/golden/bpe/*.json"))]:
        text = path.read_text(encoding="utf-8")
        assert wordpiece.encode(text) == theirs.encode(text).ids, path
