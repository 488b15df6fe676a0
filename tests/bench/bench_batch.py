"""Measure the time to the first token of a short chat, alone and beside a running batch.

    python -m tests.bench.bench_batch [--rounds 5] [--requests 20] [--dtype auto]

One `pellucid serve` in a separate process answers chats over HTTP. Each round measures `--requests`
chats alone, and as many while a batch runs: eight requests at a time, with prompts of 20 to 1,000
tokens and 100 new ones. The process also measures each work item of the engine: a prefill chunk or
a decoding step. A work item is not interrupted, so a chat that arrives during one waits for it.

The delay of a chat beside a batch is its time to the first token minus the median of the same round
alone. It is compared with the longest work item beside a batch: at most one in the median, and two
at the 95th percentile. The exit code is 1 if it is more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from openai import OpenAI

from serve import settings
from tests.bench.bench_serve import MODEL, NEW, ROOT, processor, wait_until_idle, word_ids

LENGTHS = (20, 100, 300, 1000)  # tokens of the prompts of a batch
LINES = 500  # more than a phase answers
PATH = "/v1/completions"


@dataclass(frozen=True)
class WorkItem:
    """A work item of the engine: its start on the system's clock, and its duration in seconds."""

    kind: str
    start: float
    seconds: float


def serve(trace: Path, arguments: list[str]) -> None:
    """Run `pellucid serve`, and write its work items to a file at the end."""
    from serve.cli.main import app
    from transformer.engine.engine import Engine

    items: list[tuple[str, float, float]] = []
    compute = Engine._compute

    def timed(self, step) -> None:
        start = time.monotonic()
        compute(self, step)
        items.append((type(step).__name__, start, time.monotonic() - start))

    Engine._compute = timed
    try:
        app(["serve", "--port", "0", "--json", *arguments])
    finally:
        trace.write_text(json.dumps(items))


@contextmanager
def serving(trace: Path, home: Path, dtype: str) -> Iterator[tuple[str, str]]:
    """Run `serve` in a separate process, with a data folder of its own; yield address and dtype."""
    for name in ("models", "compiled", "formats.json"):  # of the user: models and measured dtypes
        (home / name).symlink_to(settings.data_folder() / name)
    command = [sys.executable, "-m", "tests.bench.bench_batch", "--serve", str(trace)]
    process = subprocess.Popen(
        [*command, "-m", MODEL, "--dtype", dtype],
        cwd=ROOT,
        env={**os.environ, "PELLUCID_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        if not (line := process.stdout.readline()):
            raise SystemExit("the server did not start")
        banner = json.loads(line)
        wait_until_idle(process.pid)
        yield banner["url"], banner.get("formats", {}).get(MODEL, dtype)
    finally:
        process.terminate()
        process.wait()


def first_token(http: httpx.Client, number: int) -> float:
    """Return the seconds to the first token of a short chat."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"{number}: what is the capital of France?"}],
        "max_tokens": 1,
        "stream": True,
    }
    start = time.perf_counter()
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get(
                "content"
            ):
                return time.perf_counter() - start
    raise SystemExit("a chat had no token")


@contextmanager
def running_batch(client: OpenAI, rng: np.random.Generator, ids: list[int]) -> Iterator[None]:
    """Run a batch inside the block."""
    lines = []
    for number in range(LINES):
        prompt = rng.choice(ids, LENGTHS[number % len(LENGTHS)]).tolist()
        bias = {str(id): -100 for id in range(3)}  # no end tokens: each line has `NEW` tokens
        body = {"model": MODEL, "prompt": prompt, "max_tokens": NEW, "logit_bias": bias}
        line = {"custom_id": str(number), "method": "POST", "url": PATH, "body": body}
        lines.append(json.dumps(line) + "\n")
    file = client.files.create(file=("batch.jsonl", "".join(lines).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=PATH, completion_window="24h")
    try:
        while client.batches.retrieve(batch.id).status == "validating":
            time.sleep(0.1)
        time.sleep(2)  # until eight requests run
        yield
        if (status := client.batches.retrieve(batch.id).status) != "in_progress":
            raise SystemExit(f"the batch is {status} before the end of the measurement")
    finally:
        client.batches.cancel(batch.id)
        while client.batches.retrieve(batch.id).status == "cancelling":
            time.sleep(0.1)
        client.files.delete(file.id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()

    rng, ids = np.random.default_rng(0), word_ids()
    alone, beside, delays = [], [], []
    phases = []  # of running batches: start and end
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "items.json"
        with serving(trace, Path(folder), options.dtype) as (url, dtype):
            http = httpx.Client(base_url=url, timeout=600)
            client = OpenAI(base_url=f"{url}/v1", api_key="any", timeout=600)
            with http, client:
                first_token(http, 0)
                for number in range(options.rounds):
                    print(f"round {number + 1} of {options.rounds}", file=sys.stderr)

                    def measure() -> list[float]:
                        # Chats that arrive at any point of a work item.
                        seconds = []
                        for _ in range(options.requests):
                            time.sleep(rng.uniform(0, 0.3))
                            seconds.append(first_token(http, int(rng.integers(10**6))))
                        return seconds

                    alone.append(measure())
                    with running_batch(client, rng, ids):
                        start = time.monotonic()
                        beside.append(measure())
                        phases.append((start, time.monotonic()))
                    delays += [second - np.median(alone[-1]) for second in beside[-1]]
        items = [WorkItem(*item) for item in json.loads(trace.read_text())]
    items = [i for i in items if any(a <= i.start <= b for a, b in phases)]
    report(dtype, np.ravel(alone), np.ravel(beside), np.array(delays), items)


def report(
    dtype: str, alone: np.ndarray, beside: np.ndarray, delays: np.ndarray, items: list[WorkItem]
) -> None:
    """Print the times, in milliseconds, and exit with code 1 if a delay is too long."""
    print(f"{processor()}, {os.cpu_count()} cores; {MODEL} in {dtype}, over HTTP")
    print(f"{'ms':24}{'median':>9}{'95 %':>9}{'longest':>9}{'count':>9}")
    for name, values in {
        "first token alone": alone,
        "first token beside batch": beside,
        "prefill chunk": np.array([i.seconds for i in items if i.kind == "Prefill"]),
        "decoding step": np.array([i.seconds for i in items if i.kind == "Decode"]),
    }.items():
        figures = (np.median(values), np.percentile(values, 95), values.max())
        print(f"{name:24}" + "".join(f"{1000 * f:9.1f}" for f in figures) + f"{len(values):9}")
    longest = max(items, key=lambda item: item.seconds)
    median, high = np.median(delays), np.percentile(delays, 95)
    print(f"longest work item: {longest.kind}, {1000 * longest.seconds:.1f} ms")
    print(f"median delay: {1000 * median:.1f} ms, {median / longest.seconds:.2f} work items (1)")
    print(f"95 % of delays: {1000 * high:.1f} ms, {high / longest.seconds:.2f} work items (2)")
    raise SystemExit(int(median > longest.seconds or high > 2 * longest.seconds))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
