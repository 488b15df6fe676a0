"""Incremental decoding: the total output does not depend on how the input is divided."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpe import StopMatcher, StreamDecoder
from tests.bpe import tiny

ENCODING = tiny.encoding()


def decode(ids) -> list[str]:
    decoder = StreamDecoder(ENCODING)
    return [*map(decoder.push, ids), decoder.flush()]


def test_character_across_tokens_is_returned_with_the_last():
    ids = ENCODING.encode("a😀é!")
    assert ENCODING.decode_tokens_bytes(ids)[1:3] == [b"\xf0\x9f\x98", b"\x80"]
    assert decode(ids) == ["a", "", "😀", "", "é", "!", ""]


def test_partial_character_at_flush_is_replaced():
    assert decode(ENCODING.encode("a😀")[:2]) == ["a", "", "\ufffd"]


def test_special_token_decodes_to_its_text():
    assert decode([2]) == ["<|im_end|>", ""]


def test_decoder_after_flush_continues():
    decoder = StreamDecoder(ENCODING)
    decoder.push(tiny.IDS[b"\xf0"])
    assert decoder.flush() == "\ufffd"
    assert decoder.push(tiny.IDS[b"a"]) == "a"


@given(st.text() | st.text("é😀中a"))
def test_decoded_text_has_no_replacement_characters(text):
    parts = decode(ENCODING.encode_ordinary(text))
    assert "".join(parts) == text
    assert parts[-1] == ""


@given(st.lists(st.integers(0, ENCODING.max_token_value)))
def test_arbitrary_ids_decode_like_batch(ids):
    assert "".join(decode(ids)) == ENCODING.decode(ids)


def test_unknown_id_raises_key_error():
    with pytest.raises(KeyError):
        StreamDecoder(ENCODING).push(10**6)


def feed(stops, parts) -> tuple[str, bool, list[str]]:
    """Return the total output, whether a stop string was found, and the output of each push."""
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
        # A stop string that begins inside the buffered text.
        (["aab"], ["aa", "ab"], "a", True),
        (["abcd", "bce"], ["abc", "e"], "a", True),
        (["\n\n", "\n#"], ["x\n", "#y"], "x", True),
        # The first completed stop string counts, although the other begins earlier.
        (["abcd", "c"], ["abcd"], "ab", True),
        # Of two completed by the same character, the one that begins earlier counts.
        (["bc", "abc"], ["xabcy"], "x", True),
        (["abc", "bc"], ["xa", "b", "cy"], "x", True),
        (["🗼🗼"], ["🗼", "a🗼", "🗼"], "🗼a", True),
    ],
)
def test_text_from_stop_string_on_is_removed(stops, parts, text, stopped):
    assert feed(stops, parts)[:2] == (text, stopped)


def test_only_possible_stop_prefix_is_buffered():
    assert feed(["END"], ["one E", "N", "x", " EN"])[2] == ["one ", "", "ENx", " "]
    assert feed(["ab"], ["aaaa"])[2] == ["aaa"]


def test_push_after_stop_returns_nothing():
    matcher = StopMatcher(["b"])
    assert matcher.push("abc") == ("a", True)
    assert matcher.push("more b") == ("", True)
    assert matcher.flush() == ""


@pytest.mark.parametrize("stops", [[""], ["a", ""], "abc"])
def test_empty_stop_string_is_rejected(stops):
    with pytest.raises(ValueError):
        StopMatcher(stops)


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    text=st.text("abc", max_size=40),
    cuts=st.sets(st.integers(0, 40)),
)
def test_stop_result_does_not_depend_on_division_into_parts(stops, text, cuts):
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stops)]
    if ends:
        longest = max(len(s) for s in stops if text[: ends[0]].endswith(s))
        expected = text[: ends[0] - longest], True
    else:
        expected = text, False
    boundaries = [0, *sorted(cuts & set(range(len(text)))), len(text)]
    parts = [text[a:b] for a, b in zip(boundaries, boundaries[1:], strict=False)]
    assert feed(stops, parts)[:2] == expected
    # Only a proper prefix of a stop string is buffered.
    matcher = StopMatcher(stops)
    total_in = total_out = ""
    for part in parts:
        emitted, stopped = matcher.push(part)
        total_in, total_out = total_in + part, total_out + emitted
        if not stopped:
            buffer = total_in[len(total_out) :]
            assert buffer == "" or any(s.startswith(buffer) and s != buffer for s in stops)
