"""Training: examples, fast and simple implementation compared, and tokenizers compared."""

import json
import sysconfig
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
from bpe import train_fast
from bpe.formats import bytes_to_unicode
from bpe.pretokenize import GPT2, PATTERNS
from bpe.save import recover_merges
from bpe.special_tokens import fix_surrogates
from bpe.train import BYTE_ORDER, build_vocab, count_pieces, learn_merges, merge_pair, read_files
from bpe.trainer import train
from tests.naming import naming

ID = {bytes([byte]): id for id, byte in enumerate(BYTE_ORDER)}


def in_bytes(merges) -> list[tuple[bytes, bytes]]:
    tokens = list(build_vocab(merges))
    return [(tokens[left], tokens[right]) for left, right in merges]


@pytest.mark.parametrize("learn", [learn_merges, train_fast.learn_merges])
def test_learn_merges_gives_expected_merges(learn):
    # The example of Wikipedia's article on byte-pair encoding. In "aaabdaaabac", aa occurs four
    # times. Then ab and aa + a occur twice each, and the id of "a" is lower than that of "aa".
    assert in_bytes(learn({b"aaabdaaabac": 1}, 3)) == [
        (b"a", b"a"), (b"a", b"b"), (b"aa", b"ab"),
    ]  # fmt: skip
    # The pieces are weighted by their counts.
    assert in_bytes(learn({b"xy": 1, b"xyz": 1, b"ab": 3}, 1)) == [(b"a", b"b")]
    assert in_bytes(learn({b"ab": 1, b"cd": 2}, 9, 2)) == [(b"c", b"d")]
    assert learn({b"ab": 1}, 9, 2) == [] == learn({}, 9) == learn({b"ab": 5}, 0)
    assert learn({b"a": 7, b"b": 8}, 9) == []


@pytest.mark.parametrize("learn", [learn_merges, train_fast.learn_merges])
def test_ties_between_pairs_go_to_smallest_ids(learn):
    assert in_bytes(learn({b"zy": 2, b"ab": 2, b"b!": 2, b"a\n": 2, b"aa": 2}, 9)) == [
        (b"a", b"a"), (b"a", b"b"), (b"a", b"\n"), (b"b", b"!"), (b"z", b"y"),
    ]  # fmt: skip
    assert ID[b"!"] == 0 and ID[b"~"] < ID[b"\xff"] < ID[b"\x00"] < ID[b"\n"]


def test_merge_pair_with_overlaps_goes_from_left():
    assert merge_pair([1, 1, 1], (1, 1), 9) == [9, 1]
    assert merge_pair([1, 1, 1, 1], (1, 1), 9) == [9, 9]
    assert merge_pair([1, 2, 1, 2, 1], (1, 2), 9) == [9, 9, 1]


few_letters = st.lists(st.sampled_from([b"a", b"b", b"c"]), min_size=1, max_size=30).map(b"".join)


@settings(max_examples=300)
@given(st.dictionaries(few_letters, st.integers(1, 5), max_size=8), st.integers(1, 3))
@pytest.mark.heavy
def test_fast_learn_merges_matches_simple(counts, min_frequency):
    assert train_fast.learn_merges(counts, 60, min_frequency) == learn_merges(
        counts, 60, min_frequency
    )


@settings(max_examples=200)
@given(st.dictionaries(few_letters, st.integers(1, 5), min_size=1, max_size=8))
def test_learned_merges_can_be_recovered_from_ranks(counts):
    """The ranks of a trained vocabulary determine its merges (docstring of `bpe.train`)."""
    merges = learn_merges(counts, 60, 1)
    ranks = build_vocab(merges)
    assert len(ranks) == 256 + len(merges)
    assert recover_merges(ranks) == in_bytes(merges)
    by_rank = bpe.Encoding("r", pattern="(?s:.+)", ranks=ranks, special_tokens={})
    by_pair = bpe.Encoding(
        "p", pattern="(?s:.+)", ranks=ranks, special_tokens={}, merges=in_bytes(merges)
    )
    for piece in counts:
        word = [ID[bytes([byte])] for byte in piece]
        for i, pair in enumerate(merges):
            word = merge_pair(word, pair, 256 + i)
        text = piece.decode()
        assert by_rank.encode(text) == by_pair.encode(text) == word, "encoding equals training"


texts = st.lists(
    st.one_of(
        st.text(max_size=40),
        st.text(st.sampled_from("aé世 \n\r\t'sl1\x00!ſ\ud800\U0001f600"), max_size=40),
        st.sampled_from(["<|end|>", "a<|end|>b", "seven77", "eightt88", "internationalization"]),
    ),
    max_size=8,
)


@pytest.mark.parametrize("name", [*PATTERNS, "other"])
@settings(max_examples=100)
@given(texts=texts)
def test_fast_count_pieces_matches_simple(name, texts):
    pattern = PATTERNS.get(name, r"\S+|\s+")
    for special in ((), ("<|end|>",)):
        counts = count_pieces(texts, pattern, special)
        assert train_fast.count_pieces(texts, pattern, special) == counts
        if not special:  # the counts include the whole text
            size = sum(len(piece) * count for piece, count in counts.items())
            assert size == sum(len(fix_surrogates(text).encode()) for text in texts)


def test_count_pieces_in_batches_matches_whole(monkeypatch):
    texts = ["low lower lowest", " low\n\n", "slow", ""] * 5
    whole = count_pieces(texts)
    calls = []
    monkeypatch.setattr(train_fast, "_BATCH_CHARS", 20)
    progress = lambda *arguments: calls.append(arguments)  # noqa: E731
    assert train_fast.count_pieces(texts, [GPT2], (), progress) == whole
    assert len(calls) > 3 and all(stage == "counting pieces" for stage, _, _ in calls)
    assert calls == sorted(calls) and calls[-1][1] <= sum(map(len, texts))


def test_pieces_do_not_span_texts_or_special_tokens():
    assert count_pieces(["ab", "cd"]) == {b"ab": 1, b"cd": 1}
    assert count_pieces(["ab<|end|>ab"], GPT2, ["<|end|>"]) == {b"ab": 2}
    encoding = train(
        ["ab<|end|>ab<|end|>"] * 3, vocab_size=300, special_tokens=["<|end|>"], min_frequency=1
    )
    assert not [token for token in encoding.ranks if b"|" in token and len(token) > 1]
    ids = encoding.encode("ab<|end|>", allowed_special="all")
    assert ids == [encoding.ranks[b"ab"], encoding.n_vocab - 1]


def test_train_returns_working_encoding():
    encoding = train(["low lower lowest slow slower"] * 2, vocab_size=256 + 5 + 2,
                     special_tokens=["<|endoftext|>", "<|user|>"], name="tiny")  # fmt: skip
    assert encoding.n_vocab == 263 and encoding.name == "tiny"
    assert encoding.special_tokens == {"<|endoftext|>": 261, "<|user|>": 262}
    assert encoding.decode_tokens_bytes(encoding.encode("low")) == [b"low"]
    assert encoding.decode(encoding.encode("größer 🙂 low")) == "größer 🙂 low"


def test_short_text_makes_smaller_vocabulary():
    assert train(["abab"], vocab_size=50_000).n_vocab == 256 + 1 + 1


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"vocab_size": 256}, ["vocab_size=256", 1]),
        ({"vocab_size": 300, "min_frequency": 0}, ["min_frequency", 0, 1]),
        ({"vocab_size": 300, "special_tokens": ["<a>", "<a>"]}, ["special_tokens", ["<a>", "<a>"]]),
        ({"vocab_size": 300, "special_tokens": [""]}, ["special_tokens", [""]]),
        ({"vocab_size": 300, "pattern": "("}, ["pattern", "'('"]),
    ],
)
def test_train_with_invalid_options_is_rejected(options, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        train(["text"], **options)


def test_progress_is_called_every_256_merges():
    calls = []
    text = " ".join(f"{i:x}" for i in range(100_000))
    train([text], vocab_size=800, progress=lambda *arguments: calls.append(arguments))
    assert [call for call in calls if call[0] == "learning merges"] == [
        ("learning merges", 256, 543), ("learning merges", 512, 543),
    ]  # fmt: skip


def test_read_files_with_invalid_utf8_names_the_line(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_bytes("größe\r\n".encode())
    two.write_bytes(b"fine\nfine\nbad \xff\n")
    assert list(read_files([one])) == ["größe\r\n"]
    with pytest.raises(ValueError, match=naming(two, "line 3", "UTF-8", "0xff")):
        list(read_files([one, two]))


def test_merges_match_golden_file(golden):
    characters = bytes_to_unicode()
    recorded = golden("train")
    for min_frequency, expected in recorded["merges"].items():
        counts = count_pieces(recorded["texts"])
        merges = train_fast.learn_merges(counts, 900 - 256, int(min_frequency))
        spelled = [
            " ".join("".join(characters[byte] for byte in token) for token in pair)
            for pair in in_bytes(merges)
        ]
        assert spelled == expected


# Live


@pytest.mark.parity
@pytest.mark.timeout(300)
def test_merges_match_tokenizers():
    """Learn four thousand merges from the source files of the standard library."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text("utf-8", "replace") for path in sorted(folder.glob("*.py"))]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=4256,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    characters = bytes_to_unicode()
    ours = train(texts, vocab_size=4256, special_tokens=())
    spelled = [
        ["".join(characters[byte] for byte in token) for token in pair]
        for pair in recover_merges(ours.ranks)
    ]
    assert spelled == json.loads(theirs.to_str())["model"]["merges"]
    assert all(a < b for a, b in pairwise(ours.ranks.values()))
