"""Comparisons of the ids of each kind of vocabulary with a reference, live.

Each returns the number of texts whose ids differ. The parity tests assert on it, and
`tests/models_table.py` prints it. Vocabularies are those of the golden files, those that OpenAI
published, and those in the sources of llama.cpp with its own ids.
"""

import base64
import json
import random
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import bpe
from bpe.encoder_tokenizer import wordpiece_from_gguf
from bpe.formats.gguf import read_gguf_metadata
from bpe.sentencepiece import SentencePiece
from bpe.unigram import Unigram
from tests.bpe.conftest import GOLDEN
from tests.bpe.tiktoken_cache import gpt2_files

ROOT = Path(__file__).parents[2]
BYTES, CHARACTERS, UNIGRAM, WORDPIECE = (
    "byte-level BPE",
    "BPE of characters",
    "Unigram",
    "WordPiece",
)
KINDS = (BYTES, CHARACTERS, UNIGRAM, WORDPIECE)
TIKTOKEN = ("gpt2", "p50k_base", "cl100k_base", "o200k_base")  # others differ in special tokens

Encode = Callable[[str], Any]  # text to a sequence of ids


class Count(NamedTuple):
    """The result of a comparison."""

    kind: str  # one of `KINDS`
    texts: int
    different: tuple[str, ...]  # the texts whose ids differ


def hard_texts(count: int) -> list[str]:
    """Return random texts, each of characters of one script with whitespace and contractions."""
    rng = random.Random(1)
    texts = []
    for _ in range(count):
        start = rng.choice([0x20, 0x20, 0xA0, 0x370, 0x400, 0x900, 0x3040, 0x4E00, 0x1F300])
        letters = [chr(start + rng.randrange(96)) for _ in range(12)]
        letters += list(" \n\t\r'sS0123!/.") + ["  ", "\r\n", "'ll", "'RE"]
        texts.append("".join(rng.choices(letters, k=rng.randrange(60))))
    return texts


@cache
def golden() -> dict[str, Any]:
    """Return the vocabularies of SentencePiece that `tests/golden/bpe` trained."""
    return json.loads((GOLDEN / "sentencepiece.json").read_text())


@cache
def all_texts() -> tuple[str, ...]:
    """Return the golden texts, random texts, and the paragraphs of this project's documents."""
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    paragraphs = [part for path in documents for part in path.read_text("utf-8").split("\n\n")]
    return (*golden()["texts"], *hard_texts(2000), *paragraphs)


def compare(kind: str, ours: Encode, theirs: Encode, texts: Iterable[str] | None = None) -> Count:
    """Compare the ids of two tokenizers."""
    texts = all_texts() if texts is None else tuple(texts)
    different = [text for text in texts if list(ours(text)) != list(theirs(text))]
    return Count(kind, len(texts), tuple(different))


def kind_of(encoding: bpe.Encoding) -> str:
    """Return the kind of a vocabulary."""
    if not isinstance(encoding, SentencePiece):
        return BYTES
    return UNIGRAM if isinstance(encoding.model, Unigram) else CHARACTERS


# --- sentencepiece ----------------------------------------------------------------------------


def score_of(model: Unigram) -> Callable[[int], float]:
    """Return a function of an id that returns its score."""
    scores = {model.pieces[piece]: score for piece, score in model.scores.items()}
    return lambda id: scores.get(id, model.unk_score)


def sentencepiece_model(name: str, folder: Path) -> Count:
    """Compare a tokenizer.model of the golden file with sentencepiece.

    sentencepiece adds the scores of Unigram in float32, so it cannot tell close paths apart: ids of
    equal score count as equal.
    """
    import sentencepiece

    data = base64.b64decode(golden()["models"][name]["model"])
    path = folder / "tokenizer.model"
    path.write_bytes(data)
    encoding = bpe.load(path).encoding
    assert isinstance(encoding, SentencePiece)
    user_defined = {"<start_of_turn>", "<sep>"} & encoding.special_tokens.keys()
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)

    def ours(text: str) -> list[int]:
        ids = encoding.encode(text, allowed_special=user_defined, disallowed_special=())
        theirs = processor.encode(text)
        if ids != theirs and isinstance(encoding.model, Unigram):
            score = score_of(encoding.model)
            if abs(sum(map(score, ids)) - sum(map(score, theirs))) < 1e-4:
                return theirs
        return ids

    return compare(kind_of(encoding), ours, processor.encode)


# --- tokenizers -------------------------------------------------------------------------------


def sentencepiece_json(name: str, folder: Path) -> Count:
    """Compare a tokenizer.json of the golden file, special tokens included, with tokenizers."""
    import tokenizers

    path = folder / "tokenizer.json"
    path.write_text(json.dumps(golden()["tokenizers"][name]["tokenizer.json"]))
    tokenizer, theirs = bpe.load(path), tokenizers.Tokenizer.from_file(str(path))
    before = [tokenizer.bos_id] * tokenizer.add_bos
    after = [tokenizer.eos_id] * tokenizer.add_eos
    return compare(
        kind_of(tokenizer.encoding),
        lambda text: before + tokenizer.encoding.encode(text, allowed_special="all") + after,
        lambda text: theirs.encode(text).ids,
    )


def byte_level_json(folder: Path) -> Count:
    """Compare GPT-2's vocabulary as tokenizer.json with tokenizers."""
    import tokenizers

    merges, vocab = gpt2_files()
    (folder / "merges.txt").write_bytes(merges)
    (folder / "vocab.json").write_bytes(vocab)
    theirs = tokenizers.ByteLevelBPETokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt")
    )
    theirs.save(str(folder / "tokenizer.json"))
    ours = bpe.load(folder / "tokenizer.json").encoding
    return compare(
        kind_of(ours),
        lambda text: ours.encode(text, disallowed_special=()),
        lambda text: theirs.encode(text).ids,
    )


def wordpiece_json() -> Count:
    """Compare the WordPiece vocabulary of the golden file with tokenizers."""
    import tokenizers

    path = GOLDEN / "wordpiece-tokenizer.json"
    theirs = tokenizers.Tokenizer.from_file(str(path))
    return compare(WORDPIECE, bpe.load_wordpiece(path).encode, lambda text: theirs.encode(text).ids)


# --- tiktoken ---------------------------------------------------------------------------------


def tiktoken_encoding(name: str) -> Count:
    """Compare an encoding of OpenAI with tiktoken, whose cache `tiktoken_cache` has filled."""
    import tiktoken

    ours, theirs = bpe.get_encoding(name), tiktoken.get_encoding(name)
    return compare(
        kind_of(ours),
        lambda text: ours.encode(text, disallowed_special=()),
        lambda text: theirs.encode(text, disallowed_special=()),
    )


# --- llama.cpp --------------------------------------------------------------------------------


def llama_cpp_vocabularies(llama_cpp: Path) -> list[Path]:
    """Return the vocabularies in the sources of llama.cpp that have texts and their ids."""
    paths = (llama_cpp / "models").glob("ggml-vocab-*.gguf")
    return [path for path in sorted(paths) if path.with_name(path.name + ".out").exists()]


def llama_cpp_vocabulary(path: Path) -> Count:
    """Compare a vocabulary with the ids that llama.cpp records beside it."""
    content = path.with_name(path.name + ".inp").read_bytes().decode()
    separator = "\n__ggml_vocab_test__\n"
    texts = content.removesuffix(separator).split(separator)
    lines = path.with_name(path.name + ".out").read_text("utf-8").splitlines()
    rows = ([int(id) for id in line.split()] for line in lines)
    expected = dict(zip(texts, rows, strict=True))
    metadata = read_gguf_metadata(path)
    if metadata["tokenizer.ggml.model"] == "bert":
        wordpiece = wordpiece_from_gguf(metadata, path.name)
        ours: Encode = lambda text: wordpiece.encode(text, add_special_tokens=False)  # noqa: E731
        return compare(WORDPIECE, ours, expected.__getitem__, expected)
    encoding = bpe.from_gguf(metadata).encoding
    return compare(kind_of(encoding), encoding.encode_ordinary, expected.__getitem__, expected)
