"""Several split patterns with arrays: the pieces are those of the regex engine."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bpe import fast_splits
from bpe.fast_encoder import FastEncoder
from bpe.formats.gguf_patterns import PRE_TOKENIZERS
from bpe.pretokenize import GPT2, O200K, compile_pattern, split

SEQUENCES = {
    name: PRE_TOKENIZERS[name].patterns
    for name in ("deepseek-llm", "deepseek-coder", "falcon", "default")
}
SEQUENCES |= {
    "runs": (r"\s", r"\p{N}{1,3}", r"\s?[^\r\n\p{L}]+", r"\s+$", r"[a-c][a-c]"),
    "o200k": (r"\p{N}{1,2}", O200K),
}
ALL = pytest.mark.parametrize("patterns", SEQUENCES.values(), ids=SEQUENCES)
CHARACTERS = "  \n\r\t\u00a0\u3000'sabc1234567²!.。`|$/Aé中の한אʰ\u0301🙂\u2028\u201c"
TEXT = st.text(st.sampled_from(CHARACTERS) | st.characters(exclude_categories=["Cs"]))


def check(patterns: tuple[str, ...], texts: list[str]) -> None:
    compiled = [compile_pattern(pattern) for pattern in patterns]
    data, offsets, separators = fast_splits.pretokenize_sequence(patterns, texts)
    pieces = [data[a:b].decode() for a, b in itertools.pairwise(offsets.tolist())]
    for text, (a, b) in zip(texts, itertools.pairwise(separators.tolist()), strict=True):
        assert pieces[a + 1 : b] == (split(compiled, text) if text else []), text


@ALL
def test_random_texts_match_regex(patterns):
    assert FastEncoder.supports(patterns)
    rng = random.Random(0)
    check(patterns, ["".join(rng.choices(CHARACTERS, k=rng.randrange(12))) for _ in range(3000)])


@ALL
@given(st.lists(TEXT, min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_hypothesis_texts_match_regex(patterns, texts):
    check(patterns, texts)


@ALL
def test_text_cut_at_safe_position_has_same_pieces(patterns):
    compiled = [compile_pattern(pattern) for pattern in patterns]
    cut = fast_splits.find_cut_pattern(patterns[0])
    assert cut is not None
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choices(CHARACTERS, k=30))
        if (match := cut.search(text, 1)) is not None:
            left, right = text[: match.end()], text[match.end() :]
            assert split(compiled, left) + split(compiled, right) == split(compiled, text)


@pytest.mark.parametrize(
    "patterns",
    [
        (r"\s?\p{L}+", r"\p{N}"),  # no position to cut a text at
        (r"\p{N}", r"\s?\p{L}"),  # one letter, with whitespace before it
        (r"\p{N}", r"[a-z]+|[0-9]+"),
        (r"\p{N}", r"[[:alpha:]]+"),
        (r"[0-9][0-9]", GPT2),
    ],
)
def test_other_patterns_are_left_to_regex(patterns):
    assert not FastEncoder.supports(patterns)
