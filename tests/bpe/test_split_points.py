"""Split points: splitting a piece where no token crosses does not change its ids."""

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
    """Return the segments of one piece, from both implementations."""
    data = f"\n{text}\n".encode()
    offsets, separators = np.array([0, 1, len(data) - 1]), np.array([0, 2])
    split_points = SplitPoints(encoding)
    offsets, separators = split_points.split_batch(data, sliding_uint64(data), offsets, separators)
    assert offsets[separators].tolist() == [0, len(data) - 1]
    result = [data[a:b].decode() for a, b in itertools.pairwise(offsets[1:].tolist())]
    assert split_points.split(text) == result
    return result


def encoding(*tokens: bytes, **options) -> bpe.Encoding:
    ranks = BYTES | {token: 256 + i for i, token in enumerate(tokens)}
    return bpe.Encoding("split points", pattern=ALL, ranks=ranks, special_tokens={}, **options)


def parts(text: str) -> list[bytes]:
    """Return the prefixes of a text's bytes: tokens that lead to a token for the text."""
    data = text.encode()
    return [data[:n] for n in range(2, len(data) + 1)]


def test_text_is_split_where_no_token_crosses():
    assert segments(encoding(*parts("中文")), "人中文人") == ["人", "中文", "人"]
    assert segments(encoding(), "中文🙂🙂") == ["中", "文", "🙂", "🙂"]
    assert segments(encoding(*parts("中文人")), "文人中文人中") == ["文人", "中文人", "中"]


def test_cache_size_is_bounded(monkeypatch):
    monkeypatch.setattr("bpe.split_points._MAX_CACHED_PAIRS", 5)
    split_points = SplitPoints(encoding(*parts("中文")))
    text = "".join(map(chr, range(0x4E00, 0x4E40))) + "中文"
    assert split_points.split(text) == [*text[:-2], "中文"]
    assert len(split_points._cache) <= 5


def test_characters_below_u3000_are_not_split():
    """A piece is also not split between such a character and a Chinese one."""
    assert segments(encoding(), "hello мир नमस्ते") == ["hello мир नमस्ते"]
    assert segments(encoding(), " 中") == [" 中"]


def test_token_with_partial_character_prevents_split():
    partial = encoding("中".encode()[2:] + "文".encode()[:1])  # last and first byte
    assert segments(partial, "中文") == ["中文"]
    assert segments(partial, "文人") == ["文", "人"]
    assert list(adjacent_characters(["中".encode()[2:] + "文".encode()])) == [(b"\xad\xe6", False)]
    assert list(adjacent_characters(["é中文".encode()])) == [
        ("é中".encode(), True),
        ("中文".encode(), True),
    ]
    assert list(adjacent_characters([b"a\xe4", "中".encode(), b"abc"])) == []


def test_unsafe_vocabulary_is_not_split():
    """A token that no merges lead to is used for an equal piece, which a segment would become."""
    assert segments(encoding("中".encode()), "中文") == ["中文"]
    merged = encoding("中".encode(), merges=[])
    assert segments(merged, "中文") == ["中", "文"], "this vocabulary uses merges only"
    ranks = {token: id for token, id in BYTES.items() if token != b"\xad"}
    dropping = bpe.Encoding(
        "d", pattern=ALL, ranks=ranks, special_tokens={}, merges=[], dropped_bytes=b"\xad"
    )
    assert segments(dropping, "中文") == ["中文"]


HAN = "中文人大国的。，🙂🇫々"


def random_vocabulary(seed: int) -> bpe.Encoding:
    """Return random merges of bytes of Han characters, within and across characters."""
    rng = random.Random(seed)
    text = "".join(rng.choices(HAN, k=40)).encode()
    tokens, merges = [bytes([b]) for b in set(text)], []
    for _ in range(rng.randint(5, 60)):
        at = rng.randrange(len(text))
        left = max((t for t in tokens if text.startswith(t, at)), key=len)
        right = max((t for t in tokens if text.startswith(t, at + len(left))), key=len, default=b"")
        if right and left + right not in tokens:
            tokens.append(left + right)
            merges.append((left, right))
    ranks = BYTES | {left + right: 256 + i for i, (left, right) in enumerate(merges)}
    kind = rng.choice([{}, {"merges": merges}, {"merges": merges, "ignore_merges": True}])
    return bpe.Encoding(
        "random", pattern=rng.choice(PATTERNS), ranks=ranks, special_tokens={}, **kind
    )


PATTERNS = [bpe.pretokenize.GPT2, bpe.pretokenize.CL100K, bpe.pretokenize.O200K]


def test_random_vocabularies_match_reference():
    num_split = 0
    for seed in range(80):
        encoding, rng = random_vocabulary(seed), random.Random(seed)
        texts = ["".join(rng.choices(HAN + "a \n1\u0301", k=rng.randint(1, 30))) for _ in range(20)]
        ids, counts = FastEncoder(encoding).encode(texts)
        for text, ours in zip(texts, np.split(ids, np.cumsum(counts)[:-1]), strict=True):
            assert ours.tolist() == tiny.encode_reference(encoding, text), (seed, text)
            assert encoding.encode_ordinary(text * 3) == tiny.encode_reference(encoding, text * 3)
        num_split += len(segments(encoding, HAN)) > 1
    assert num_split > 20, "too few vocabularies have split points"


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_adjacent_characters_of_tokens_match_reference(name):
    """Texts of random multi-character tokens have the same ids with and without split points."""
    encoding, rng = bpe.get_encoding(name), random.Random(0)
    tokens = [t.decode("utf-8", "ignore") for t in encoding.ranks if len(t) > 3 and max(t) >= 0xE3]
    texts = ["".join(rng.choices(tokens, k=8)) for _ in range(600)]
    ids, counts = FastEncoder(encoding).encode(texts)
    for text, ours in zip(texts, np.split(ids, np.cumsum(counts)[:-1]), strict=True):
        assert ours.tolist() == tiny.encode_reference(encoding, text), text
    assert len(segments(encoding, "".join(tokens[:500]))) > 40


@pytest.mark.parametrize("model", MODELS)
def test_model_vocabularies_match_reference(model, load_model):
    encoding, rng = load_model(model).encoding, random.Random(1)
    texts = ["".join(chr(rng.randrange(0x3000, 0x9FFF)) for _ in range(20)) for _ in range(300)]
    ids, counts = FastEncoder(encoding).encode([encoding.normalize(text) for text in texts])
    for text, ours in zip(texts, np.split(ids, np.cumsum(counts)[:-1]), strict=True):
        assert ours.tolist() == tiny.encode_reference(encoding, text), text
