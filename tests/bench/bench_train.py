"""Benchmark training a BPE tokenizer: Pellucid compared with Hugging Face's tokenizers.

    python tests/bench/bench_train.py [--rounds 3] [--megabytes 50] [FILE ...]

Both libraries get the same texts: the lines of the files, or of the installed Python source. They
must find the same merges in the same order; otherwise no time is reported and the exit status is 1.
A first difference is judged by exact counts, because tokenizers 0.23.3 may take a pair of 41
occurrences before one of 42: if only tokenizers is wrong, the comparison goes on.
In every round, each library is timed once in a separate process on one thread, from the texts in
memory to the merges. Ratios are computed within a round.

Not measured: several threads, which tokenizers can use and Pellucid cannot.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
OURS, PEER = "pellucid", "tokenizers"


def read(files: list[Path], size: int) -> list[str]:
    """Return the lines of the files, up to `size` bytes in total."""
    if not files:
        paths = sysconfig.get_paths()
        folders = dict.fromkeys(Path(paths[name]) for name in ("stdlib", "purelib"))
        files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    lines: list[str] = []
    for path in dict.fromkeys(files):
        text = path.read_bytes()[:size].decode("utf-8", "replace")
        lines += text.splitlines(keepends=True)
        size -= len(text.encode())
        if size <= 0:
            break
    return lines


def train_ours(lines: list[str], merges: int) -> list[list[str]]:
    sys.path.insert(0, str(ROOT))
    from bpe.formats import bytes_to_unicode
    from bpe.pretokenize import GPT2
    from bpe.train import build_vocab
    from bpe.train_fast import count_pieces, learn_merges

    learned = learn_merges(count_pieces(lines, GPT2), merges)
    characters = bytes_to_unicode()
    tokens = ["".join(characters[byte] for byte in token) for token in build_vocab(learned)]
    return [[tokens[left], tokens[right]] for left, right in learned]


def train_peer(lines: list[str], merges: int) -> list[list[str]]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(lines, trainer)
    return json.loads(tokenizer.to_str())["model"]["merges"]


def work(name: str, files: list[Path], size: int, merges: int) -> None:
    """Train a tokenizer once with one library, and print the measurements as JSON."""
    lines = read(files, size)
    started = time.perf_counter()
    learned = {OURS: train_ours, PEER: train_peer}[name](lines, merges)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps(
            {
                "seconds": seconds,
                "peak_mb": peak / (1e6 if sys.platform == "darwin" else 1e3),  # bytes, or kilobytes
                "bytes": sum(len(line.encode()) for line in lines),
                "merges": len(learned),
                "digest": hashlib.sha256(json.dumps(learned).encode()).hexdigest(),
                "learned": learned,
            }
        )
    )


def judge(ours: list[list[str]], theirs: list[list[str]], options: argparse.Namespace) -> bool:
    """Return whether our merge is right, and theirs wrong, where the two first differ.

    The texts are merged up to there, and both pairs are counted. The right one is more frequent.
    """
    sys.path.insert(0, str(ROOT))
    from collections import Counter
    from itertools import pairwise

    from bpe.formats import bytes_to_unicode
    from bpe.merge import NO_MERGE, merge
    from bpe.pretokenize import GPT2
    from bpe.train_fast import count_pieces

    pairs = list(zip(ours, theirs, strict=False))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if first is None:
        return False  # one has more merges
    bytes_of = {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}

    def decode(token: str) -> bytes:
        return b"".join(bytes_of[character] for character in token)

    ranks = {(decode(a), decode(b)): i for i, (a, b) in enumerate(ours[:first])}
    counts: Counter[tuple[bytes, bytes]] = Counter()
    lines = read(options.files, round(options.megabytes * 1e6))
    for piece, count in count_pieces(lines, GPT2).items():
        data = piece.encode() if isinstance(piece, str) else piece
        tokens = merge(data, lambda a, b: ranks.get((a, b), NO_MERGE))
        for pair in pairwise(tokens):
            counts[pair] += count
    our_count, their_count = (counts[decode(a), decode(b)] for a, b in (ours[first], theirs[first]))
    print(
        f"merge {first} is {ours[first]} with {our_count} occurrences here, "
        f"and {theirs[first]} with {their_count} in {PEER}",
        file=sys.stderr,
    )
    return our_count == max(counts.values()) > their_count


def run(name: str, options: argparse.Namespace) -> dict:
    arguments = ["--megabytes", str(options.megabytes), "--merges", str(options.merges)]
    # Use one thread for NumPy and for Rust.
    single_threaded = {
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    output = subprocess.run(
        [sys.executable, __file__, "--worker", name, *arguments, *map(str, options.files)],
        env=os.environ | single_threaded,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    return json.loads(output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "files", nargs="*", type=Path, help="texts; default: the installed Python source"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--megabytes", type=float, default=50, help="default 50")
    parser.add_argument("--merges", type=int, default=32_000, help="default 32000")
    parser.add_argument("--worker", choices=[OURS, PEER], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.files, round(options.megabytes * 1e6), options.merges)
        return 0
    if not importlib.util.find_spec(PEER):
        raise SystemExit(f"{PEER} is not installed: pip install -e '.[parity]'")

    rounds: list[dict[str, dict]] = []
    for number in range(1, options.rounds + 1):
        print(f"round {number} of {options.rounds}", file=sys.stderr)
        rounds.append({name: run(name, options) for name in (OURS, PEER)})
        ours, theirs = (rounds[-1][name]["learned"] for name in (OURS, PEER))
        if ours != theirs and not judge(ours, theirs, options):
            print("the merges of the two libraries differ; no time is reported", file=sys.stderr)
            return 1

    result = rounds[0][OURS]
    is_equal = result["digest"] == rounds[0][PEER]["digest"]
    note = "equal in both" if is_equal else "equal up to a wrong choice of the peer"
    print(f"{result['merges']} merges of {result['bytes'] / 1e6:.1f} MB, {note}")
    print(f"{PEER} {importlib.metadata.version(PEER)}, one thread each, median of {len(rounds)}")
    for name in (OURS, PEER):
        seconds = statistics.median(results[name]["seconds"] for results in rounds)
        peak = max(results[name]["peak_mb"] for results in rounds)
        print(f"  {name:<11} {seconds:6.1f} s   {peak:6.0f} MB peak")
    ratios = sorted(results[PEER]["seconds"] / results[OURS]["seconds"] for results in rounds)
    print(f"  {PEER} takes {statistics.median(ratios):.2f} times as long", end="")
    print(f" ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
