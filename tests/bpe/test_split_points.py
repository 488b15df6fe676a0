"""Seams: pieces cut where no token reaches across have the ids that they have uncut."""

import itertools
import random

import numpy as np
import pytest

import bpe
from bpe.fast_encoder import FastEncoder
from bpe.hash_table import sliding_uint64
from bpe.split_points import SplitPoints, adjacent_characters
from tests.bpe import tiny
from tests.bpe.conftest import MODELS

BYTES = {bytes([b]): b for b in range(256)}
ALL = r"[\s\S]+"


def segments(encoding: bpe.Encoding, text: str) -> list[str]:
    """The pieces into which one piece is cut."""
    data = f"\n{text}\n".encode()
    begin, ends = np.array([0, 1, len(data) - 1]), np.array([0, 2])
    seams = SplitPoints(encoding)
    begin, ends = seams.split_batch(data, sliding_uint64(data), begin, ends)
    assert begin[ends].tolist() == [0, len(data) - 1]
    found = [data[a:b].decode() for a, b in itertools.pairwise(begin[1:].tolist())]
    assert seams.split(text) == found
    return found


def encoding(*tokens: bytes, **options) -> bpe.Encoding:
    ranks = BYTES | {token: 256 + i for i, token in enumerate(tokens)}
    return bpe.Encoding("seams", pattern=ALL, ranks=ranks, special_tokens={}, **options)


def parts(text: str) -> list[bytes]:
    """The tokens that lead from the bytes of a text to a token for all of them."""
    data = text.encode()
    return [data[:n] for n in range(2, len(data) + 1)]


def test_a_place_is_a_seam_if_no_token_reaches_across():
    assert segments(encoding(*parts("中文")), "人中文人") == ["人", "中文", "人"]
    assert segments(encoding(), "中文🙂🙂") == ["中", "文", "🙂", "🙂"]
    assert segments(encoding(*parts("中文人")), "文人中文人中") == ["文人", "中文人", "中"]


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr("bpe.split_points._MAX_CACHED_PAIRS", 5)
    seams = SplitPoints(encoding(*parts("中文")))
    text = "".join(map(chr, range(0x4E00, 0x4E40))) + "中文"
    assert seams.split(text) == [*text[:-2], "中文"]
    assert len(seams._cache) <= 5


def test_other_characters_are_left_alone():
    """Also next to those that are not: " 中" and "中。a" are in one piece as before."""
    assert segments(encoding(), "hello мир नमस्ते") == ["hello мир नमस्ते"]
    assert segments(encoding(), " 中") == [" 中"]


def test_a_token_may_hold_a_part_of_a_character():
    half = encoding("中".encode()[2:] + "文".encode()[:1])  # the end of one, the start of the next
    assert segments(half, "中文") == ["中文"]
    assert segments(half, "文人") == ["文", "人"]
    assert list(adjacent_characters(["中".encode()[2:] + "文".encode()])) == [(b"\xad\xe6", False)]
    assert list(adjacent_characters(["é中文".encode()])) == [
        ("é中".encode(), True),
        ("中文".encode(), True),
    ]
    assert list(adjacent_characters([b"a\xe4", "中".encode(), b"abc"])) == []


def test_where_the_sides_would_have_other_ids_nothing_is_cut():
    """A token that no merges make is found as a whole piece, which a side must not become."""
    assert segments(encoding("中".encode()), "中文") == ["中文"]
    merged = encoding("中".encode(), merges=[])
    assert segments(merged, "中文") == ["中", "文"], "here, tokens are made by merges only"
    ranks = {token: id for token, id in BYTES.items() if token != b"\xad"}
    dropping = bpe.Encoding(
        "d", pattern=ALL, ranks=ranks, special_tokens={}, merges=[], dropped_bytes=b"\xad"
    )
    assert segments(dropping, "中文") == ["中文"]


HAN = "中文人大国的。，🙂🇫々"


def random_vocabulary(seed: int) -> bpe.Encoding:
    """Merges of bytes of Han characters, across their borders and within."""
    rng = random.Random(seed)
    text = "".join(rng.choices(HAN, k=40)).encode()
    known, merges = [bytes([b]) for b in set(text)], []
    for _ in range(rng.randint(5, 60)):
        at = rng.randrange(len(text))
        left = max((t for t in known if text.startswith(t, at)), key=len)
        right = max((t for t in known if text.startswith(t, at + len(left))), key=len, default=b"")
        if right and left + right not in known:
            known.append(left + right)
            merges.append((left, right))
    ranks = BYTES | {left + right: 256 + i for i, (left, right) in enumerate(merges)}
    kind = rng.choice([{}, {"merges": merges}, {"merges": merges, "ignore_merges": True}])
    return bpe.Encoding(
        "random", pattern=rng.choice(PATTERNS), ranks=ranks, special_tokens={}, **kind
    )


PATTERNS = [bpe.pretokenize.GPT2, bpe.pretokenize.CL100K, bpe.pretokenize.O200K]


def test_random_vocabularies():
    cut = 0
    for seed in range(80):
        encoding, rng = random_vocabulary(seed), random.Random(seed)
        texts = ["".join(rng.choices(HAN + "a \n1\u0301", k=rng.randint(1, 30))) for _ in range(20)]
        ids, counts = FastEncoder(encoding).encode(texts)
        found = np.split(ids, np.cumsum(counts)[:-1])
        for text, ours in zip(texts, found, strict=True):
            assert ours.tolist() == tiny.encode_reference(encoding, text), (seed, text)
            assert encoding.encode_ordinary(text * 3) == tiny.encode_reference(encoding, text * 3)
        cut += len(segments(encoding, HAN)) > 1
    assert cut > 20, "else nothing was tested"


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_every_two_characters_that_a_token_holds(name):
    """Neighbours from tokens, in and out of their order: with seams and without, the same ids."""
    encoding, rng = bpe.get_encoding(name), random.Random(0)
    held = [t.decode("utf-8", "ignore") for t in encoding.ranks if len(t) > 3 and max(t) >= 0xE3]
    texts = ["".join(rng.choices(held, k=8)) for _ in range(600)]
    ids, counts = FastEncoder(encoding).encode(texts)
    for text, ours in zip(texts, np.split(ids, np.cumsum(counts)[:-1]), strict=True):
        assert ours.tolist() == tiny.encode_reference(encoding, text), text
    assert len(segments(encoding, "".join(held[:500]))) > 40


@pytest.mark.parametrize("model", MODELS)
def test_models(model, load_model):
    encoding, rng = load_model(model).encoding, random.Random(1)
    texts = ["".join(chr(rng.randrange(0x3000, 0x9FFF)) for _ in range(20)) for _ in range(300)]
    ids, counts = FastEncoder(encoding).encode([encoding._normalize(text) for text in texts])
    for text, ours in zip(texts, np.split(ids, np.cumsum(counts)[:-1]), strict=True):
        assert ours.tolist() == tiny.encode_reference(encoding, text), text
