"""WordPiece: by hand, on golden files of `tokenizers`, and live against it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
from tests.bpe.conftest import GOLDEN
from tests.naming import naming

FILE = GOLDEN / "wordpiece-tokenizer.json"
SPEC = json.loads(FILE.read_text(encoding="utf-8"))
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "##a", "pear"]
PIECES += ["##s", ",", "'", "don", "t", "数"]
TINY = bpe.WordPiece({piece: id for id, piece in enumerate(PIECES)})


def pieces(text: str, wordpiece: bpe.WordPiece = TINY, **options) -> list[str]:
    return wordpiece.convert_ids_to_tokens(wordpiece.encode(text, **options))


def load(tmp_path, **changes) -> bpe.WordPiece:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(SPEC | changes), encoding="utf-8")
    return bpe.load_wordpiece(path)


def test_the_longest_piece_first():
    assert pieces("unaffable") == ["[CLS]", "un", "##aff", "##able", "[SEP]"]
    assert pieces("una", add_special_tokens=False) == ["un", "##a"]


def test_a_word_that_cannot_be_covered_is_unknown_as_a_whole():
    assert pieces("unaffair pears", add_special_tokens=False) == ["[UNK]", "pear", "##s"]
    word = "un" + "a" * 98
    assert pieces(word, add_special_tokens=False) == ["un", *["##a"] * 98]
    assert pieces(word + "a", add_special_tokens=False) == ["[UNK]"]


def test_words():
    assert TINY.pre_tokenize("Don't naïvely\t数数 Ünø!") == [
        "don", "'", "t", "naively", "数", "数", "unø", "!",
    ]  # fmt: skip
    assert TINY.pre_tokenize("\u200b\x00\ufffd\ue000 \u00a0\u2028\n") == []
    cased = bpe.WordPiece(TINY.vocab, lowercase=False, handle_chinese_chars=False)
    assert cased.pre_tokenize("Ün 数数") == ["Ün", "数数"]
    assert bpe.WordPiece(TINY.vocab, lowercase=False, strip_accents=True).pre_tokenize("Ün") == [
        "Un"
    ]


def test_surrogates_are_joined_and_lone_ones_go():
    assert TINY.pre_tokenize("a\ud83d\ude00b \ud83dc") == ["a😀b", "c"]


def test_special_tokens_in_a_text():
    assert pieces("pear[SEP]", add_special_tokens=False) == ["pear", "[SEP]"]
    assert TINY.sep_id not in TINY.encode(
        "pear[SEP]", add_special_tokens=False, allowed_special=set()
    )
    assert pieces("[MASK][SEP]", add_special_tokens=False, allowed_special={"[MASK]"}) == [
        "[MASK]", "[UNK]", "[UNK]", "[UNK]",
    ]  # fmt: skip


def test_truncation():
    assert pieces("pears pears", max_length=4) == ["[CLS]", "pear", "##s", "[SEP]"]
    assert pieces("pears", max_length=1, add_special_tokens=False) == ["pear"]
    assert pieces("pears", max_length=2) == ["[CLS]", "[SEP]"]
    with pytest.raises(ValueError, match=naming("max_length=1", 2)):
        TINY.encode("pears", max_length=1)
    with pytest.raises(ValueError, match=naming("max_length=2", 3)):
        TINY.encode_pair("pears", "pears", max_length=2)


def test_a_batch_is_its_texts():
    texts = ["pears", "", "don't"]
    assert TINY.encode_batch(texts, max_length=3) == [TINY.encode(t, max_length=3) for t in texts]


def test_back_to_words():
    ids = TINY.encode("Unaffable pears, pear")
    assert TINY.decode(ids) == "unaffable pears , pear"
    assert TINY.decode(ids, skip_special_tokens=False) == "[CLS] unaffable pears , pear [SEP]"
    with pytest.raises(KeyError):
        TINY.decode([99])


def test_what_a_vocabulary_must_have():
    with pytest.raises(ValueError, match=naming("'[SEP]'")):
        bpe.WordPiece({"[UNK]": 0, "[CLS]": 1})
    with pytest.raises(ValueError, match=naming("id")):
        bpe.WordPiece({"[UNK]": 0, "[CLS]": 0, "[SEP]": 1})


@pytest.mark.parametrize("name", ["uncased", "cased"])
def test_golden(name, golden, tmp_path):
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


def test_a_folder_with_vocab_txt(tmp_path):
    wordpiece = bpe.load_wordpiece(write_folder(tmp_path, PIECES))
    assert wordpiece.vocab == TINY.vocab and wordpiece.lowercase
    assert wordpiece.pad_id == 0 and len(wordpiece) == len(PIECES)
    wordpiece = bpe.load_wordpiece(
        write_folder(tmp_path, PIECES, do_lower_case=False, tokenize_chinese_chars=False)
    )
    assert not wordpiece.lowercase and not wordpiece.handle_chinese_chars


def test_tokenizer_json_and_vocab_txt_of_one_vocabulary_agree(tmp_path, golden):
    vocab = SPEC["model"]["vocab"]
    folder = write_folder(tmp_path, sorted(vocab, key=vocab.__getitem__))
    from_json, from_txt = bpe.load_wordpiece(FILE), bpe.load_wordpiece(folder / "vocab.txt")
    for text in golden("wordpiece")["texts"]:
        assert from_json.encode(text) == from_txt.encode(text)


@pytest.mark.parametrize(
    ("lines", "facts"),
    [
        ([*PIECES, "pear"], ["line 17", "'pear'", "line 10"]),
        ([*PIECES[:6], "", *PIECES[6:]], ["line 7"]),
        (PIECES[3:], ["'[UNK]'"]),
    ],
)
def test_damaged_vocab_txt(tmp_path, lines, facts):
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
def test_damaged_tokenizer_json(tmp_path, changes, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        load(tmp_path, **changes)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=naming(tmp_path, "tokenizer.json", "vocab.txt")):
        bpe.load_wordpiece(tmp_path)
    with pytest.raises(FileNotFoundError, match=naming(tmp_path / "vocab.txt")):
        bpe.load_wordpiece(tmp_path / "vocab.txt")
    (tmp_path / "vocab.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=naming(tmp_path / "vocab.bin", "WordPiece")):
        bpe.load_wordpiece(tmp_path / "vocab.bin")


# Live


@pytest.fixture(scope="module")
def reference():
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(FILE))


@pytest.mark.parity
def test_every_character(reference):
    """As words see it: every code point within a word, and by itself."""
    wordpiece = bpe.load_wordpiece(FILE)
    # Lower case came to these letters after Unicode 14, which Python 3.11 knows, and U+11938 has
    # been two characters since Unicode 13.
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
def test_any_text(reference):
    wordpiece = bpe.load_wordpiece(FILE)
    some = st.sampled_from("aBé ç\u0301\u0300數字한\u00ad\u200d\x00\x85\t\n,.'$[]MASKSEP😀İßΣ")

    @settings(max_examples=1000, deadline=None)
    @given(st.one_of(st.text(), st.text(some)), st.text(some), st.integers(3, 20))
    def compare(first: str, second: str, length: int) -> None:
        reference.no_truncation()
        assert wordpiece.encode(first) == reference.encode(first).ids
        reference.enable_truncation(length)
        assert wordpiece.encode(first, max_length=length) == reference.encode(first).ids
        pair = reference.encode(first, second)
        assert wordpiece.encode_pair(first, second, max_length=length) == (pair.ids, pair.type_ids)

    compare()


@pytest.mark.parity
def test_all_minilm(reference):
    """The published vocabulary, if the model was pulled, on this repository's own text."""
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
