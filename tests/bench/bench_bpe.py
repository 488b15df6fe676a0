"""Benchmark BPE encoding and decoding: Pellucid compared with tiktoken, on many kinds of text.

    python tests/bench/bench_bpe.py [--encodings cl100k_base ...] [--rounds 6] [--megabytes 3]
    python tests/bench/bench_bpe.py --files tokenizer.json tokenizer.model vocab.gguf ...

With `--files`, the vocabularies are compared with `tokenizers`, or with `sentencepiece` if the file
is a `tokenizer.model`, on the mixed text of tests/bpe/mixed_text.py: all texts of a round together,
on one thread. A GGUF file is saved as tokenizer.json first.

In every round, both libraries encode the same slice of text on one thread, one after the other, in
alternating order. The token ids must be equal; otherwise the exit status is 1. No slice is used
twice, because Pellucid caches the tokens of pre-tokens (`FastEncoder`) and tiktoken does not.
`first` is the ratio for the first slice, with an empty cache. The time to build the tables of
Pellucid, once per process, is printed separately and is not part of any ratio.

A ratio is tiktoken's time divided by Pellucid's in one round. All ratios and their median are
printed.
Speeds are medians, in MB of UTF-8 per second. Decoding uses the same ids as a list. On a busy
machine, `--cpu-time` excludes the time of other processes.

Also measured: strings of 100 bytes, and two processes compared with one.

Not measured: several threads (tiktoken scales with them, Pellucid does not), and memory.
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
    """Time both functions, in alternating order; return the seconds of each, and the result.

    Raises:
        SystemExit: the results differ.
    """
    if number % 2:
        our_time, our_result = timed(ours)
        their_time, their_result = timed(theirs)
    else:
        their_time, their_result = timed(theirs)
        our_time, our_result = timed(ours)
    if not np.array_equal(our_result, their_result):
        raise SystemExit(f"round {number}: the results of Pellucid and tiktoken differ")
    return our_time, their_time, our_result


def text_slices(text: str, megabytes: float, number: int) -> list[str]:
    """Return `number` slices of about `megabytes` MB each, or less if the text is too short."""
    bytes_each = len(text.encode()) / len(text)
    size = min(int(megabytes * 1e6 / bytes_each), len(text) // number)
    step = len(text) // number
    return [text[i * step : i * step + size] for i in range(number)]


def compare(name: str, kind: str, rounds: int, megabytes: float) -> None:
    import tiktoken

    ours, theirs = bpe.get_encoding(name), tiktoken.get_encoding(name)
    parts = text_slices(corpus.load(kind), megabytes, rounds + 1)
    ours._fast_encoder = FastEncoder(ours, ours.split_points)  # with an empty cache
    ours.encode_to_numpy("12 世界 " * 10_000)  # builds the tables
    theirs.encode_to_numpy(parts[-1][:1000], **ANY)
    encoding: list[tuple[float, float]] = []
    decoding: list[float] = []
    for i, part in enumerate(parts):
        our_time, their_time, ids = interleaved(
            i,
            lambda: ours.encode_to_numpy(part, **ANY),  # noqa: B023
            lambda: theirs.encode_to_numpy(part, **ANY),  # noqa: B023
        )
        megabytes = len(part.encode()) / 1e6
        encoding.append((megabytes / our_time, megabytes / their_time))
        ids = ids.tolist()
        our_time, their_time, _ = interleaved(
            i,
            lambda: ours.decode_bytes(ids),  # noqa: B023
            lambda: theirs.decode_bytes(ids),  # noqa: B023
        )
        decoding.append(their_time / our_time)
    ratios = [our_speed / their_speed for our_speed, their_speed in encoding]
    our_speed, their_speed = (
        statistics.median(speeds) for speeds in zip(*encoding[1:], strict=True)
    )
    megabytes = len(parts[0].encode()) / 1e6
    print(
        f"{name:12} {kind:10} {megabytes:4.1f} MB {our_speed:6.1f} {their_speed:6.1f}"
        f"  x{statistics.median(ratios[1:]):4.2f}  {format_ratios(ratios[1:])}"
        f"  first {ratios[0]:.2f}"
        f"  decode x{statistics.median(decoding[1:]):4.2f}  {format_ratios(decoding[1:])}",
        flush=True,
    )


def format_ratios(ratios: list[float]) -> str:
    return "(" + " ".join(f"{ratio:.2f}" for ratio in ratios) + ")"


def compare_short(name: str, rounds: int) -> None:
    import tiktoken

    ours, theirs = bpe.get_encoding(name), tiktoken.get_encoding(name)
    text = corpus.load("english")
    lines = [text[i : i + 100] for i in range(0, 400_000, 100)]
    times: list[tuple[float, float]] = []
    for i in range(rounds):
        our_time, their_time, _ = interleaved(
            i,
            lambda: np.concatenate([ours.encode(line, **ANY) for line in lines]),
            lambda: np.concatenate([theirs.encode(line, **ANY) for line in lines]),
        )
        times.append((our_time, their_time))
    our_time, their_time = (min(column) / len(lines) * 1e6 for column in zip(*times, strict=True))
    print(f"{name:12} 100 bytes: {our_time:.1f} us, tiktoken {their_time:.1f} us")


def compare_file(path: Path, rounds: int, megabytes: float) -> None:
    """Compare a vocabulary from a file; the ids are compared by a test."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import sentencepiece
    import tokenizers

    from bpe.save import tokenizer_json
    from tests.bpe.mixed_text import documents

    encoding = bpe.load(path).encoding
    if path.suffix == ".model":
        peer = "sentencepiece"
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode
    else:
        peer = "tokenizers"
        is_json = path.suffix == ".json"
        content = path.read_text(encoding="utf-8") if is_json else tokenizer_json(encoding)
        huggingface = tokenizers.Tokenizer.from_str(content)
        huggingface.no_truncation()

        def theirs(texts: list[str]) -> list[list[int]]:
            encoded = huggingface.encode_batch_fast(texts, add_special_tokens=False)
            return [item.ids for item in encoded]

    times: list[tuple[float, float]] = []
    for i in range(rounds + 1):
        texts = documents(megabytes, seed=i)
        calls = [
            lambda: encoding.encode_batch(texts, allowed_special="all"),  # noqa: B023
            lambda: theirs(texts),  # noqa: B023
        ]
        first = timed(calls[i % 2])[0]
        second = timed(calls[1 - i % 2])[0]
        times.append((second, first) if i % 2 else (first, second))
    size = sum(len(text.encode()) for text in texts) / 1e6
    ratios = [their_time / our_time for our_time, their_time in times]
    our_time, their_time = (statistics.median(column) for column in zip(*times[1:], strict=True))
    print(
        f"{path.parent.name + '/' + path.name:40} {size:4.1f} MB {size / our_time:6.1f} "
        f"{peer} {size / their_time:6.1f}  x{statistics.median(ratios[1:]):4.2f}  "
        f"{format_ratios(ratios[1:])}  first {ratios[0]:.2f}",
        flush=True,
    )


def report_tables(name: str) -> None:
    encoding = bpe.get_encoding(name)
    seconds, encoder = timed(lambda: FastEncoder(encoding))
    pair_seconds, _ = timed(lambda: encoder._pair_table)
    print(f"{name:12} tables: {seconds:.2f} s, and {pair_seconds:.2f} s at the first merge")


def _encode(argument: tuple[str, str, str, int]) -> float:
    """Return the seconds for encoding a text after one warm-up; called in a separate process."""
    library, name, text, times = argument
    encoding: Any
    if library == "tiktoken":
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
    """Compare the throughput of two processes with that of one, for both libraries."""
    text = corpus.load("dictionary")[:6_000_000]
    context = multiprocessing.get_context("spawn")

    def speed(library: str, number: int) -> float:
        ready = context.Barrier(number)
        with context.Pool(number, _start, (ready,)) as pool:
            seconds = pool.map(_encode, [(library, name, text, 6)] * number, chunksize=1)
        return number * 6 * len(text) / max(seconds) / 1e6

    for library in ("pellucid", "tiktoken"):
        one, two = (max(speed(library, number) for _ in range(2)) for number in (1, 2))
        print(f"{name:12} {library}: one {one:.1f} MB/s, two processes {two:.1f}: x{two / one:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare Pellucid with tiktoken.")
    parser.add_argument("--encodings", nargs="+", default=["gpt2", "cl100k_base", "o200k_base"])
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--megabytes", type=float, default=3.0)
    parser.add_argument("--only", choices=["long", "short", "processes"])
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure processor time instead of wall-clock time"
    )
    parser.add_argument("--files", nargs="+", type=Path, help="vocabularies to compare instead")
    args = parser.parse_args()

    from tests.bpe import tiktoken_cache

    if args.cpu_time:
        global clock
        clock = time.process_time
    if args.files:
        for path in args.files:
            compare_file(path, args.rounds, args.megabytes)
        return
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
                print(f"{'':31} ours theirs  ratio (each round)")
                for kind in args.kinds:
                    compare(name, kind, args.rounds, args.megabytes)
            if args.only in (None, "short"):
                compare_short(name, args.rounds)
        if args.only in (None, "processes"):
            processes(args.encodings[-1])


if __name__ == "__main__":
    main()
