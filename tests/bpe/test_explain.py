"""`bpe.explain`: the merge steps are those of the encoder, and the diagrams show them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
from bpe.explain import explain, measure, merge_diagram, merge_steps, render_token
from bpe.pretokenize import GPT2, compile_pattern, split
from bpe.trainer import train
from tests.bpe import tiny
from tests.naming import names

ENCODING = tiny.encoding()
# A vocabulary without a list of merges: the ids are the ranks.
RANKS = train(["low lower lowest slow slower é é 🙂 🙂"] * 2, vocab_size=300)


def test_merge_steps_list_pairs_and_ranks():
    first, second, third = merge_steps(ENCODING, b"lower")
    assert (first.left, first.right, first.rank, first.index) == (b"o", b"w", 0, 1)
    assert first.parts == (b"l", b"ow", b"e", b"r")
    assert first.other_ranks == (2, 5), "e + r, and l + o, which is not possible later"
    assert (second.left, second.right, second.rank, second.other_ranks) == (b"l", b"ow", 1, (2,))
    assert third.parts == (b"low", b"er") and third.other_ranks == ()
    assert merge_steps(ENCODING, b"x") == merge_steps(ENCODING, b"") == []


@settings(max_examples=200)
@given(st.text(st.sampled_from("lower sé🙂a\n1"), min_size=1, max_size=20))
@pytest.mark.parametrize("encoding", [ENCODING, RANKS], ids=["pairs", "ranks"])
def test_last_merge_step_matches_encoding(encoding, text):
    for piece in split([compile_pattern(GPT2)], text):
        steps = merge_steps(encoding, piece.encode())
        parts = list(steps[-1].parts) if steps else [bytes([b]) for b in piece.encode()]
        assert parts == encoding.decode_tokens_bytes(encoding.encode_ordinary(piece))
        assert [step.rank for step in steps] == [
            min([step.rank, *step.other_ranks]) for step in steps
        ], "the rank is always the lowest"


def test_merge_diagram_draws_merges_line_by_line():
    assert merge_diagram(ENCODING, "lower").split("\n") == [
        "l   o   w   e   r",
        "l   o───w   e   r     ow = o + w    rank 0, before 2, 5",
        "l───o───w   e   r     low = l + ow  rank 1, before 2",
        "l───o───w   e───r     er = e + r    rank 2",
        f"low {tiny.IDS[b'low']}     er {tiny.IDS[b'er']}",
    ]
    assert merge_diagram(ENCODING, " 😀").split("\n") == [
        "·   F0  9F  98  80",
        "·   F0──9F  98  80     F09F = F0 + 9F      rank 6",
        "·   F0──9F──98  80     F09F98 = F09F + 98  rank 7",
        "· 35   F09F98 266   80 131",
    ]
    assert merge_diagram(ENCODING, "x") == f"x\nx {tiny.IDS[b'x']}"


def test_merge_diagram_notes_token_that_no_merges_make():
    ids = {bytes([b]): b for b in range(256)} | {b"lo": 256, b"ow": 257, b"low": 258}
    merges = [(b"l", b"o"), (b"o", b"w"), (b"l", b"ow")]
    encoding = bpe.Encoding(
        "i", pattern=".+", ranks=ids, special_tokens={}, merges=merges, ignore_merges=True
    )
    first, note = merge_diagram(encoding, "low").split("\n")
    assert first == "l   o   w" and names(note, "low", 258)
    assert "lo = l + o" in merge_diagram(encoding, "lows")


def test_merge_diagram_of_long_piece_lists_tokens_only():
    text = merge_diagram(ENCODING, "a" * 100)
    assert names(text, 100) and "aaaa" in text and "─" not in text
    assert text.count("\n") == 1


def test_explain_with_repeated_pieces_draws_each_once():
    text = explain(ENCODING, "low lower low lower")
    assert names(text.splitlines()[0], "'low lower low lower'", "4 pieces", "4 tokens")
    assert text.count("·low = ") == 2, "in ' lower' and ' low'"
    assert names(explain(ENCODING, "x").splitlines()[0], "'x'", "1 piece", "1 token")
    (line,) = explain(ENCODING, "").splitlines()
    assert names(line, "''", "0 pieces", "0 tokens")


def test_explain_applies_normalization():
    encoding = tiny.encoding(normalization="NFC")
    assert "C3  A9" in explain(encoding, "e\u0301")


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (b" a b", "·a·b"), (b"\n\t", "\\n\\t"), ("é".encode(), "é"), (b"\xc3", "C3"),
        (b"a\xc3", "61C3"), (b" \x1b", "·\\x1b"), (b"\\", "\\"),
    ],
)  # fmt: skip
def test_render_token_escapes_unprintable_bytes(token, text):
    assert render_token(token) == text


def test_measure_counts_tokens_characters_words_bytes():
    measures = measure(ENCODING, "low lower 😀<|im_end|>")
    assert (measures.tokens, measures.characters, measures.words, measures.bytes) == (6, 21, 3, 24)
    assert measures.per_token(measures.characters) == 3.5
    empty = measure(ENCODING, "")
    assert empty.tokens == 0 and empty.per_token(empty.words) == 0.0
    assert measure(ENCODING, "\ud800").bytes == 3
