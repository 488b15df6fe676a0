"""The machine of `bpe.grammar` against brute force, and against llguidance on random texts."""

import itertools
import random
import re

import llguidance
import numpy as np
import pytest

from bpe import grammar
from bpe.grammar import Matcher, parse_regex
from tests.naming import naming

BYTES = [bytes([byte]) for byte in range(256)]
PATTERNS = [
    "(ab)+c",
    "[a-c]*b{2,3}",
    "a|bc?|(?:cab)*",
    "[^ab]a?",
    "a{2,}|.b",
    "(a|b)*a(a|b)",
    "a?b?c?",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_allowed_tokens_are_those_that_can_begin_a_match(pattern):
    tokens = [b"a", b"b", b"c", b"ab", b"bca", b"cc"]
    texts = {
        "".join(letters).encode()
        for n in range(8)
        for letters in itertools.product("abc", repeat=n)
    }
    matches = {text for text in texts if re.fullmatch(pattern, text.decode())}
    prefixes = {text[:end] for text in matches for end in range(len(text) + 1)}
    for prefix in sorted(prefixes):
        if len(prefix) > 2:  # seven bytes are enough for a token and the end of each pattern
            continue
        matcher = Matcher(parse_regex(pattern), [*BYTES, *tokens])
        for byte in prefix:
            matcher.accept(byte)
        expected = [256 + i for i, token in enumerate(tokens) if prefix + token in prefixes]
        allowed = [id for id in matcher.allowed_tokens() if id >= 256]
        assert allowed == expected, prefix
        assert matcher.can_end == (prefix in matches), prefix


def random_vocabulary(rng, parts, size=100):
    """Return all single bytes, and tokens of two to five parts."""
    tokens = {b"".join(rng.choices(parts, k=rng.randint(2, 5))) for _ in range(size)}
    return [*BYTES, *sorted(tokens - set(BYTES))]


def llguidance_matcher(source, vocabulary):
    class Vocabulary:
        eos_token_id = len(vocabulary)
        bos_token_id = None
        special_token_ids = (len(vocabulary),)
        tokens = (*vocabulary, b"<eos>")

        def __call__(self, text):
            return list(text if isinstance(text, bytes) else text.encode())

    tokenizer = llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(Vocabulary()), n_vocab=len(vocabulary) + 1, slices=[]
    )
    matcher = llguidance.LLMatcher(tokenizer, source)
    assert not matcher.is_error()
    return matcher


def assert_same_tokens(expression, source, vocabulary, rng, steps=40):
    """Compare the allowed tokens along one random text of the grammar."""
    ours, theirs = Matcher(expression, vocabulary), llguidance_matcher(source, vocabulary)
    for _ in range(steps):
        if ours.is_finished:
            assert theirs.is_stopped()
            return
        bits = np.unpackbits(np.frombuffer(theirs.compute_bitmask(), np.uint8), bitorder="little")
        *allowed, is_end = bits[: len(vocabulary) + 1].tolist()
        expected = np.flatnonzero(allowed).tolist()
        if forced := theirs.compute_ff_tokens():  # of a forced text llguidance takes one spelling
            assert expected == forced[:1] and forced[0] in ours.allowed_tokens()
        else:
            assert ours.allowed_tokens() == expected
            assert ours.can_end == is_end
        if not expected:
            return
        token = rng.choice(expected)
        ours.accept(token)
        assert theirs.consume_token(token)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pattern", [*PATTERNS, ".{1,3}é", '\\{"[0-9]+"\\}', "[à-ü😀]+x"])
def test_allowed_tokens_equal_llguidance(pattern, seed):
    rng = random.Random(seed)
    parts = [b"a", b"b", b"c", b"x", b'{"', b"1", "é".encode(), b"\xf0\x9f", b"\x98\x80"]
    source = llguidance.grammar_from("regex", pattern)
    assert_same_tokens(parse_regex(pattern), source, random_vocabulary(rng, parts), rng)


@pytest.mark.parametrize("seed", range(6))
def test_allowed_tokens_of_json_object_equal_llguidance(seed):
    rng = random.Random(seed)
    parts = [*'{}"[]10-.e\\ua\n', ": ", ", ", "tr", "ue", "null", "é"]
    source = llguidance.LLMatcher.grammar_from_json_schema(
        '{"type": "object"}',
        overrides={"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False},
    )
    vocabulary = random_vocabulary(rng, [part.encode() for part in parts])
    assert_same_tokens(grammar.JSON_OBJECT, source, vocabulary, rng)


def test_token_bitmask_has_the_bits_of_allowed_tokens():
    matcher = Matcher(parse_regex("a|b"), [b"a", b"", *[b"c"] * 40, b"b"])
    assert matcher.token_bitmask().tolist() == [1, 1 << 10]


def test_accept_of_token_that_is_not_allowed_raises_value_error():
    with pytest.raises(ValueError, match=naming("1", "b'c'")):
        Matcher(parse_regex("a"), [b"a", b"c"]).accept(1)


@pytest.mark.parametrize("pattern", ["(", "a)", "[a", "*a", "a\\", "\\p{L}", "^a", "a(?=b)"])
def test_pattern_not_supported_raises_value_error(pattern):
    with pytest.raises(ValueError, match=re.escape(repr(pattern))):
        parse_regex(pattern)
