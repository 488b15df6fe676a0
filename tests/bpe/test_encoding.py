"""Encoding: tiktoken's contract, on a tiny vocabulary, on golden files, and against tiktoken."""

import pickle
import random
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
from bpe.pretokenize import LLAMA3, O200K
from tests.bpe import tiny
from tests.bpe.conftest import MODELS
from tests.naming import naming

ENCODING = tiny.encoding()


def tokens(text: str, encoding: bpe.Encoding = ENCODING, **options) -> list[bytes]:
    return encoding.decode_tokens_bytes(encoding.encode(text, **options))


def test_merges_go_by_priority_and_ids_are_something_else():
    assert tokens("low lower") == [b"low", b" lower"]
    assert ENCODING.encode("low") == [tiny.IDS[b"low"]]
    assert tiny.IDS[b"low"] == len(tiny.SPECIAL) + 256 + 1


def test_the_pair_counts_not_the_bytes_it_makes():
    """A vocabulary may list "lo"+"w" nowhere, though both "lo" and "low" are tokens."""
    merges = [(b"l", b"o"), (b"o", b"w"), (b"l", b"ow")]
    ids = {bytes([b]): b for b in range(256)} | {b"lo": 256, b"ow": 257, b"low": 258}
    by_pair = bpe.Encoding("p", pattern=".+", ranks=ids, special_tokens={}, merges=merges)
    assert tokens("low", by_pair) == [b"lo", b"w"]
    by_token = bpe.Encoding("t", pattern=".+", ranks=ids, special_tokens={})
    assert tokens("low", by_token) == [b"low"]
    ignoring = bpe.Encoding(
        "i", pattern=".+", ranks=ids, special_tokens={}, merges=merges, ignore_merges=True
    )
    assert tokens("low", ignoring) == [b"low"]
    assert tokens("lowlow", ignoring) == [b"lo", b"w", b"lo", b"w"]


def test_special_tokens():
    text = "low<|im_end|>low"
    with pytest.raises(ValueError, match=naming("'<|im_end|>'")):
        ENCODING.encode(text)
    assert ENCODING.encode(text, allowed_special={"<|im_end|>"})[1] == 2
    assert ENCODING.encode(text, allowed_special="all") == [tiny.IDS[b"low"], 2, tiny.IDS[b"low"]]
    ordinary = ENCODING.encode(text, disallowed_special=())
    assert ordinary == ENCODING.encode_ordinary(text)
    assert not any(map(ENCODING.is_special_token, ordinary))
    with pytest.raises(ValueError, match=naming("'<|im_end|>'")):
        ENCODING.encode(text, allowed_special={"<|im_start|>"})
    assert ENCODING.encode(text, disallowed_special={"<|im_start|>"}) == ordinary
    with pytest.raises(ValueError, match="'ow'"):
        ENCODING.encode(text, disallowed_special=["ow"])


def test_of_special_tokens_at_one_place_the_longest_counts():
    """tiktoken leaves this to the order of a hash table, Hugging Face takes the longest too."""
    encoding = tiny.encoding(special_tokens={"<a": 0, "<a>": 1, "<a>b": 2})
    assert encoding.encode("<a>b<a><a", allowed_special="all") == [2, 1, 0]


@pytest.mark.parametrize(
    ("text", "means"),
    [("\ud83d\ude00", "😀"), ("a\ud83db", "a\ufffdb"), ("\udc80", "\ufffd")],
)
def test_surrogates(text, means):
    assert ENCODING.encode(text) == ENCODING.encode(means)
    assert (
        ENCODING.decode(ENCODING.encode("<|im_end|>" + text, allowed_special="all"))[10:] == means
    )


def test_decoding():
    ids = ENCODING.encode("low 😀 lower")
    assert ENCODING.decode(ids) == "low 😀 lower"
    assert ENCODING.decode_bytes(tuple(ids)) == "low 😀 lower".encode()
    half = ENCODING.encode("😀")[:1]
    assert ENCODING.decode_bytes(half) == b"\xf0\x9f\x98"
    assert ENCODING.decode(half) == "\ufffd"
    with pytest.raises(UnicodeDecodeError):
        ENCODING.decode(half, errors="strict")
    assert ENCODING.decode([2]) == "<|im_end|>"


def test_offsets():
    text = "low 😀 lower<|im_end|>é"
    ids = ENCODING.encode(text, allowed_special="all")
    assert ENCODING.decode_with_offsets(ids) == (text, [0, 3, 4, 4, 5, 11, 21, 21])
    with pytest.raises(UnicodeDecodeError):
        ENCODING.decode_with_offsets(ENCODING.encode("😀")[:1])


def test_unknown_tokens_are_key_errors():
    for call in (
        lambda: ENCODING.decode([10**6]),
        lambda: ENCODING.decode_tokens_bytes([10**6]),
        lambda: ENCODING.decode_batch([[0], [10**6]]),
        lambda: ENCODING.decode_single_token_bytes(10**6),
        lambda: ENCODING.decode_with_offsets([10**6]),
        lambda: ENCODING.encode_single_token("lowlow"),
        lambda: ENCODING.encode_single_token(b"\xff\xff"),
        lambda: tiny.encoding(special_tokens={}).eot_token,
    ):
        with pytest.raises(KeyError):
            call()


def test_facts():
    assert ENCODING.n_vocab == ENCODING.max_token_value + 1 == 3 + 256 + len(tiny.MERGES)
    assert ENCODING.special_tokens == tiny.SPECIAL
    assert ENCODING.special_tokens_set == set(tiny.SPECIAL)
    assert ENCODING.eot_token == 0
    assert ENCODING.is_special_token(2) and not ENCODING.is_special_token(3)
    assert ENCODING.encode_single_token("low") == ENCODING.encode_single_token(b"low")
    assert ENCODING.encode_single_token("<|im_end|>") == 2
    assert repr(ENCODING) == "<Encoding 'tiny'>"


def test_pickle():
    assert pickle.loads(pickle.dumps(ENCODING)).encode("low lower") == ENCODING.encode("low lower")


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"ranks": {k: v for k, v in tiny.IDS.items() if k != b"a"}}, ["b'a'"]),
        ({"dropped_bytes": b"a"}, ["dropped_bytes", "b'a'"]),
        ({"special_tokens": {"<x>": 3}}, [r"b'\x00'", "'<x>'", 3]),
        ({"special_tokens": {"<x>": -1}}, ["'<x>'", "-1"]),
        ({"special_tokens": {"": 500}}, ["empty"]),
        ({"merges": [(b"zz", b"a")]}, ["(b'zz', b'a')"]),
        ({"merges": [(b"z", b"z")]}, ["(b'z', b'z')"]),
        ({"merges": [(b"o", b"w"), (b"o", b"w")]}, ["(b'o', b'w')"]),
        ({"pattern": "("}, ["pattern", "'('"]),
    ],
)
def test_inconsistent_vocabularies_are_refused(changes, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        tiny.encoding(**changes)


def test_bytes_without_a_token_are_dropped_before_merging():
    """As Hugging Face does for SmolLM2: "l\\x04ow" is "low" to the model."""
    ids = {token: id for token, id in tiny.IDS.items() if token != b"\x04"}
    encoding = tiny.encoding(ranks=ids, dropped_bytes=b"\x04", pattern="(?s:.+)")
    assert encoding.encode("l\x04ow\x04") == encoding.encode("low")
    assert encoding.encode("\x04") == []


def test_normalization():
    """Qwen2 composes characters first, but not across a special token, which is found before."""
    encoding = tiny.encoding(normalization="NFC")
    assert encoding.encode("e\u0301") == encoding.encode("\u00e9")
    assert ENCODING.encode("e\u0301") != ENCODING.encode("\u00e9")
    ids = encoding.encode("e<|im_end|>\u0301", allowed_special="all")
    assert encoding.decode(ids) == "e<|im_end|>\u0301"


@given(st.text())
def test_round_trip(text):
    for options in ({"disallowed_special": ()}, {"allowed_special": "all"}):
        assert ENCODING.decode(ENCODING.encode(text, **options)) == text


@pytest.mark.heavy
def test_the_cache_is_bounded_and_changes_nothing():
    encoding = tiny.encoding()
    words = ["".join(random.Random(i).choices(string.ascii_letters, k=9)) for i in range(40_000)]
    first = [encoding.encode(word) for word in words]
    assert len(encoding._cache) <= 1 << 15
    assert [encoding.encode(word) for word in words] == first


@pytest.mark.heavy
def test_a_megabyte_that_cannot_be_split():
    text = "a" * 1_000_000
    ids = ENCODING.encode(text)
    assert ids == [tiny.IDS[b"aaaa"]] * 250_000


@pytest.mark.parametrize("model", MODELS)
def test_golden(model, load_model, golden):
    """The ids of Hugging Face's tokenizers (see make_bpe.py), special tokens allowed."""
    encoding = load_model(model).encoding
    for case in golden(model)["texts"]:
        assert encoding.encode(case["text"], allowed_special="all") == case["ids"], case["text"]


@pytest.mark.parametrize("model", MODELS)
def test_golden_texts_come_back(model, load_model, golden):
    encoding = load_model(model).encoding
    for text in (case["text"] for case in golden(model)["texts"]):
        if not encoding.normalization and not set(text.encode()) & set(encoding.dropped_bytes):
            ids = encoding.encode_ordinary(text)
            assert encoding.decode(ids) == text
            decoded, offsets = encoding.decode_with_offsets(ids)
            assert decoded == text and sorted(offsets) == offsets


@pytest.fixture(scope="module")
def pair():
    """Our Encoding and tiktoken's, of the same ranks."""
    tiktoken = pytest.importorskip("tiktoken")
    rng = random.Random(1)
    ranks = {bytes([b]): i for i, b in enumerate(rng.sample(range(256), 256))}
    while len(ranks) < 900:
        # Some are two earlier tokens joined, some can only be met as whole pieces.
        known = list(ranks)
        token = rng.choice(known[:300]) + rng.choice(known)
        if rng.random() < 0.1:
            token = "".join(rng.choices("abc é1 ", k=4)).encode()
        ranks.setdefault(token, len(ranks))
    for word in ("the", " the", "in", "ing", "er", "ab", "aba", "abab", "é", "中", "<|"):
        ranks.setdefault(word.encode(), len(ranks))
    special = {"<|a|>": 1000, "<|b|>": 1001, "x<|a|>y": 1005}
    return (
        bpe.Encoding("t", pattern=LLAMA3, ranks=ranks, special_tokens=special),
        tiktoken.Encoding("t", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens=special),
    )


@pytest.mark.parity
class TestAgainstTiktoken:
    """The same calls on both give the same results, or errors of the same kind."""

    @staticmethod
    def same(pair, call):
        results = []
        for encoding in pair:
            try:
                results.append(call(encoding))
            except (ValueError, KeyError, TypeError) as error:
                results.append(type(error))
        assert results[0] == results[1]
        return results[0]

    TEXT = st.text(st.characters(exclude_categories=[])) | st.text("ab 1é中\n'ts")
    ALLOWED = st.sets(st.sampled_from(["<|a|>", "<|b|>", "nothing"])) | st.just("all")

    @settings(max_examples=500)
    @given(
        text=TEXT, allowed=ALLOWED, bits=st.lists(st.sampled_from(["<|a|>", "<|b|>", "<|", "y"]))
    )
    def test_encode(self, pair, text, allowed, bits):
        text = text.join([*bits, ""])
        self.same(pair, lambda e: e.encode_ordinary(text))
        self.same(pair, lambda e: e.encode(text))
        self.same(pair, lambda e: e.encode(text, allowed_special=allowed))
        ids = self.same(
            pair, lambda e: e.encode(text, allowed_special=allowed, disallowed_special=())
        )
        self.same(pair, lambda e: e.decode(ids))
        self.same(pair, lambda e: e.decode_with_offsets(ids))

    @settings(max_examples=500)
    @given(st.lists(st.integers(0, 1100)))
    def test_decode(self, pair, ids):
        for method in ("decode", "decode_bytes", "decode_tokens_bytes", "decode_with_offsets"):
            self.same(pair, lambda e, method=method: getattr(e, method)(ids))
        self.same(pair, lambda e: e.decode(ids, errors="strict"))
        self.same(pair, lambda e: [e.is_special_token(id) for id in ids])

    @given(st.binary(max_size=4) | st.text(max_size=3) | st.sampled_from(["<|a|>", "the"]))
    def test_single_tokens(self, pair, token):
        self.same(pair, lambda e: e.encode_single_token(token))

    def test_facts_and_messages(self, pair):
        for name in ("n_vocab", "max_token_value", "special_tokens_set", "name"):
            self.same(pair, lambda e, name=name: getattr(e, name))
        self.same(pair, lambda e: e.eot_token)
        self.same(pair, lambda e: e.encode("<|a|>", allowed_special="<|a|>"))
        self.same(pair, lambda e: e.encode(b"bytes"))
        messages = []
        for encoding in pair:
            with pytest.raises(ValueError) as error:
                encoding.encode("<|a|>")
            messages.append(str(error.value).splitlines()[0])
        assert messages[0] == messages[1]


@pytest.mark.parity
@settings(max_examples=200, deadline=None)
@given(st.text() | st.text("ab 12é中\n'stSTlL\u0301\u00a0"))
@pytest.mark.parametrize("model", MODELS)
def test_against_tokenizers(model, model_file, load_model, text):
    theirs = _reference(model, model_file(model))
    expected = theirs.encode(text, add_special_tokens=False)
    assert load_model(model).encoding.encode(text, allowed_special="all") == expected


_REFERENCES: dict = {}


def _reference(model, path):
    if model not in _REFERENCES:
        pytest.importorskip("transformers")
        from tests.golden.bpe import make_bpe

        _REFERENCES[model] = make_bpe.load(model, path.resolve())
    return _REFERENCES[model]


def test_batches():
    texts = ["low lower", "", "<|im_end|>", "😀"]
    options = {"allowed_special": "all"}
    assert ENCODING.encode_batch(texts, **options) == [ENCODING.encode(t, **options) for t in texts]
    assert ENCODING.encode_ordinary_batch(texts) == [ENCODING.encode_ordinary(t) for t in texts]
    with pytest.raises(ValueError, match=naming("'<|im_end|>'")):
        ENCODING.encode_batch(texts, num_threads=2)
    ids = ENCODING.encode_ordinary_batch(texts, num_threads=1)
    assert ENCODING.decode_batch(ids, errors="strict", num_threads=1) == texts
    assert ENCODING.decode_bytes_batch(ids) == [text.encode() for text in texts]
    assert ENCODING.encode_to_numpy("low 😀").tolist() == ENCODING.encode("low 😀")
    assert str(ENCODING.encode_to_numpy("").dtype) == "uint32"
    assert ENCODING.token_byte_values() == sorted(tiny.IDS)


def test_more_may_follow():
    """`low` can become ` lower` only with a space before it; `low` itself stays unstable."""
    stable, completions = ENCODING.encode_with_unstable("low low", allowed_special="all")
    assert ENCODING.decode(stable) == "low"
    expected = [[tiny.IDS[b" low"]], [tiny.IDS[b" lower"]]]
    assert [ids for ids in completions if len(ids) == 1] == sorted(expected)
    assert all(ENCODING.decode_bytes(ids).startswith(b" low") for ids in completions)
    assert ENCODING.encode_with_unstable("low<|im_end|>", allowed_special="all") == (
        [*ENCODING.encode("low"), 2],
        [],
    )
    assert ENCODING.encode_with_unstable("") == ([], [])


def test_of_white_space_at_the_end_all_may_change():
    """Also that of the piece before: o200k cuts "a\\n\\n  " before the blanks. As in tiktoken."""
    encoding = tiny.encoding(pattern=O200K)
    stable, completions = encoding.encode_with_unstable("a\n\n  ")
    assert encoding.decode(stable) == "a"
    assert encoding.encode("\n\n  ") in completions
    assert all(encoding.decode(ids).startswith("\n\n  ") for ids in completions)


@pytest.mark.parametrize("number", [3, 5000])
@pytest.mark.parametrize(
    ("wrong", "error"),
    [(10**6, KeyError), (-1, OverflowError), (1 << 40, OverflowError), (1.5, TypeError)]
    + [(None, TypeError), ("a", TypeError), ([1], TypeError)],
)
def test_wrong_ids(wrong, error, number):
    """Few ids and many are decoded in different ways; the errors are the same."""
    ids = [tiny.IDS[b"a"]] * number
    with pytest.raises(error, match=None if error is not KeyError else "1000000"):
        ENCODING.decode([*ids, wrong])
    for call in (ENCODING.decode_tokens_bytes, ENCODING.decode_with_offsets):
        with pytest.raises(error):
            call([*ids, wrong])


@pytest.mark.parametrize("tokens", [5, None, "abc", {1, 2}])
def test_what_is_no_sequence_of_ids(tokens):
    with pytest.raises(TypeError):
        ENCODING.decode(tokens)


@pytest.mark.parametrize("number", [3, 5000])
@pytest.mark.parametrize("dtype", ["float64", "bool", "object"])
def test_arrays_of_what_is_no_id(dtype, number):
    """Many floats were an AssertionError, few bools were the ids 0 and 1."""
    for call in (ENCODING.decode, ENCODING.decode_tokens_bytes, ENCODING.decode_with_offsets):
        with pytest.raises(TypeError, match=naming(dtype, f"({number},)")):
            call(np.ones(number, dtype))
        with pytest.raises(TypeError, match=naming("int64", f"({number}, 1)")):
            call(np.ones((number, 1), np.int64))
    assert ENCODING.decode(np.array([])) == "", "of no numbers, NumPy makes floats"


@pytest.mark.parametrize("number", [1, 500])
def test_bytes_are_ids_too(number):
    """Many of them were taken four for one."""
    ids = b"abcd" * number
    assert ENCODING.decode(ids) == ENCODING.decode(list(ids))


@pytest.mark.parametrize("id", [-1, 1 << 32, 1.5, "7", None])
def test_ids_are_numbers_of_32_bits(id):
    with pytest.raises(ValueError, match=naming("'<x>'", 2**32 - 1, repr(id))):
        tiny.encoding(special_tokens={"<x>": id})


@pytest.mark.parametrize("text", [b"bytes", ["list"], None, b"much" * 20_000])
def test_only_strings_are_text(text):
    for call in (ENCODING.encode, ENCODING.encode_to_numpy):
        with pytest.raises(TypeError):
            call(text, disallowed_special=())
    with pytest.raises(TypeError):
        ENCODING.encode_ordinary(text)


def test_gaps_in_the_numbering():
    encoding = tiny.encoding(special_tokens={"<|a|>": 5000})
    for number in (1, 5000):
        assert encoding.decode([5000] * number) == "<|a|>" * number
        with pytest.raises(KeyError, match=naming(4000)):
            encoding.decode([5000] * number + [4000])


@given(st.lists(st.integers(0, ENCODING.max_token_value), min_size=20), st.integers(1, 100))
def test_many_ids(ids, times):
    """Tokens of all lengths in every order, as a list and as arrays."""
    ids = ids * (times + 1000 // len(ids))
    expected = b"".join(map(ENCODING.decode_single_token_bytes, ids))
    assert ENCODING.decode_bytes(ids) == expected
    for dtype in (np.uint32, np.int64, np.uint16):
        assert ENCODING.decode_bytes(np.array(ids, dtype)) == expected


def test_explicit_n_vocab():
    tiny.encoding(explicit_n_vocab=3 + 256 + len(tiny.MERGES))
    for wrong in (1, 3 + 256 + len(tiny.MERGES) + 1):
        with pytest.raises(ValueError, match=naming("explicit_n_vocab", wrong)):
            tiny.encoding(explicit_n_vocab=wrong)
    with pytest.raises(ValueError, match=naming("explicit_n_vocab", 1000)):
        tiny.encoding(special_tokens={**tiny.SPECIAL, "<x>": 999}, explicit_n_vocab=1000)


@pytest.mark.parametrize("changes", [{}, {"merges": None}, {"normalization": "NFC"}])
def test_pickles_hold_what_was_given(changes):
    encoding = tiny.encoding(**changes)
    encoding.encode("low" * 20_000)  # tables that are made when needed are not part of it
    copy = pickle.loads(pickle.dumps(encoding))
    for name in ("name", "patterns", "ranks", "special_tokens", "merges", "normalization"):
        assert getattr(copy, name) == getattr(encoding, name)
    assert copy.encode("low lower 😀") == encoding.encode("low lower 😀")


def test_only_strings_are_encoded():
    for wrong in (5, None, b"a", ["a"]):
        for call in (ENCODING.encode, ENCODING.encode_ordinary, ENCODING.encode_to_numpy):
            with pytest.raises(TypeError):
                call(wrong)
        with pytest.raises(TypeError):
            ENCODING.encode_ordinary_batch([wrong])
    for wrong in (5, None, bytearray(b"a")):
        with pytest.raises(TypeError):
            ENCODING.encode_single_token(wrong)
