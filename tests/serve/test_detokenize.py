"""Text leaves with exactly the tokens that spelled it."""

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


def play(ids, stops=(), reason="length", encoding=encoding):
    assembler = Detokenizer(encoding, stops)
    pieces = []
    for id in ids:
        pieces.append(assembler.push(Token(id, -1.0, ())))
        if pieces[-1].finish_reason:
            return pieces
    return [*pieces, assembler.finish(reason)]


def joined(pieces):
    return "".join(piece.text for piece in pieces)


def ids_of(pieces):
    return [placed.token.id for piece in pieces for placed in piece.tokens]


def test_a_character_waits_for_all_its_bytes_and_brings_their_tokens():
    pieces = play("a😀b".encode())
    assert [piece.text for piece in pieces] == ["a", "", "", "", "😀", "b", ""]
    assert [len(piece.tokens) for piece in pieces] == [1, 0, 0, 0, 4, 1, 0]
    assert [placed.offset for piece in pieces for placed in piece.tokens] == [0, 1, 1, 1, 1, 2]


def test_half_a_character_at_the_end_is_still_accounted_for():
    pieces = play("a😀".encode()[:-1])
    assert joined(pieces) == "a\ufffd"
    assert ids_of(pieces) == list("a😀".encode()[:-1])
    assert pieces[-1].finish_reason == "length" and pieces[-1].generated == 4


def test_what_may_become_a_stop_string_is_held_back_with_its_tokens():
    pieces = play(b"abSTOx", ["STOP"])
    assert [piece.text for piece in pieces] == ["a", "b", "", "", "", "STOx", ""]
    assert [len(piece.tokens) for piece in pieces] == [1, 1, 0, 0, 0, 4, 0]


def test_a_stop_string_and_its_tokens_are_never_emitted_but_are_counted():
    pieces = play(b"abSTOPcd", ["STOP"])
    assert joined(pieces) == "ab" and ids_of(pieces) == list(b"ab")
    assert pieces[-1].finish_reason == "stop" and pieces[-1].generated == 6


def test_a_token_cut_by_a_stop_string_is_kept_for_its_beginning():
    pieces = play([*b"hel", 257, *b"orld"], [" wor"], encoding=MERGED)
    assert joined(pieces) == "hello"
    assert ids_of(pieces) == [*b"hel", 257]


def test_any_text_with_any_stop_comes_out_as_its_beginning_and_its_tokens_spell_it():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab😀ö") for _ in range(12))
        stops = ["".join(rng.choice("ab😀ö") for _ in range(rng.randint(1, 3)))]
        pieces = play(text.encode(), stops)
        wanted = text.partition(stops[0])[0]
        assert joined(pieces) == wanted
        assert bytes(ids_of(pieces)).decode() == wanted
        assert pieces[-1].finish_reason == ("length" if wanted == text else "stop")


@pytest.mark.parametrize(
    ("data", "text"), [(b"abc", "abc"), ("ö".encode(), "ö"), (b"\xf0\x9f", r"bytes:\xf0\x9f")]
)
def test_token_text_keeps_bytes_that_are_no_text(data, text):
    assert token_text(data) == text


def test_json_has_no_infinity():
    assert clamp_logprob(-math.inf) == -9999.0 and clamp_logprob(-1.5) == -1.5
