"""How fast text becomes ids: Pellucid beside tiktoken, on text of many kinds.

    python tests/bench/bench_bpe.py [--encodings cl100k_base ...] [--rounds 5] [--megabytes 3]

In every round both encode the same stretch of text, one after the other on one thread, and the ids
must be equal, or the exit status is 1. Stretches are taken in turn, so none has been seen before
until the text is used up; our encoder learns the pieces it meets, tiktoken keeps nothing. `cold` is
the first stretch for an encoding whose tables have just been made. Ratios are taken within a round;
given are their median and the least of them. Speeds are in MB of UTF-8 a second.

Besides: a string of 100 bytes, decoding, what the tables take to make, and two processes beside
one.

Left out: many threads (tiktoken scales with them, we don't), memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import bpe  # noqa: E402
from bpe.bulk import Bulk  # noqa: E402
from tests.bench import corpus  # noqa: E402

KINDS = ("english", "dictionary", "python", "russian", "chinese", "hindi", "emoji", "locale")


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def stretches(text: str, megabytes: float, number: int) -> list[str]:
    """Stretches of a text, each of about so many bytes; shorter ones if it has not that many."""
    bytes_each = len(text.encode()) / len(text)
    size = min(int(megabytes * 1e6 / bytes_each), len(text) // number)
    return [text[i * size : (i + 1) * size] for i in range(number)]


def compare(name: str, kind: str, rounds: int, megabytes: float) -> None:
    import tiktoken

    ours, theirs = bpe.get_encoding(name), tiktoken.get_encoding(name)
    options: dict[str, Any] = {"disallowed_special": ()}
    parts = stretches(corpus.load(kind), megabytes, rounds + 1)
    ours._bulk = Bulk(ours)  # that has learned nothing
    cold, ratios, speeds = 0.0, [], []
    for i, part in enumerate(parts):
        their_time, their_ids = timed(lambda: theirs.encode_to_numpy(part, **options))  # noqa: B023
        our_time, our_ids = timed(lambda: ours.encode_to_numpy(part, **options))  # noqa: B023
        if not np.array_equal(our_ids, their_ids):
            raise SystemExit(f"{name}, {kind}: stretch {i} has other ids than tiktoken's")
        if i == 0:
            cold = their_time / our_time
            continue
        ratios.append(their_time / our_time)
        speeds.append((len(part.encode()) / our_time / 1e6, len(part.encode()) / their_time / 1e6))
    decoding = []
    ids = our_ids.tolist()
    for _ in range(rounds):
        their_time, their_text = timed(lambda: theirs.decode_bytes(ids))
        our_time, our_text = timed(lambda: ours.decode_bytes(ids))
        assert our_text == their_text
        decoding.append(their_time / our_time)
    mine, tiktokens = (statistics.median(speed) for speed in zip(*speeds, strict=True))
    print(
        f"{name:12} {kind:10} {len(parts[0].encode()) / 1e6:4.1f} MB   {mine:6.1f} {tiktokens:6.1f}"
        f"   x{statistics.median(ratios):4.2f} (least x{min(ratios):4.2f}, cold x{cold:4.2f})"
        f"   decode x{statistics.median(decoding):4.2f}",
        flush=True,
    )


def short(name: str, rounds: int) -> None:
    import tiktoken

    ours, theirs = bpe.get_encoding(name), tiktoken.get_encoding(name)
    text = corpus.load("english")
    lines = [text[i : i + 100] for i in range(0, 400_000, 100)]
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        their_time, expected = timed(lambda: [theirs.encode(line) for line in lines])
        our_time, ids = timed(lambda: [ours.encode(line) for line in lines])
        assert ids == expected
        times.append((our_time, their_time))
    mine, tiktokens = (min(time) / len(lines) * 1e6 for time in zip(*times, strict=True))
    print(f"{name:12} 100 bytes: {mine:.1f} us, tiktoken {tiktokens:.1f} us")


def tables(name: str) -> None:
    encoding = bpe.get_encoding(name)
    worker, text = Bulk(encoding), corpus.load("chinese")[:100_000]
    first, _ = timed(lambda: worker.encode([text]))
    again, _ = timed(lambda: worker.encode([text]))
    making, _ = timed(lambda: Bulk(encoding))
    print(f"{name:12} tables: {making:.2f} s, and {first - again:.2f} s when first merging")


def _encode(argument: tuple[str, str, int]) -> float:
    """In a process of its own: seconds for encoding a text, tables made and text learned before."""
    name, text, times = argument
    encoding = bpe.get_encoding(name)
    encoding.encode_to_numpy(text, disallowed_special=())
    _READY.wait()
    start = time.perf_counter()
    for _ in range(times):
        encoding.encode_to_numpy(text, disallowed_special=())
    return time.perf_counter() - start


def _start(ready: Any) -> None:
    global _READY
    _READY = ready


def processes(name: str) -> None:
    """What two processes do in the time in which one does its half."""
    text = corpus.load("dictionary")[:6_000_000]
    context = multiprocessing.get_context("spawn")

    def speed(number: int) -> float:
        ready = context.Barrier(number)
        with context.Pool(number, _start, (ready,)) as pool:
            seconds = pool.map(_encode, [(name, text, 6)] * number, chunksize=1)
        return number * 6 * len(text) / max(seconds) / 1e6

    one, two = speed(1), speed(2)
    print(f"{name:12} one process {one:.1f} MB/s, two {two:.1f} MB/s: x{two / one:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pellucid beside tiktoken.")
    parser.add_argument("--encodings", nargs="+", default=["gpt2", "cl100k_base", "o200k_base"])
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=3.0)
    parser.add_argument("--only", choices=["long", "short", "processes"])
    args = parser.parse_args()

    from tests.bpe import tiktoken_cache

    with tempfile.TemporaryDirectory() as folder:
        tiktoken_cache.fill(Path(folder))
        import tiktoken

        for name in args.encodings:
            tiktoken.get_encoding(name)
    print(
        f"python {platform.python_version()}, numpy {np.__version__}, "
        f"tiktoken {tiktoken.__version__}, {os.cpu_count()} CPUs"
    )
    for name in args.encodings:
        if args.only in (None, "long"):
            tables(name)
            print(f"{'':34} ours  theirs")
            for kind in args.kinds:
                compare(name, kind, args.rounds, args.megabytes)
        if args.only in (None, "short"):
            short(name, args.rounds)
    if args.only in (None, "processes"):
        processes(args.encodings[-1])


if __name__ == "__main__":
    main()
