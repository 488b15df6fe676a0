"""Documents a second beside sentence-transformers, on the same weights, texts and machine.

    python -m tests.bench.bench_embed [MODEL_FOLDER] [--threads 2] [--rounds 5] [--batches 16 32 64]

256 documents of 10 to 120 English words (the setting of the published figures), from text to
vector, tokenizing included. First the vectors are compared; then the two take turns, round by round
in one process, and the fastest round of each counts, so that whatever slows the machine slows both.
sentence-transformers runs in float32 and bfloat16, at batch 32 (its default) or at several.
The last line is one JSON object.
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
    """Documents of words of the passage, the same every time."""
    words = PASSAGE.read_text("utf-8").split()
    draw = random.Random(0)
    return [" ".join(draw.choices(words, k=draw.randint(10, 120))) for _ in range(count)]


def ours(folder: Path, format: str) -> Callable[[list[str]], np.ndarray]:
    import bpe
    from transformer import encoder
    from transformer.checkpoint import bert

    params, cfg = bert.load(folder, dtype=format)
    words = bpe.load_wordpiece(folder)
    return lambda texts: encoder.embed_all(
        params, cfg, words.encode_batch(texts, max_length=cfg.max_tokens)
    )


def theirs(folder: Path, format: str, batch: int) -> Callable[[list[str]], np.ndarray]:
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    if format == "bfloat16":
        model = model.bfloat16()

    def embed(texts: list[str]) -> np.ndarray:
        with torch.inference_mode():
            return model.encode(texts, batch_size=batch, convert_to_tensor=True).float().numpy()

    return embed


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The least cosine between vectors of the same text."""
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
    runs = {f"pellucid {format}": ours(args.folder, format) for format in ("float32", "bfloat16")}
    for format in ("float32", "bfloat16"):
        for batch in args.batches:
            name = f"sentence-transformers {format} batch {batch}"
            runs[name] = theirs(args.folder, format, batch)

    reference = runs[f"sentence-transformers float32 batch {args.batches[0]}"](docs)
    least = {"float32": 0.99999, "bfloat16": 0.999}
    for name, run in runs.items():
        found = cosine(run(docs), reference)
        assert found > least[name.split()[1]], f"{name}: cosine {found}"
        if name == "pellucid bfloat16":
            assert found > 0.9999, found
        print(f"{name:40} least cosine {found:.6f}", flush=True)
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(args.rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run(docs)
            best[name] = min(best[name], time.perf_counter() - started)
    speeds = {name: round(len(docs) / seconds, 1) for name, seconds in best.items()}
    for name, speed in speeds.items():
        print(f"{name:40} {speed:7.1f} documents/s")

    def peer(format: str) -> float:
        return max(v for k, v in speeds.items() if k.startswith(f"sentence-transformers {format}"))

    ratios = {
        f"{own} / theirs {other}": speeds[f"pellucid {own}"] / peer(other)
        for own, other in (
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
