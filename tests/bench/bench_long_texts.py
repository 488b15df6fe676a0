"""Measure retrieval of long texts with all-MiniLM: truncated texts, or means over chunks.

    python tests/bench/bench_long_texts.py

Texts are truncated at 256 or 512 tokens, or embedded as the mean of chunks of 256 or 512 tokens.
The texts are the topics of Python's help (`pydoc_data.topics`: chapters of the language reference)
and the docstrings of modules of the standard library, if they have more than 256 tokens. So they
are the same on every machine with the same version of Python. Each query has one right text:

    title       the heading of a text (the first line of a docstring), which is removed from it
    sentence    a sentence after the first 256 tokens of a text, which is removed from it (the
                inverse cloze task; Lee et al. 2019, arXiv:1906.00300)

A title is about the whole text, a sentence about a part that is not in the first 256 tokens.
"""

import argparse
import ast
import platform
import re
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import bpe
from serve import settings
from serve.models import catalogue, download, long_texts
from transformer import encoder
from transformer.checkpoint import bert

MODEL = "all-minilm-l6-v2"
SHORT, LONG = 256, 512


def topics(words: bpe.WordPiece) -> dict[str, str]:
    """Return long texts by heading; a text that several topics share is included once."""
    from pydoc_data.topics import topics as found

    texts: dict[str, str] = {}
    for text in found.values():
        heading, _, rest = text.partition("\n")
        underline, _, body = rest.partition("\n")
        if underline and set(underline) <= set("*=-^~\"'+") and len(underline) >= len(heading):
            body = re.sub(r"\n[*=\-^~\"'+.]{4,}\n", "\n", body).strip()
            texts[heading.strip()] = body
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        heading, _, body = docstring.partition("\n")
        texts[heading.strip()] = body.strip()
    return {title: text for title, text in texts.items() if len(words.encode(text)) > SHORT}


def sentences(texts: dict[str, str], words: bpe.WordPiece) -> tuple[list[str], list[str]]:
    """Return a sentence after the first `SHORT` tokens of each text, and the texts without them.

    The sentence is empty if a text has none.
    """
    queries, rest = [], []
    random = np.random.default_rng(0)
    for text in texts.values():
        found = [m for m in re.finditer(r"[A-Z][^.:\n]*(?:\n[^.:\n]+)*\.(?=\s)", text)
                 if 8 <= len(m[0].split()) <= 40
                 and len(words.encode(text[: m.start()])) > SHORT]  # fmt: skip
        chosen = found[random.integers(len(found))] if found else None
        queries.append(" ".join(chosen[0].split()) if chosen else "")
        rest.append(text[: chosen.start()] + text[chosen.end() :] if chosen else text)
    return queries, rest


def measures(queries: np.ndarray, texts: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Return recall@1 and the mean reciprocal rank of the right texts."""
    scores = queries @ texts.T
    ranks = 1 + (scores > scores[np.arange(len(right)), right][:, None]).sum(1)
    return float((ranks == 1).mean()), float((1 / ranks).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.parse_args()
    folder = download.find_path(catalogue.load().models[MODEL], settings.data_folder())
    words = bpe.load_wordpiece(folder)
    params, short = bert.load(folder)
    cfgs = {SHORT: short, LONG: replace(short, max_tokens=LONG)}
    texts = topics(words)
    asked, rest = sentences(texts, words)
    numbers = np.array([i for i, query in enumerate(asked) if query])
    sets = {
        "title": (list(texts), list(texts.values()), np.arange(len(texts))),
        "sentence": ([asked[i] for i in numbers], rest, numbers),
    }
    lengths = [len(words.encode(text)) for text in texts.values()]
    print(
        f"{len(texts)} texts of {min(lengths)} to {max(lengths)} tokens, median "
        f"{int(np.median(lengths))}; {len(numbers)} sentences; Python {platform.python_version()}"
    )
    print("| | " + " | ".join(f"{name}: recall@1, MRR" for name in sets) + " |")

    ways = {
        "cut at 256": (SHORT, lambda ids: long_texts.truncated(ids, SHORT)),
        "cut at 512": (LONG, lambda ids: long_texts.truncated(ids, LONG)),
        "mean of chunks of 256": (SHORT, lambda ids: long_texts.split(ids, SHORT)),
        "mean of chunks of 512": (LONG, lambda ids: long_texts.split(ids, LONG)),
    }
    for name, (limit, divide) in ways.items():
        cells = []
        for queries, passages, right in sets.values():
            asked_for = encoder.embed_all(
                params, cfgs[limit], [words.encode(query, max_length=limit) for query in queries]
            )
            chunks = [divide(words.encode(passage)) for passage in passages]
            vectors = encoder.embed_all(params, cfgs[limit], [c for text in chunks for c in text])
            found = long_texts.average(vectors, chunks, normalize=True)
            cells.append("{:.2f}, {:.3f}".format(*measures(asked_for, found, right)))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
