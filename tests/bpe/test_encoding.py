"""Encoding: the API of tiktoken, on a tiny vocabulary, on golden files, and against tiktoken."""

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


def test_merge_listed_first_is_applied_first():
    assert tokens("low lower") == [b"low", b" lower"]
    assert ENCODING.encode("low") == [tiny.IDS[b"low"]]
    assert tiny.IDS[b"low"] == len(tiny.SPECIAL) + 256 + 1


def test_merge_of_unlisted_pair_with_same_bytes_is_not_applied():
    """The merges may lack "lo" + "w" although both "lo" and "low" are tokens."""
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


def test_special_tokens_allowed_and_disallowed_follow_tiktoken():
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


def test_overlapping_special_tokens_match_the_longest():
    """In tiktoken this depends on the order of a hash table; Hugging Face also uses the longest."""
    encoding = tiny.encoding(special_tokens={"<a": 0, "<a>": 1, "<a>b": 2})
    assert encoding.encode("<a>b<a><a", allowed_special="all") == [2, 1, 0]


@pytest.mark.parametrize(
    ("text", "equivalent"),
    [("\ud83d\ude00", "😀"), ("a\ud83db", "a\ufffdb"), ("\udc80", "\ufffd")],
)
def test_surrogates_are_joined_or_replaced(text, equivalent):
    assert ENCODING.encode(text) == ENCODING.encode(equivalent)
    ids = ENCODING.encode("<|im_end|>" + text, allowed_special="all")
    assert ENCODING.decode(ids)[10:] == equivalent


def test_decode_of_complete_and_partial_characters():
    ids = ENCODING.encode("low 😀 lower")
    assert ENCODING.decode(ids) == "low 😀 lower"
    assert ENCODING.decode_bytes(tuple(ids)) == "low 😀 lower".encode()
    half = ENCODING.encode("😀")[:1]
    assert ENCODING.decode_bytes(half) == b"\xf0\x9f\x98"
    assert ENCODING.decode(half) == "\ufffd"
    with pytest.raises(UnicodeDecodeError):
        ENCODING.decode(half, errors="strict")
    assert ENCODING.decode([2]) == "<|im_end|>"


def test_decode_with_offsets_returns_character_offsets():
    text = "low 😀 lower<|im_end|>é"
    ids = ENCODING.encode(text, allowed_special="all")
    assert ENCODING.decode_with_offsets(ids) == (text, [0, 3, 4, 4, 5, 11, 21, 21])
    with pytest.raises(UnicodeDecodeError):
        ENCODING.decode_with_offsets(ENCODING.encode("😀")[:1])


def test_unknown_ids_and_tokens_raise_key_error():
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


def test_properties_of_tiny_encoding_match_definition():
    assert ENCODING.n_vocab == ENCODING.max_token_value + 1 == 3 + 256 + len(tiny.MERGES)
    assert ENCODING.special_tokens == tiny.SPECIAL
    assert ENCODING.special_tokens_set == set(tiny.SPECIAL)
    assert ENCODING.eot_token == 0
    assert ENCODING.is_special_token(2) and not ENCODING.is_special_token(3)
    assert ENCODING.encode_single_token("low") == ENCODING.encode_single_token(b"low")
    assert ENCODING.encode_single_token("<|im_end|>") == 2
    assert repr(ENCODING) == "<Encoding 'tiny'>"


def test_pickled_encoding_encodes_the_same():
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
def test_inconsistent_vocabulary_is_rejected(changes, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        tiny.encoding(**changes)


def test_bytes_missing_from_vocabulary_are_dropped_before_merging():
    r"""As in Hugging Face's tokenizer of SmolLM2, "l\x04ow" is encoded like "low"."""
    ids = {token: id for token, id in tiny.IDS.items() if token != b"\x04"}
    encoding = tiny.encoding(ranks=ids, dropped_bytes=b"\x04", pattern="(?s:.+)")
    assert encoding.encode("l\x04ow\x04") == encoding.encode("low")
    assert encoding.encode("\x04") == []


def test_normalization_applies_between_special_tokens():
    """Qwen2 composes characters before encoding, but not across a special token."""
    encoding = tiny.encoding(normalization="NFC")
    assert encoding.encode("e\u0301") == encoding.encode("\u00e9")
    assert ENCODING.encode("e\u0301") != ENCODING.encode("\u00e9")
    ids = encoding.encode("e<|im_end|>\u0301", allowed_special="all")
    assert encoding.decode(ids) == "e<|im_end|>\u0301"


@given(st.text())
def test_encode_then_decode_returns_the_text(text):
    for options in ({"disallowed_special": ()}, {"allowed_special": "all"}):
        assert ENCODING.decode(ENCODING.encode(text, **options)) == text


@pytest.mark.heavy
def test_full_piece_cache_is_cleared_without_changing_ids():
    encoding = tiny.encoding()
    words = ["".join(random.Random(i).choices(string.ascii_letters, k=9)) for i in range(40_000)]
    first = [encoding.encode(word) for word in words]
    assert len(encoding._cache) <= 1 << 15
    assert [encoding.encode(word) for word in words] == first


@pytest.mark.heavy
def test_single_piece_of_one_megabyte_is_encoded():
    text = "a" * 1_000_000
    ids = ENCODING.encode(text)
    assert ids == [tiny.IDS[b"aaaa"]] * 250_000


@pytest.mark.parametrize("model", MODELS)
def test_ids_match_golden_file(model, load_model, golden):
    """The golden ids come from Hugging Face's tokenizers (see make_bpe.py)."""
    encoding = load_model(model).encoding
    for case in golden(model)["texts"]:
        assert encoding.encode(case["text"], allowed_special="all") == case["ids"], case["text"]


@pytest.mark.parametrize("model", MODELS)
def test_golden_texts_round_trip(model, load_model, golden):
    encoding = load_model(model).encoding
    for text in (case["text"] for case in golden(model)["texts"]):
        if not encoding.normalization and not set(text.encode()) & set(encoding.dropped_bytes):
            ids = encoding.encode_ordinary(text)
            assert encoding.decode(ids) == text
            decoded, offsets = encoding.decode_with_offsets(ids)
            assert decoded == text and sorted(offsets) == offsets


@pytest.fixture(scope="module")
def pair():
    """Return our Encoding and tiktoken's with the same ranks."""
    tiktoken = pytest.importorskip("tiktoken")
    rng = random.Random(1)
    ranks = {bytes([b]): i for i, b in enumerate(rng.sample(range(256), 256))}
    while len(ranks) < 900:
        # Most tokens are two earlier tokens, concatenated; no sequence of merges makes the others.
        tokens = list(ranks)
        token = rng.choice(tokens[:300]) + rng.choice(tokens)
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
    """The same calls on both encodings return equal results, or raise errors of the same type."""

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
    def test_encode_and_decode_of_text_match_tiktoken(self, pair, text, allowed, bits):
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
    def test_decode_of_random_ids_matches_tiktoken(self, pair, ids):
        for method in ("decode", "decode_bytes", "decode_tokens_bytes", "decode_with_offsets"):
            self.same(pair, lambda e, method=method: getattr(e, method)(ids))
        self.same(pair, lambda e: e.decode(ids, errors="strict"))
        self.same(pair, lambda e: [e.is_special_token(id) for id in ids])

    @given(st.binary(max_size=4) | st.text(max_size=3) | st.sampled_from(["<|a|>", "the"]))
    def test_encode_single_token_matches_tiktoken(self, pair, token):
        self.same(pair, lambda e: e.encode_single_token(token))

    def test_properties_and_error_messages_match_tiktoken(self, pair):
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
@settings(max_examples=200)
@given(st.text() | st.text("ab 12é中\n'stSTlL\u0301\u00a0"))
@pytest.mark.parametrize("model", MODELS)
def test_ids_match_tokenizers(model, model_file, load_model, text):
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


def test_batch_methods_match_single_calls():
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


def test_unstable_last_piece_has_completions():
    """Text after " low" may change its token to " lower", so " low" is unstable."""
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


def test_trailing_whitespace_pieces_are_all_unstable():
    """With o200k, newlines and blanks are separate pieces; both are unstable, as in tiktoken."""
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
def test_decode_of_invalid_id_raises(wrong, error, number):
    """Few ids and many ids are decoded by different code; the errors are the same."""
    ids = [tiny.IDS[b"a"]] * number
    with pytest.raises(error, match=None if error is not KeyError else "1000000"):
        ENCODING.decode([*ids, wrong])
    for call in (ENCODING.decode_tokens_bytes, ENCODING.decode_with_offsets):
        with pytest.raises(error):
            call([*ids, wrong])


@pytest.mark.parametrize("tokens", [5, None, "abc", {1, 2}])
def test_decode_of_non_sequence_raises_type_error(tokens):
    with pytest.raises(TypeError):
        ENCODING.decode(tokens)


@pytest.mark.parametrize("number", [3, 5000])
@pytest.mark.parametrize("dtype", ["float64", "bool", "object"])
def test_decode_of_non_integer_array_raises_type_error(dtype, number):
    """Bug: many floats raised an AssertionError, and few bools were decoded as the ids 0 and 1."""
    for call in (ENCODING.decode, ENCODING.decode_tokens_bytes, ENCODING.decode_with_offsets):
        with pytest.raises(TypeError, match=naming(dtype, f"({number},)")):
            call(np.ones(number, dtype))
        with pytest.raises(TypeError, match=naming("int64", f"({number}, 1)")):
            call(np.ones((number, 1), np.int64))
    assert ENCODING.decode(np.array([])) == "", "an empty array has the dtype float64"


@pytest.mark.parametrize("number", [1, 500])
def test_decode_of_bytes_treats_each_byte_as_id(number):
    """Bug: in long bytes, four bytes were read as one id."""
    ids = b"abcd" * number
    assert ENCODING.decode(ids) == ENCODING.decode(list(ids))


@pytest.mark.parametrize("id", [-1, 1 << 32, 1.5, "7", None])
def test_special_token_id_outside_32_bits_is_rejected(id):
    with pytest.raises(ValueError, match=naming("'<x>'", 2**32 - 1, repr(id))):
        tiny.encoding(special_tokens={"<x>": id})


@pytest.mark.parametrize("text", [b"bytes", ["list"], None, b"much" * 20_000])
def test_encode_of_non_string_raises_type_error(text):
    for call in (ENCODING.encode, ENCODING.encode_to_numpy):
        with pytest.raises(TypeError):
            call(text, disallowed_special=())
    with pytest.raises(TypeError):
        ENCODING.encode_ordinary(text)


def test_decode_of_unused_id_raises_key_error():
    encoding = tiny.encoding(special_tokens={"<|a|>": 5000})
    for number in (1, 5000):
        assert encoding.decode([5000] * number) == "<|a|>" * number
        with pytest.raises(KeyError, match=naming(4000)):
            encoding.decode([5000] * number + [4000])


@given(st.lists(st.integers(0, ENCODING.max_token_value), min_size=20), st.integers(1, 100))
def test_decode_of_many_ids_matches_single_decoding(ids, times):
    """Decode tokens of all lengths in random order, from a list and from arrays."""
    ids = ids * (times + 1000 // len(ids))
    expected = b"".join(map(ENCODING.decode_single_token_bytes, ids))
    assert ENCODING.decode_bytes(ids) == expected
    for dtype in (np.uint32, np.int64, np.uint16):
        assert ENCODING.decode_bytes(np.array(ids, dtype)) == expected


def test_explicit_n_vocab_mismatch_is_rejected():
    tiny.encoding(explicit_n_vocab=3 + 256 + len(tiny.MERGES))
    for wrong in (1, 3 + 256 + len(tiny.MERGES) + 1):
        with pytest.raises(ValueError, match=naming("explicit_n_vocab", wrong)):
            tiny.encoding(explicit_n_vocab=wrong)
    with pytest.raises(ValueError, match=naming("explicit_n_vocab", 1000)):
        tiny.encoding(special_tokens={**tiny.SPECIAL, "<x>": 999}, explicit_n_vocab=1000)


@pytest.mark.parametrize("changes", [{}, {"merges": None}, {"normalization": "NFC"}])
def test_pickle_preserves_constructor_arguments(changes):
    encoding = tiny.encoding(**changes)
    encoding.encode("low" * 20_000)  # lazily created tables are not pickled
    copy = pickle.loads(pickle.dumps(encoding))
    for name in ("name", "patterns", "ranks", "special_tokens", "merges", "normalization"):
        assert getattr(copy, name) == getattr(encoding, name)
    assert copy.encode("low lower 😀") == encoding.encode("low lower 😀")


def test_encode_methods_with_wrong_type_raise_type_error():
    for wrong in (5, None, b"a", ["a"]):
        for call in (ENCODING.encode, ENCODING.encode_ordinary, ENCODING.encode_to_numpy):
            with pytest.raises(TypeError):
                call(wrong)
        with pytest.raises(TypeError):
            ENCODING.encode_ordinary_batch([wrong])
    for wrong in (5, None, bytearray(b"a")):
        with pytest.raises(TypeError):
            ENCODING.encode_single_token(wrong)
