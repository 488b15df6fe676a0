"""Comparison with tiktoken: every named encoding, every method, and 100 MB of text.

    pytest -m parity tests/bpe/test_tiktoken.py

The long texts come from Debian packages (tests/bench/corpus.py); without them, those tests are
skipped.
"""

import random
import unicodedata

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bpe
from tests.bench import corpus
from tests.bpe.tiktoken_cache import fill

pytestmark = pytest.mark.parity

NAMES = bpe.list_encoding_names()
# The other encodings have the same tokens and pattern as one of these.
DIFFERENT = ["gpt2", "p50k_base", "cl100k_base", "o200k_base"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    tiktoken = pytest.importorskip("tiktoken")
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("tiktoken")
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        fill(folder)
        yield {name: tiktoken.get_encoding(name) for name in NAMES}


def outcome(call):
    try:
        return call()
    except Exception as error:  # the other must raise the same type
        return type(error)


@pytest.mark.parametrize("name", NAMES)
def test_vocabulary_matches_tiktoken(theirs, name):
    ours, peer = bpe.get_encoding(name), theirs[name]
    assert ours.ranks == peer._mergeable_ranks
    assert ours.special_tokens == peer._special_tokens
    assert ours.patterns == (peer._pat_str,)
    for fact in ("name", "n_vocab", "max_token_value", "eot_token", "special_tokens_set"):
        assert getattr(ours, fact) == getattr(peer, fact)
    assert ours.token_byte_values() == peer.token_byte_values()
    for id in range(ours.n_vocab + 2):
        assert ours.is_special_token(id) == peer.is_special_token(id)
        assert outcome(lambda id=id: ours.decode_single_token_bytes(id)) == outcome(
            lambda id=id: peer.decode_single_token_bytes(id)
        )


TEXT = st.lists(
    st.text(st.characters(exclude_categories=["Cn", "Co"]))
    | st.sampled_from(["<|endoftext|>", "<|endofprompt|>", "<|im_start|>", "don't", "I'LL", "🙂"])
    | st.text(" \n\t'sStlLvVeEaA1/!中\u0301é", max_size=12)
).map("".join)
SETS = st.just("all") | st.sets(st.sampled_from(["<|endoftext|>", "<|endofprompt|>", "nothing"]))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(text=TEXT, allowed=SETS, disallowed=SETS | st.just(()))
def test_encode_and_decode_methods_match_tiktoken(theirs, name, text, allowed, disallowed):
    pair = bpe.get_encoding(name), theirs[name]
    options = {"allowed_special": allowed, "disallowed_special": disallowed}

    def same(call):
        ours, peers = (outcome(lambda e=e: call(e)) for e in pair)
        assert ours == peers
        return ours

    same(lambda e: e.encode(text))
    ids = same(lambda e: e.encode(text, **options))
    same(lambda e: e.encode_ordinary(text))
    same(lambda e: e.encode_batch([text, "a", text], **options))
    same(lambda e: e.encode_ordinary_batch([text, ""]))
    if not any("\ud800" <= c < "\ue000" for c in text):
        same(lambda e: e.encode_to_numpy(text, **options).tolist())
    if isinstance(ids, list):
        same(lambda e: e.decode(ids))
        same(lambda e: e.decode(ids[::-1], errors="ignore"))
        same(lambda e: e.decode_bytes(ids[::2]))
        same(lambda e: e.decode_tokens_bytes(ids))
        same(lambda e: e.decode_with_offsets(ids))
        same(lambda e: e.decode_with_offsets(ids[::2]))
        same(lambda e: e.decode_batch([ids, ids[1:]]))
        same(lambda e: e.decode_bytes_batch([ids, []]))


@pytest.mark.parametrize("name", DIFFERENT)
def test_encode_with_unstable_matches_tiktoken(theirs, name):
    rng = random.Random(0)
    bits = [
        "hello",
        " fan",
        "ta",
        " ",
        "\n",
        "  ",
        "é",
        "中",
        "🙂",
        "!",
        "don'",
        "12",
        "<|endoftext|>",
    ]
    texts = [*bits, "", *("".join(rng.choices(bits, k=rng.randint(2, 4))) for _ in range(40))]
    for text in texts:
        ours = bpe.get_encoding(name).encode_with_unstable(text, allowed_special="all")
        stable, completions = theirs[name].encode_with_unstable(text, allowed_special="all")
        assert ours == (stable, sorted(completions)), text


def test_surrogates_encode_where_tiktoken_raises(theirs):
    """The method `encode` of tiktoken replaces surrogates; its `encode_to_numpy` raises."""
    text = "a\ud83d\ude00b\ud83d"
    ours, peer = bpe.get_encoding("cl100k_base"), theirs["cl100k_base"]
    assert ours.encode_to_numpy(text).tolist() == ours.encode(text) == peer.encode(text)
    with pytest.raises(UnicodeEncodeError):
        peer.encode_to_numpy(text)


def check_ids(theirs, text: str) -> None:
    for name in DIFFERENT:
        ours = bpe.get_encoding(name).encode_to_numpy(text, disallowed_special=())
        try:
            peers = theirs[name].encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # of surrogates
            peers = np.array(theirs[name].encode(text, disallowed_special=()), np.uint32)
        assert np.array_equal(ours, peers), name
        assert bpe.get_encoding(name).decode_bytes(ours) == theirs[name].decode_bytes(ours.tolist())


@pytest.mark.parametrize("kind", corpus.KINDS)
def test_long_texts_match_tiktoken(theirs, kind):
    try:
        text = corpus.load(kind)
    except RuntimeError as error:
        pytest.skip(str(error))
    for begin in range(0, len(text), 10_000_000):
        check_ids(theirs, text[begin : begin + 10_000_000])


@pytest.mark.parametrize("unit", ["a", "A", "1", " ", "\n", "!", "\0", "é", "中", "🙂", "\u0301"])
def test_megabytes_of_one_character_match_tiktoken(theirs, unit):
    """Use 0.3 MB of whitespace, because tiktoken's regex engine takes quadratic time for it."""
    check_ids(theirs, unit * ((300_000 if unit.isspace() else 2_000_000) // len(unit.encode())))


def test_malformed_text_matches_tiktoken(theirs):
    """Compare control characters, all common characters, random bytes and lone surrogates."""
    rng = random.Random(0)
    check_ids(
        theirs, "".join(rng.choices([*map(chr, range(32)), "\x7f", "\x85", "a", " "], k=500_000))
    )
    # The newest characters, and this one, depend on the version of Unicode.
    common = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]
    common.remove("\u0295")
    check_ids(theirs, "".join(common))
    check_ids(theirs, "".join(f"a{c}B {c}{c}1'{c}\n" for c in common if c < "\ue000"))
    check_ids(theirs, "".join(rng.choices(common, k=500_000)))
    both = {*common, *map(chr, range(0xD800, 0xE000))}
    for codec, errors in (("utf-8", "surrogateescape"), ("utf-16", "surrogatepass")):
        text = rng.randbytes(500_000).decode(codec, errors)
        check_ids(theirs, "".join(c for c in text if c in both))
