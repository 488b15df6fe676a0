"""Streaming: however the input is cut, the output in total is the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpe import StopMatcher, StreamDecoder
from tests.bpe import tiny

ENCODING = tiny.encoding()


def decode(ids) -> list[str]:
    decoder = StreamDecoder(ENCODING)
    return [*map(decoder.push, ids), decoder.flush()]


def test_a_character_comes_whole_with_its_last_token():
    ids = ENCODING.encode("a😀é!")
    assert ENCODING.decode_tokens_bytes(ids)[1:3] == [b"\xf0\x9f\x98", b"\x80"]
    assert decode(ids) == ["a", "", "😀", "", "é", "!", ""]


def test_half_a_character_at_the_end_is_replaced_at_flush():
    assert decode(ENCODING.encode("a😀")[:2]) == ["a", "", "\ufffd"]


def test_special_tokens_decode_to_their_spelling():
    assert decode([2]) == ["<|im_end|>", ""]


def test_a_decoder_can_go_on_after_flush():
    decoder = StreamDecoder(ENCODING)
    decoder.push(tiny.IDS[b"\xf0"])
    assert decoder.flush() == "\ufffd"
    assert decoder.push(tiny.IDS[b"a"]) == "a"


@given(st.text() | st.text("é😀中a"))
def test_text_is_never_replaced(text):
    parts = decode(ENCODING.encode_ordinary(text))
    assert "".join(parts) == text
    assert parts[-1] == ""


@given(st.lists(st.integers(0, ENCODING.max_token_value)))
def test_any_ids_decode_as_they_do_at_once(ids):
    assert "".join(decode(ids)) == ENCODING.decode(ids)


def test_an_unknown_id_is_a_key_error():
    with pytest.raises(KeyError):
        StreamDecoder(ENCODING).push(10**6)


def feed(stops, parts) -> tuple[str, bool, list[str]]:
    """The text emitted in total, whether a stop was found, and what each push emitted."""
    matcher = StopMatcher(stops)
    emitted, stopped = [], False
    for part in parts:
        text, stopped = matcher.push(part)
        emitted.append(text)
    return "".join(emitted) + matcher.flush(), stopped, emitted


@pytest.mark.parametrize(
    ("stops", "parts", "text", "stopped"),
    [
        ([], ["ab", "c"], "abc", False),
        (["x"], ["abc"], "abc", False),
        (["b"], ["abc"], "a", True),
        (["END"], ["oneE", "N", "D two"], "one", True),
        (["END"], ["oneE", "N", "otE", "N"], "oneENotEN", False),
        # A stop that begins inside what is held back for itself, or for another.
        (["aab"], ["aa", "ab"], "a", True),
        (["abcd", "bce"], ["abc", "e"], "a", True),
        (["\n\n", "\n#"], ["x\n", "#y"], "x", True),
        # Completed first wins, though the other began earlier.
        (["abcd", "c"], ["abcd"], "ab", True),
        # Completed at once: the one that began earlier wins.
        (["bc", "abc"], ["xabcy"], "x", True),
        (["abc", "bc"], ["xa", "b", "cy"], "x", True),
        (["🗼🗼"], ["🗼", "a🗼", "🗼"], "🗼a", True),
    ],
)
def test_stops(stops, parts, text, stopped):
    assert feed(stops, parts)[:2] == (text, stopped)


def test_only_what_may_become_a_stop_is_held_back():
    assert feed(["END"], ["one E", "N", "x", " EN"])[2] == ["one ", "", "ENx", " "]
    assert feed(["ab"], ["aaaa"])[2] == ["aaa"]


def test_after_a_stop_there_is_nothing():
    matcher = StopMatcher(["b"])
    assert matcher.push("abc") == ("a", True)
    assert matcher.push("more b") == ("", True)
    assert matcher.flush() == ""


@pytest.mark.parametrize("stops", [[""], ["a", ""], "abc"])
def test_stops_that_make_no_sense_are_refused(stops):
    with pytest.raises(ValueError):
        StopMatcher(stops)


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    text=st.text("abc", max_size=40),
    cuts=st.sets(st.integers(0, 40)),
)
def test_every_split_gives_what_reading_by_character_gives(stops, text, cuts):
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stops)]
    if ends:
        longest = max(len(s) for s in stops if text[: ends[0]].endswith(s))
        expected = text[: ends[0] - longest], True
    else:
        expected = text, False
    places = [0, *sorted(cuts & set(range(len(text)))), len(text)]
    parts = [text[a:b] for a, b in zip(places, places[1:], strict=False)]
    assert feed(stops, parts)[:2] == expected
    # Nothing is held that could not become a stop.
    matcher = StopMatcher(stops)
    seen = out = ""
    for part in parts:
        emitted, stopped = matcher.push(part)
        seen, out = seen + part, out + emitted
        if not stopped:
            held = seen[len(out) :]
            assert held == "" or any(s.startswith(held) and s != held for s in stops)
