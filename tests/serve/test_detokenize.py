"""Test that each text delta contains exactly the tokens that encode it."""

import math
import random

import pytest

import bpe
from serve.api.detokenize import Detokenizer, clamp_logprob, token_text
from tests.serve.scripted import encoding
from transformer.engine import Token

MERGED = bpe.Encoding(
    "merged",
    pattern=r"[\s\S]+",
    ranks={bytes([byte]): byte for byte in range(256)} | {b"lo": 256, b"lo w": 257, b"wo": 258},
    special_tokens={},
)


def detokenize(ids, stop_strings=(), reason="length", encoding=encoding):
    detokenizer = Detokenizer(encoding, stop_strings)
    deltas = []
    for id in ids:
        deltas.append(detokenizer.push(Token(id, -1.0, ())))
        if deltas[-1].finish_reason:
            return deltas
    return [*deltas, detokenizer.finish(reason)]


def joined(deltas):
    return "".join(delta.text for delta in deltas)


def ids_of(deltas):
    return [item.token.id for delta in deltas for item in delta.tokens]


def test_split_character_is_emitted_with_all_its_tokens():
    deltas = detokenize("a😀b".encode())
    assert [delta.text for delta in deltas] == ["a", "", "", "", "😀", "b", ""]
    assert [len(delta.tokens) for delta in deltas] == [1, 0, 0, 0, 4, 1, 0]
    assert [item.offset for delta in deltas for item in delta.tokens] == [0, 1, 1, 1, 1, 2]


def test_incomplete_character_at_end_is_emitted():
    deltas = detokenize("a😀".encode()[:-1])
    assert joined(deltas) == "a\ufffd"
    assert ids_of(deltas) == list("a😀".encode()[:-1])
    assert deltas[-1].finish_reason == "length" and deltas[-1].num_generated == 4


def test_possible_stop_string_is_held_back():
    deltas = detokenize(b"abSTOx", ["STOP"])
    assert [delta.text for delta in deltas] == ["a", "b", "", "", "", "STOx", ""]
    assert [len(delta.tokens) for delta in deltas] == [1, 1, 0, 0, 0, 4, 0]


def test_stop_string_is_counted_but_not_emitted():
    deltas = detokenize(b"abSTOPcd", ["STOP"])
    assert joined(deltas) == "ab" and ids_of(deltas) == list(b"ab")
    assert deltas[-1].finish_reason == "stop" and deltas[-1].num_generated == 6


def test_token_cut_by_stop_string_is_emitted():
    deltas = detokenize([*b"hel", 257, *b"orld"], [" wor"], encoding=MERGED)
    assert joined(deltas) == "hello"
    assert ids_of(deltas) == [*b"hel", 257]


def test_random_text_ends_before_its_first_stop_string():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab😀ö") for _ in range(12))
        stops = ["".join(rng.choice("ab😀ö") for _ in range(rng.randint(1, 3)))]
        deltas = detokenize(text.encode(), stops)
        expected = text.partition(stops[0])[0]
        assert joined(deltas) == expected
        assert bytes(ids_of(deltas)).decode() == expected
        assert deltas[-1].finish_reason == ("length" if expected == text else "stop")


@pytest.mark.parametrize(
    ("data", "text"), [(b"abc", "abc"), ("ö".encode(), "ö"), (b"\xf0\x9f", r"bytes:\xf0\x9f")]
)
def test_token_text_of_invalid_utf8_names_bytes(data, text):
    assert token_text(data) == text


def test_clamp_logprob_of_infinity_is_finite():
    assert clamp_logprob(-math.inf) == -9999.0 and clamp_logprob(-1.5) == -1.5
