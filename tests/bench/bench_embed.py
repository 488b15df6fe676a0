"""Compare documents per second with sentence-transformers, on the same weights and texts.

    python -m tests.bench.bench_embed [MODEL_FOLDER] [--threads 2] [--rounds 5] [--batches 16 32 64]

256 documents of 10 to 120 English words (the setting of the published figures) are embedded,
including tokenization. The embeddings are compared first. Then both implementations run alternately
in one process, and the fastest round of each counts, so that changes in the speed of the machine
affect both. sentence-transformers runs in float32 and bfloat16 with batch size 32 (its default) or
the sizes of --batches. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.bench.pulled import pulled_path

PASSAGE = Path(__file__).with_name("passage.txt")


def documents(count: int = 256) -> list[str]:
    """Return documents of random words from passage.txt; the seed is fixed."""
    words = PASSAGE.read_text("utf-8").split()
    rng = random.Random(0)
    return [" ".join(rng.choices(words, k=rng.randint(10, 120))) for _ in range(count)]


def ours(folder: Path, dtype: str) -> Callable[[list[str]], np.ndarray]:
    import bpe
    from transformer import encoder
    from transformer.checkpoint import bert

    params, cfg = bert.load(folder, dtype=dtype)
    words = bpe.load_wordpiece(folder)
    return lambda texts: encoder.embed_all(
        params, cfg, words.encode_batch(texts, max_length=cfg.max_tokens)
    )


def theirs(folder: Path, dtype: str, batch: int) -> Callable[[list[str]], np.ndarray]:
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    if dtype == "bfloat16":
        model = model.bfloat16()

    def embed(texts: list[str]) -> np.ndarray:
        with torch.inference_mode():
            return model.encode(texts, batch_size=batch, convert_to_tensor=True).float().numpy()

    return embed


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the smallest cosine similarity of two embeddings of the same text."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return float((a * b).sum(1).min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="default all-minilm-l6-v2, pulled")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[32])
    args = parser.parse_args()
    args.folder = args.folder or pulled_path("all-minilm-l6-v2")
    import torch

    torch.set_num_threads(args.threads)
    docs = documents()
    runs = {f"pellucid {dtype}": ours(args.folder, dtype) for dtype in ("float32", "bfloat16")}
    for dtype in ("float32", "bfloat16"):
        for batch in args.batches:
            name = f"sentence-transformers {dtype} batch {batch}"
            runs[name] = theirs(args.folder, dtype, batch)

    expected = runs[f"sentence-transformers float32 batch {args.batches[0]}"](docs)
    min_similarity = {"float32": 0.99999, "bfloat16": 0.999}
    for name, run in runs.items():
        similarity = cosine(run(docs), expected)
        assert similarity > min_similarity[name.split()[1]], f"{name}: cosine {similarity}"
        if name == "pellucid bfloat16":
            assert similarity > 0.9999, similarity
        print(f"{name:40} smallest cosine {similarity:.6f}", flush=True)
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(args.rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run(docs)
            best[name] = min(best[name], time.perf_counter() - started)
    speeds = {name: round(len(docs) / seconds, 1) for name, seconds in best.items()}
    for name, speed in speeds.items():
        print(f"{name:40} {speed:7.1f} documents/s")

    def fastest(dtype: str) -> float:
        return max(v for k, v in speeds.items() if k.startswith(f"sentence-transformers {dtype}"))

    ratios = {
        f"{ours_dtype} / theirs {theirs_dtype}": speeds[f"pellucid {ours_dtype}"]
        / fastest(theirs_dtype)
        for ours_dtype, theirs_dtype in (
            ("float32", "float32"),
            ("bfloat16", "float32"),
            ("bfloat16", "bfloat16"),
        )
    }
    for name, ratio in ratios.items():
        print(f"{name:40} {ratio:.2f}")
    print(json.dumps({"documents_per_second": speeds, "ratios": ratios}))


if __name__ == "__main__":
    main()
