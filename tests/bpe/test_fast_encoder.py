"""The fast encoder: the same ids as piece by piece, for every kind of vocabulary."""

import contextlib
import random
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
from bpe import fast_encoder
from bpe.fast_encoder import FastEncoder
from bpe.pretokenize import CL100K, GPT2, LLAMA3, O200K, QWEN2, SMOLLM
from tests.bpe import tiny
from tests.bpe.conftest import MODELS
from tests.naming import naming

pytestmark = pytest.mark.heavy

WORDS = [
    "low",
    " lower",
    "the",
    " The",
    "ing",
    "12",
    "3456",
    "é",
    " naïve",
    "中文",
    "नमस्ते",
    "🙂",
    "\n",
]
WORDS += [
    "  ",
    "\t",
    "'s",
    "'LL",
    "don't",
    "!!",
    "…",
    "\u0301",
    "aaaaaaaaaaaaaaaaaaaaaaa",
    "\x00",
    "\x04",
]


def texts(seed: int, number: int, length: int = 40) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(WORDS, k=rng.randint(0, length))) for _ in range(number)]


def check(encoding: bpe.Encoding, inputs: list[str], twice: bool = True) -> None:
    """Compare with the reference; the second time, all pieces are cached."""
    fast = FastEncoder(encoding)
    for _ in range(1 + twice):
        ids, counts = fast.encode([encoding.normalize(text) for text in inputs])
        assert ids.dtype == np.uint32 and len(counts) == len(inputs)
        parts = np.split(ids, np.cumsum(counts)[:-1])
        for text, part in zip(inputs, parts, strict=True):
            assert part.tolist() == tiny.encode_reference(encoding, text), text


ENCODINGS = {
    "pairs": tiny.encoding(),
    "bytes": tiny.encoding(merges=None),
    "ignore_merges": tiny.encoding(ignore_merges=True),
    "normalized": tiny.encoding(normalization="NFC"),
    "lacking a byte": tiny.encoding(
        ranks={token: id for token, id in tiny.IDS.items() if token != b"\x04"},
        dropped_bytes=b"\x04",
    ),
}


@pytest.mark.parametrize("min_batch_pieces", [0, 1 << 30], ids=["batched", "single"])
@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_ids_of_every_kind_of_vocabulary_match_reference(encoding, min_batch_pieces, monkeypatch):
    monkeypatch.setattr(fast_encoder, "MIN_BATCH_PIECES", min_batch_pieces)
    check(encoding, texts(0, 200))


@pytest.mark.parametrize("pattern", [GPT2, SMOLLM, CL100K, LLAMA3, QWEN2, O200K])
def test_ids_with_every_split_pattern_match_reference(pattern):
    check(tiny.encoding(pattern=pattern), texts(1, 100))


@pytest.mark.parametrize("name", ["gpt2", "p50k_base", "cl100k_base", "o200k_base"])
def test_ids_of_named_encodings_match_reference(name):
    check(bpe.get_encoding(name), texts(2, 500))


@pytest.mark.parametrize("model", MODELS)
def test_model_vocabularies_match_reference(model, load_model, golden):
    encoding = load_model(model).encoding
    check(encoding, [case["text"] for case in golden(model)["texts"]] + texts(3, 200))


@st.composite
def vocabularies(draw) -> bpe.Encoding:
    """Draw random merges of few letters, so that many of them compete."""
    rng = random.Random(draw(st.integers(0, 10**6)))
    ranks = {bytes([b]): i for i, b in enumerate(rng.sample(range(256), 256))}
    merges = []
    for _ in range(rng.randint(1, 60)):
        tokens = [token for token in ranks if not token.strip(b"abc \xc3\xa9")]
        left, right = rng.choice(tokens), rng.choice(tokens)
        if len(left + right) < 40 and (left, right) not in merges:
            ranks.setdefault(left + right, len(ranks))
            merges.append((left, right))
    if draw(st.booleans()):
        return bpe.Encoding("r", pattern=GPT2, ranks=ranks, special_tokens={})
    ignore = draw(st.booleans())
    return bpe.Encoding(
        "r", pattern=GPT2, ranks=ranks, special_tokens={}, merges=merges, ignore_merges=ignore
    )


@settings(max_examples=150)
@given(
    vocabularies(), st.lists(st.text("abcé ") | st.text("ab", max_size=60), min_size=1, max_size=20)
)
def test_random_vocabularies_match_reference(encoding, inputs):
    previous, fast_encoder.MIN_BATCH_PIECES = fast_encoder.MIN_BATCH_PIECES, 0
    try:
        check(encoding, inputs, twice=False)
    finally:
        fast_encoder.MIN_BATCH_PIECES = previous


def test_ids_with_small_chunks_blocks_and_cache_match_reference(monkeypatch):
    """Small limits cause every kind of boundary, which is rare with the default limits."""
    encoding = bpe.get_encoding("cl100k_base")
    inputs = texts(4, 30, 400)
    expected = [tiny.encode_reference(encoding, text) for text in inputs]
    monkeypatch.setattr(fast_encoder, "CHUNK_CHARS", 37)
    monkeypatch.setattr(fast_encoder, "BLOCK_CHARS", 300)
    monkeypatch.setattr(fast_encoder, "MAX_ADDED_IDS", 50)
    monkeypatch.setattr(fast_encoder, "MAX_BATCH_PIECE_BYTES", 9)
    ids, counts = FastEncoder(encoding).encode(inputs)
    assert [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])] == expected


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_splitting_at_safe_cuts_keeps_ids(name, monkeypatch):
    """The parts of a text have the same ids as the whole text."""
    monkeypatch.setattr(fast_encoder, "CHUNK_CHARS", 5)
    encoding = bpe.get_encoding(name)
    fast, rng = FastEncoder(encoding), random.Random(5)
    for _ in range(300):
        text = "".join(rng.choices("aB1 \n'!。，।中é\u0301/\t", k=40))
        ids, _ = fast.encode([text])
        assert ids.tolist() == tiny.encode_reference(encoding, text), text


def test_piece_cache_size_is_bounded(monkeypatch):
    """Text without repeated pieces must not fill the memory."""
    monkeypatch.setattr(fast_encoder, "MAX_ADDED_IDS", 300)
    monkeypatch.setattr(fast_encoder, "BLOCK_CHARS", 100)
    monkeypatch.setattr(fast_encoder, "CHUNK_CHARS", 50)
    fast = FastEncoder(tiny.encoding())
    words = [f" {i:x}z" for i in range(2000)]
    initial = fast._piece_cache.num_added_ids
    for start in range(0, len(words), 20):
        fast.encode(["".join(words[start : start + 20])])
        assert fast._piece_cache.num_added_ids <= initial + 300 + 4 * 100
    assert fast.encode([words[0]])[0].tolist() == tiny.encoding().encode(words[0])


def test_empty_texts_have_no_ids():
    fast = FastEncoder(tiny.encoding())
    for inputs in ([], [""], ["", ""], ["", "a", ""]):
        ids, counts = fast.encode(inputs)
        assert ids.tolist() == tiny.encoding().encode("".join(inputs))
        assert counts.tolist() == [len(text) for text in inputs]


def test_pieces_with_zero_bytes_have_distinct_keys():
    r"""The pieces "a", "a\0" and "a\0\0" must not be confused."""
    check(
        bpe.get_encoding("gpt2"),
        ["a", "a\0", "a\0\0", "\0", "\0\0", "\0" * 14, "\0" * 15, "\0" * 16],
    )


def test_long_text_uses_fast_encoder():
    encoding = bpe.get_encoding("cl100k_base")
    text = "".join(texts(6, 900)) + "\ud83d\ude00 \ud83d <|endoftext|>"
    expected = tiny.encode_reference(encoding, bpe.encoding.fix_surrogates(text))
    assert encoding._should_use_fast_encoder([text])
    assert encoding.encode_ordinary(text) == expected
    assert encoding.encode(text, disallowed_special=()) == expected
    array = encoding.encode_to_numpy(text, disallowed_special=())
    assert array.dtype == np.uint32 and array.tolist() == expected
    with pytest.raises(ValueError, match=naming("<|endoftext|>")):
        encoding.encode_to_numpy(text)


def test_special_tokens_in_long_texts_are_inserted():
    encoding = bpe.get_encoding("cl100k_base")
    end, fill = "<|endoftext|>", "<|fim_prefix|>"
    documents = [*texts(7, 900), end, f"{end}{end}", f"x{fill}", f"{fill}x{end}y", ""]
    options = {"allowed_special": {end}, "disallowed_special": ()}
    expected = [encoding.encode(text, **options) for text in documents]
    assert sum(map(len, documents)) > 1 << 15
    assert encoding.encode_batch(documents, **options) == expected
    assert encoding.encode_ordinary_batch(documents) == [
        encoding.encode_ordinary(text) for text in documents
    ]
    joined = end.join(documents)
    assert (
        encoding.encode_to_numpy(joined, **options).tolist()
        == [id for ids in expected for id in (*ids, encoding.eot_token)][:-1]
    )


def test_concurrent_threads_get_correct_ids():
    encoding = tiny.encoding()
    work = [("".join(texts(seed, 600)), []) for seed in range(4)]
    assert all(encoding._should_use_fast_encoder([text]) for text, _ in work)
    threads = [
        threading.Thread(target=lambda text=text, out=out: out.append(encoding.encode(text)))
        for text, out in work
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for text, (ids,) in work:
        assert ids == tiny.encode_reference(encoding, text)


@pytest.mark.parametrize("call_number", range(1, 8))
def test_interrupted_encoding_resets_the_cache(call_number, monkeypatch):
    """Bug: an exception while pieces were added left the tables inconsistent."""
    encoding = tiny.encoding()
    text = "".join(texts(1, 600))
    append, calls = fast_encoder.GrowableArray.append, 0

    def interrupted(self, values):
        nonlocal calls
        calls += 1
        if calls == call_number:
            raise KeyboardInterrupt
        append(self, values)

    encoding.encode_to_numpy("".join(texts(2, 600)))
    with monkeypatch.context() as patch:
        patch.setattr(fast_encoder.GrowableArray, "append", interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            encoding.encode_to_numpy(text)
    assert encoding.encode_to_numpy(text).tolist() == tiny.encode_reference(encoding, text)


SLOW = pytest.mark.slow
UNITS = ["a", "中", "'s", *(pytest.param(unit, marks=SLOW) for unit in " \n!1\0🙂")]


@pytest.mark.parametrize("unit", UNITS)
def test_repetitive_text_of_one_megabyte_takes_near_linear_time(unit):
    """Eight times the text must take far less than 64 times the time."""
    encoding = bpe.get_encoding("cl100k_base")

    def seconds(n: int) -> float:
        start = time.thread_time()
        ids = encoding.encode_to_numpy(unit * n)
        assert encoding.decode(ids) == unit * n
        return time.thread_time() - start

    seconds(40_000)
    assert seconds(1_000_000 // len(unit)) < 30 * max(seconds(125_000 // len(unit)), 0.02)
