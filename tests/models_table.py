"""Compute docs/models.md: every family, encoder and tokenizer, against its reference, live.

    LLAMA_CPP=/path/to/llama.cpp python -m tests.models_table

It needs the extra `parity` (`pip install -e '.[parity]'`) and the sources of llama.cpp: a checkout,
or `vendor/llama.cpp` of the source package of llama-cpp-python. It takes some minutes. The
comparisons are those of the parity tests; a difference beyond its tolerance ends the command, and
the page stays as it was.

A row of `families.FAMILIES` or `encoder_families.FAMILIES` becomes a row of the page: the first
needs a config of this `model_type` in tests/golden/transformer/make_tiny.py, the second one in
tests/serve/encoder_comparisons.py.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

from transformer import encoder_families, families
from transformer.pooling import MODES

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
PACKAGES = (
    "jax", "numpy", "torch", "transformers", "sentence-transformers", "tokenizers",
    "sentencepiece", "tiktoken",
)  # fmt: skip
HEAD = """\
# Models

Each row is a comparison with the reference implementation, on tiny random models that are laid
out as published ones. `LLAMA_CPP=... python -m tests.models_table` computes this page with the
functions of the tests that `make parity` runs; it fails if a difference exceeds its tolerance. The
published models that Pellucid pulls by name are compared in [verification](verification.md).

Versions: {versions}.
"""
DECODERS = """\
## Decoders

The largest differences from transformers, in float32, at {length} positions: beyond every sliding
window, and beyond the context before scaling. Tolerance: {tolerance:g}.

- logits: of one forward pass;
- KV cache: of logits, after prefill in chunks and token by token across a block;
- parts: of every intermediate, given the same input;
- GGUF: of the logits of a file that llama.cpp's converter writes, with a vocabulary of llama.cpp.

Models with dense layers among layers with experts (`mlp_only_layers` or `decoder_sparse_step` of
Qwen3-MoE) are refused, with the name of the key; Qwen's published models have none.
"""
ENCODERS = """\
## Encoders and cross-encoders

From text to vector or score, against sentence-transformers, with a tokenizer of the family. The
distance is 1 - cosine similarity (tolerance {distance:g}); the difference is that of elements, or
of scores (tolerance {tolerance:g}). "From GGUF": of the file that llama.cpp's converter writes. A
GGUF file of a BERT cross-encoder is refused, because the converter drops its pooler, through which
the scores are computed; for a CamemBERT cross-encoder there is no converter.
"""
TOKENIZERS = """\
## Tokenizers

The number of texts whose ids differ; none may. The texts are in many scripts: golden ones, random
ones and the documents of this project; those of llama.cpp are its own.
"""

Row = tuple[str, ...]
Jobs = dict[str, Callable[[], Row]]  # a label for the progress -> function that computes a row


def main() -> None:
    """Compute the page and write it."""
    if not (folder := os.environ.get("LLAMA_CPP")):
        sys.exit("set LLAMA_CPP to a folder with convert_hf_to_gguf.py and models/")
    llama_cpp, started = Path(folder), time.monotonic()
    sections = [decoder_jobs(llama_cpp), encoder_jobs(llama_cpp), tokenizer_jobs(llama_cpp)]
    total, tables = sum(map(len, sections)), []
    for jobs in sections:
        tables.append([])
        for label, job in jobs.items():
            done = sum(map(len, tables))
            seconds = time.monotonic() - started
            print(f"{done:3}/{total} {seconds:4.0f} s  {label}", file=sys.stderr, flush=True)
            tables[-1].append(job())
    PAGE.write_text(page(llama_cpp, *tables), "utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)


def page(llama_cpp: Path, decoders: list[Row], encoders: list[Row], tokenizers: list[Row]) -> str:
    """Return the page with these rows."""
    from tests.serve import encoder_comparisons
    from tests.transformer import comparisons

    project = tomllib.loads((llama_cpp / "gguf-py" / "pyproject.toml").read_text("utf-8"))
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {version(name)}" for name in PACKAGES]
    versions.append(f"llama.cpp with gguf-py {project['project']['version']}")
    limits = {"tolerance": comparisons.TOLERANCE, "length": comparisons.LENGTH}
    limits["distance"] = encoder_comparisons.MAX_DISTANCE
    return "\n".join(
        [
            HEAD.format(versions=", ".join(versions)),
            DECODERS.format(**limits),
            table(
                ("family", "class of transformers", "logits", "KV cache", "parts", "GGUF"),
                decoders,
            ),
            ENCODERS.format(**limits),
            table(("model", "compared", "reference", "distance", "difference"), encoders),
            TOKENIZERS,
            table(
                ("kind", "vocabulary", "file", "reference", "texts", "different"),
                sorted(tokenizers, key=lambda row: row[0]),
            ),
        ]
    )


def table(head: Row, rows: Sequence[Row]) -> str:
    """Return a table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def decoder_jobs(llama_cpp: Path) -> Jobs:
    """Return a job for each tiny model of each family of `families.FAMILIES`."""
    from tests.golden.transformer import make_tiny
    from tests.transformer import comparisons

    def row(kind: str, name: str) -> Row:
        with temporary_folder() as folder:
            both = comparisons.load_both(name, folder)
            differences = [
                comparisons.logits_difference(both),
                comparisons.cached_difference(both),
                max(comparisons.part_differences(both).values()),
            ]
        with temporary_folder() as folder:
            differences.append(comparisons.converted_difference(name, llama_cpp, folder))
        check(name, differences, comparisons.TOLERANCE)
        architecture = families.FAMILIES[kind].architecture
        return (f"`{kind}`", f"`{architecture}`", *map(number, differences))

    jobs = {}
    for kind in families.FAMILIES:
        names = [name for name, config in make_tiny.CONFIGS.items() if config.model_type == kind]
        assert names, f"{kind} has no config in make_tiny.py"
        jobs |= {f"decoder {name}": partial(row, kind, name) for name in names}
    return jobs


def encoder_jobs(llama_cpp: Path) -> Jobs:
    """Return a job for each kind of encoder, pooling and cross-encoder."""
    from tests.serve import encoder_comparisons as comparisons

    def vectors(
        label: str, what: str, compare: Callable[[Path], comparisons.Difference]
    ) -> Callable[[], Row]:
        def row() -> Row:
            with temporary_folder() as folder:
                difference = compare(folder)
            assert difference.is_small, (label, difference)
            return (label, what, "`SentenceTransformer`", *map(number, difference))

        return row

    def scores(kind: str, labels: int, is_gguf: bool) -> Row:
        with temporary_folder() as folder:
            if is_gguf:
                difference = comparisons.converted_score_difference(kind, llama_cpp, folder, labels)
            else:
                difference = comparisons.score_difference(kind, labels, True, folder)
        check(kind, [difference], comparisons.TOLERANCE)
        what = "scores" + " of two labels" * (labels == 2) + " from GGUF" * is_gguf
        return f"`{kind}`", what, "`CrossEncoder`", "", number(difference)

    jobs: Jobs = {}
    for kind in dict.fromkeys([*encoder_families.FAMILIES, *comparisons.KINDS]):
        compare = partial(comparisons.vector_difference, kind)
        jobs[f"encoder {kind}"] = vectors(f"`{kind}`", "vectors", compare)
    for mode in MODES:
        compare = partial(comparisons.pooling_difference, mode)
        jobs[f"pooling {mode}"] = vectors(f"`{mode}`", "pooling", compare)
    compare = partial(comparisons.pooling_difference, MODES)
    jobs["all poolings"] = vectors("all of them", "pooling, concatenated", compare)
    jobs["dense layers"] = vectors(
        "`gemma3_text`", "dense layers and prompts", comparisons.dense_difference
    )
    for kind, family in encoder_families.FAMILIES.items():
        for labels in (1, 2) if family.head else ():
            for is_gguf in (False, True) if kind in comparisons.CONVERTIBLE else (False,):
                label = f"cross-encoder {kind}, labels: {labels}{', GGUF' * is_gguf}"
                jobs[label] = partial(scores, kind, labels, is_gguf)
    return jobs


def tokenizer_jobs(llama_cpp: Path) -> Jobs:
    """Return a job for each vocabulary that a reference can read."""
    from tests.bpe import comparisons, tiktoken_cache

    jobs: Jobs = {}

    def add(
        name: str, file: str, reference: str, compare: Callable[[Path], comparisons.Count]
    ) -> None:
        def row() -> Row:
            with temporary_folder() as folder:
                count = compare(folder)
            assert not count.different, (name, count.different[:3])
            return count.kind, name, file, reference, f"{count.texts:,}", str(len(count.different))

        jobs[f"tokenizer {name}, {reference}"] = row

    def tiktoken(name: str, folder: Path) -> comparisons.Count:
        tiktoken_cache.fill(folder)
        return comparisons.tiktoken_encoding(name)

    for name in comparisons.TIKTOKEN:
        add(name, "ranks", "tiktoken", partial(tiktoken, name))
    add("gpt2", "`tokenizer.json`", "tokenizers", comparisons.byte_level_json)
    add("bert", "`tokenizer.json`", "tokenizers", lambda folder: comparisons.wordpiece_json())
    for name in comparisons.golden()["tokenizers"]:
        compare = partial(comparisons.sentencepiece_json, name)
        add(name, "`tokenizer.json`", "tokenizers", compare)
    for name in comparisons.golden()["models"]:
        compare = partial(comparisons.sentencepiece_model, name)
        add(name, "`tokenizer.model`", "sentencepiece", compare)
    for path in comparisons.llama_cpp_vocabularies(llama_cpp):
        name = path.stem.removeprefix("ggml-vocab-")
        add(name, "GGUF", "llama.cpp", lambda _, path=path: comparisons.llama_cpp_vocabulary(path))
    return jobs


def check(name: str, differences: Sequence[float], tolerance: float) -> None:
    """Check that no difference exceeds the tolerance; NaN does."""
    assert all(value <= tolerance for value in differences), (name, differences)


def number(value: float) -> str:
    """Return a difference with two digits."""
    return f"{max(value, 0.0):.1e}"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield an empty folder that is deleted at the end."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


if __name__ == "__main__":
    main()
