"""The fast pretokenizer: its pieces are those that the regex engine finds."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bpe import fast_pretokenizer
from bpe.pretokenize import O200K, PATTERNS, compile_pattern, split

ALL_PATTERNS = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
# The characters that the patterns distinguish: blanks, newlines, the letters of contractions, a
# long s, digits, letters of both cases and caseless ones, a mark, symbols, a slash. Some have two
# to four bytes.
CHARACTERS = " \n\t'sSl1aA!/中\u0301"
MORE = CHARACTERS + "\r\u00a0tTLvVeErRdDmM\u017f²éÉǅʰ्क🙂\u200d\ufe0f。\x00"
TEXT = st.text(st.sampled_from(MORE) | st.characters(exclude_categories=["Cs"]))


def check(pattern: str, texts: list[str]) -> None:
    """Compare all texts at once, which is fast; on a difference, compare one by one to find it."""
    compiled = compile_pattern(pattern)
    expected = [split([compiled], text) for text in texts]
    data, offsets, separators = fast_pretokenizer.pretokenize_batch(pattern, texts)
    lengths = [n for pieces in expected for n in (1, *(len(p.encode()) for p in pieces))]
    if offsets.tolist() == list(itertools.accumulate(lengths, initial=0)):
        assert [data[i] for i in offsets[separators]] == [ord("\n")] * (len(texts) + 1)
        assert len(data) == offsets[-1] + 1
        return
    for text, pieces in zip(texts, expected, strict=True):
        data, offsets, _ = fast_pretokenizer.pretokenize_batch(pattern, [text])
        ours = [data[a:b].decode() for a, b in itertools.pairwise(offsets[1:])]
        assert ours == pieces, text
    raise AssertionError("the texts differ as a batch, but not one by one")


@ALL_PATTERNS
def test_all_short_texts_match_regex(pattern):
    for alphabet in (CHARACTERS, CHARACTERS.replace("/", ""), CHARACTERS.replace("\u0301", "")):
        for length in range(4):
            texts = ["".join(text) for text in itertools.product(alphabet, repeat=length)]
            check(pattern, texts)


@ALL_PATTERNS
@pytest.mark.heavy
def test_random_longer_texts_match_regex(pattern):
    rng = random.Random(0)
    for alphabet in (
        MORE,
        CHARACTERS.replace("/", ""),
        CHARACTERS.replace("\u0301", "") + "lLvVeE",
    ):
        for length in (4, 5, 7, 12, 30):
            check(pattern, ["".join(rng.choices(alphabet, k=length)) for _ in range(4000)])


def test_marks_and_slashes_together_match_regex():
    """Marks and slashes interact from left to right, so these texts need the regex engine."""
    rng = random.Random(0)
    for _ in range(3000):
        check(O200K, ["".join(rng.choices("!/\n\u0301a ", k=rng.randint(3, 9)))])


@ALL_PATTERNS
@settings(max_examples=200)
@given(texts=st.lists(TEXT, min_size=1, max_size=4))
def test_arbitrary_texts_match_regex(pattern, texts):
    check(pattern, texts)


@ALL_PATTERNS
@pytest.mark.parametrize(
    "unit", ["a", "A", "1", " ", "\n", "!", "'s", "aB", "中A", "!\u0301", "!\n/", " \n", "é", "/\n"]
)
def test_long_repetitive_texts_match_regex(pattern, unit):
    check(pattern, [unit * 20_000, unit * 999 + "x", "x" + unit * 1000 + " "])


@pytest.mark.slow
@ALL_PATTERNS
def test_every_character_matches_regex(pattern):
    for block in range(0, 0x110000, 1 << 14):
        characters = [chr(c) for c in range(block, block + (1 << 14)) if not 0xD800 <= c < 0xE000]
        check(pattern, [f"a{c}B{c}{c} {c}1{c}\n{c}!{c}'{c}s'{c}" for c in characters])
