"""The split patterns: examples, no loss of text, and agreement with tokenizers."""

import itertools
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpe.pretokenize import GPT2, LLAMA3, PATTERNS, QWEN2, SMOLLM, compile_pattern, split
from tests.naming import naming

TEXT = st.text(st.characters() | st.sampled_from(" \n\r\t'12sStTlLvVdD.é中"))


def pieces(pattern: str, text: str) -> list[str]:
    return split([compile_pattern(pattern)], text)


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (GPT2, "I'm 12345 dogs,  ok?", ["I", "'m", " 12345", " dogs", ",", " ", " ok", "?"]),
        (GPT2, "I'M a\n\n\tb", ["I", "'", "M", " a", "\n\n", "\t", "b"]),
        (SMOLLM, "I'm 123 dogs", ["I", "'m", " ", "1", "2", "3", " dogs"]),
        (SMOLLM, "a  1", ["a", "  ", "1"]),
        (LLAMA3, "I'M 12345(word);\n\n x", ["I", "'M", " ", "123", "45", "(word", ");\n\n", " x"]),
        (QWEN2, "I'm 12 dogs \n\n  x", ["I", "'m", " ", "1", "2", " dogs", " \n\n", " ", " x"]),
    ],
)
def test_split_gives_expected_pieces(pattern, text, expected):
    assert pieces(pattern, text) == expected


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@given(text=TEXT)
def test_pieces_join_to_the_text(pattern, text):
    assert "".join(pieces(pattern, text)) == text
    # The built-in patterns match every character, so `split` uses its fast path.
    assert sum(map(len, compile_pattern(pattern).findall(text))) == len(text)


@given(TEXT)
def test_smollm_pattern_equals_split_at_digits_then_gpt2(text):
    two_passes = split([compile_pattern(r"\p{N}"), compile_pattern(GPT2)], text)
    assert pieces(SMOLLM, text) == two_passes


def test_no_text_is_lost_by_unmatched_text_or_empty_matches_or_groups():
    assert pieces("b", "abcb") == ["a", "b", "c", "b"]
    assert pieces("x*", "axxb") == ["a", "xx", "b"]
    assert pieces("(a)(b)?", "abac") == ["ab", "a", "c"]
    assert pieces("b", "") == []


@pytest.mark.parametrize(
    ("pattern", "pieces_of_joined"),
    [
        (r"\w+", ["a", "\u200d", "b", "!"]),
        (r"[^\w\s]+", ["a", "\u200d", "b", "!"]),
        (r"[\[\w]+", ["a", "\u200d", "b", "!"]),
        (r"\\w", ["a\u200db!"]),
    ],
)
def test_joiners_are_no_word_characters(pattern, pieces_of_joined):
    """As in Oniguruma, which `tokenizers` uses; in the `regex` module they are."""
    assert pieces(pattern, "a\u200db!") == pieces_of_joined


def test_error_names_invalid_pattern():
    with pytest.raises(ValueError, match=r"\(unclosed"):
        compile_pattern("(unclosed")


def test_exponential_pattern_times_out(monkeypatch):
    monkeypatch.setattr("bpe.pretokenize.TIMEOUT_BASE_SECONDS", 0.5)
    with pytest.raises(ValueError, match=naming("0.5 s", r"(?:a|a|aa)+\\d$")):
        pieces(r"(?:a|a|aa)+\d$", "a" * 60)


@pytest.mark.parity
@pytest.mark.parametrize("name", PATTERNS)
def test_every_character_matches_tokenizers(name):
    """Character classes and case folding are the same in `regex` and in Oniguruma.

    Unassigned characters are skipped, because they depend on the version of Unicode.
    """
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers
    gpt2 = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt2":
        theirs = pre.Sequence([gpt2])
    elif name == "smollm":
        theirs = pre.Sequence([pre.Digits(individual_digits=True), gpt2])
    else:
        theirs = pre.Split(tokenizers.Regex(PATTERNS[name]), behavior="isolated")
    ours = compile_pattern(PATTERNS[name])
    for c in map(chr, itertools.chain(range(0xD800), range(0xE000, 0x110000))):
        if unicodedata.category(c) in ("Cn", "Co"):
            continue
        text = f"a{c}b 1{c}2 {c}{c} .{c}'{c} \n{c}"
        expected = [text[start:end] for _, (start, end) in theirs.pre_tokenize_str(text)]
        if name in ("gpt2", "smollm"):  # the offsets of ByteLevel are in characters
            assert split([ours], text) == expected, repr(c)
        else:
            assert split([ours], text) == [p for p, _ in theirs.pre_tokenize_str(text)], repr(c)
