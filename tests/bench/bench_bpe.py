"""How fast text becomes ids: Pellucid beside tiktoken, on text of many kinds.

    python tests/bench/bench_bpe.py [--encodings cl100k_base ...] [--rounds 6] [--megabytes 3]

In every round both encode the same stretch of text on one thread, one after the other, the first of
a round being the second of the next; the ids must be equal, or the exit status is 1. Stretches are
taken in turn and none comes twice: our encoder learns the pieces it meets, tiktoken keeps nothing.
`first` is the first stretch of an encoder that has learned nothing yet. What our tables take to
make, once in a process, is given beside it and in no ratio.

A ratio is their time by ours, of one round. All are printed, and their median. Speeds are medians,
in MB of UTF-8 a second. Decoding is of the same ids, given as a list. On a busy machine,
`--cpu-time` leaves out the time that other processes had.

Besides: a string of 100 bytes, and two processes beside one.

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
from bpe.fast_encoder import FastEncoder  # noqa: E402
from tests.bench import corpus  # noqa: E402

KINDS = ("english", "dictionary", "python", "russian", "chinese", "hindi", "emoji", "locale")
ANY: dict[str, Any] = {"disallowed_special": ()}

clock = time.perf_counter


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = clock()
    result = call()
    return clock() - start, result


def interleaved(number: int, ours: Callable, theirs: Callable) -> tuple[float, float, Any]:
    """The seconds of both, who goes first by turns, and what they returned, which must agree."""
    if number % 2:
        our_time, our_result = timed(ours)
        their_time, their_result = timed(theirs)
    else:
        their_time, their_result = timed(theirs)
        our_time, our_result = timed(ours)
    if not np.array_equal(our_result, their_result):
        raise SystemExit(f"round {number}: other results than tiktoken's")
    return our_time, their_time, our_result


def text_slices(text: str, megabytes: float, number: int) -> list[str]:
    """Stretches of a text, each of about so many bytes; shorter ones if it has not that many."""
    bytes_each = len(text.encode()) / len(text)
    size = min(int(megabytes * 1e6 / bytes_each), len(text) // number)
    step = len(text) // number
    return [text[i * step : i * step + size] for i in range(number)]


def compare(name: str, kind: str, rounds: int, megabytes: float) -> None:
    import tiktoken

    ours, theirs = bpe.get_encoding(name), tiktoken.get_encoding(name)
    parts = text_slices(corpus.load(kind), megabytes, rounds + 1)
    ours._fast_encoder = FastEncoder(ours, ours.split_points)  # that has learned nothing
    ours.encode_to_numpy("12 世界 " * 10_000)  # makes its tables
    theirs.encode_to_numpy(parts[-1][:1000], **ANY)
    encoding: list[tuple[float, float]] = []
    decoding: list[float] = []
    for i, part in enumerate(parts):
        one, other, ids = interleaved(
            i,
            lambda: ours.encode_to_numpy(part, **ANY),  # noqa: B023
            lambda: theirs.encode_to_numpy(part, **ANY),  # noqa: B023
        )
        encoding.append((len(part.encode()) / one / 1e6, len(part.encode()) / other / 1e6))
        ids = ids.tolist()
        one, other, _ = interleaved(
            i,
            lambda: ours.decode_bytes(ids),  # noqa: B023
            lambda: theirs.decode_bytes(ids),  # noqa: B023
        )
        decoding.append(other / one)
    ratios = [mine / other for mine, other in encoding]
    mine, tiktokens = (statistics.median(speed) for speed in zip(*encoding[1:], strict=True))
    print(
        f"{name:12} {kind:10} {len(parts[0].encode()) / 1e6:4.1f} MB {mine:6.1f} {tiktokens:6.1f}"
        f"  x{statistics.median(ratios[1:]):4.2f}  {listed(ratios[1:])}  first {ratios[0]:.2f}"
        f"  decode x{statistics.median(decoding[1:]):4.2f}  {listed(decoding[1:])}",
        flush=True,
    )


def listed(ratios: list[float]) -> str:
    return "(" + " ".join(f"{ratio:.2f}" for ratio in ratios) + ")"


def short(name: str, rounds: int) -> None:
    import tiktoken

    ours, theirs = bpe.get_encoding(name), tiktoken.get_encoding(name)
    text = corpus.load("english")
    lines = [text[i : i + 100] for i in range(0, 400_000, 100)]
    times: list[tuple[float, float]] = []
    for i in range(rounds):
        one, other, _ = interleaved(
            i,
            lambda: np.concatenate([ours.encode(line, **ANY) for line in lines]),
            lambda: np.concatenate([theirs.encode(line, **ANY) for line in lines]),
        )
        times.append((one, other))
    mine, tiktokens = (min(time) / len(lines) * 1e6 for time in zip(*times, strict=True))
    print(f"{name:12} 100 bytes: {mine:.1f} us, tiktoken {tiktokens:.1f} us")


def report_tables(name: str) -> None:
    encoding = bpe.get_encoding(name)
    making, worker = timed(lambda: FastEncoder(encoding))
    pairs, _ = timed(worker.prepare)
    print(f"{name:12} tables: {making:.2f} s, and {pairs:.2f} s when first merging")


def _encode(argument: tuple[str, str, str, int]) -> float:
    """In a process of its own: seconds for encoding a text, tables made and text learned before."""
    who, name, text, times = argument
    encoding: Any
    if who == "tiktoken":
        import tiktoken

        encoding = tiktoken.get_encoding(name)
    else:
        encoding = bpe.get_encoding(name)
    encoding.encode_to_numpy(text, **ANY)
    _READY.wait()
    start = time.perf_counter()
    for _ in range(times):
        encoding.encode_to_numpy(text, **ANY)
    return time.perf_counter() - start


def _start(ready: Any) -> None:
    global _READY
    _READY = ready


def processes(name: str) -> None:
    """What two processes do in the time in which one does its half; tiktoken's for comparison."""
    text = corpus.load("dictionary")[:6_000_000]
    context = multiprocessing.get_context("spawn")

    def speed(who: str, number: int) -> float:
        ready = context.Barrier(number)
        with context.Pool(number, _start, (ready,)) as pool:
            seconds = pool.map(_encode, [(who, name, text, 6)] * number, chunksize=1)
        return number * 6 * len(text) / max(seconds) / 1e6

    for who in ("pellucid", "tiktoken"):
        one, two = max(speed(who, 1) for _ in range(2)), max(speed(who, 2) for _ in range(2))
        print(f"{name:12} {who}: one {one:.1f} MB/s, two processes {two:.1f}: x{two / one:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pellucid beside tiktoken.")
    parser.add_argument("--encodings", nargs="+", default=["gpt2", "cl100k_base", "o200k_base"])
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--megabytes", type=float, default=3.0)
    parser.add_argument("--only", choices=["long", "short", "processes"])
    parser.add_argument("--cpu-time", action="store_true", help="not the time on the wall")
    args = parser.parse_args()

    from tests.bpe import tiktoken_cache

    if args.cpu_time:
        global clock
        clock = time.process_time
    with tempfile.TemporaryDirectory() as folder:
        tiktoken_cache.fill(Path(folder))
        import tiktoken

        print(
            f"python {platform.python_version()}, numpy {np.__version__}, "
            f"tiktoken {tiktoken.__version__}, {os.cpu_count()} CPUs" + ", CPU time" * args.cpu_time
        )
        for name in args.encodings:
            if args.only in (None, "long"):
                report_tables(name)
                print(f"{'':31} ours theirs  ratio (of each round)")
                for kind in args.kinds:
                    compare(name, kind, args.rounds, args.megabytes)
            if args.only in (None, "short"):
                short(name, args.rounds)
        if args.only in (None, "processes"):
            processes(args.encodings[-1])


if __name__ == "__main__":
    main()
