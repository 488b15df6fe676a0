"""Benchmark a server: throughput and latency with concurrent requests and shared prefixes.

    python tests/bench/bench_serve.py [--rounds 5] [--dtype auto] [--before REVISION]
    python tests/bench/bench_serve.py --memory

One `pellucid serve` in a separate process receives requests over HTTP, streamed and greedy. Each
round repeats all measurements one after the other, so that a slow phase of the machine slows all of
them, and ratios are taken within a round. No prompt is repeated unless the measurement needs it.
All prompts are random tokens of one text, so that they are equally difficult.

    one     200 prompt tokens and 100 new ones, without other requests: tokens per second
    stream  the same request: tokens per second from the first token to the last. With --before
            also on a server of another revision of this repository, alternating with this one
    eight   eight different requests of this size at once: tokens per second until the last ends
    short   a prompt of 20 tokens alone, and 0.2 s after a prompt of 1,500 tokens was sent: seconds
            to the first token of the short prompt
    prefix  a prompt of 1,000 tokens and 30 more, then the same 1,000 tokens and 30 different ones:
            seconds to the first token of each

The generated text of a request must not depend on concurrent requests; the script compares it
before it measures.

`--memory` is a separate measurement: a server starts in a data folder without measured dtypes or
compiled programs, and then again in the same folder. Each time it answers four concurrent requests
of 2,048 tokens. The script prints the seconds until the server listens, the peak resident memory of
its process, and the peak of the process and its children together.

Left out: several models at once, sampling parameters, long contexts.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent.parent
MODEL = "smollm2-135m-instruct"
PROMPT, NEW = 200, 100
LONG, SHORT, HEAD_START = 1500, 20, 0.2
SHARED, OWN = 1000, 30


@dataclass(frozen=True)
class Answer:
    """The text of a response, and the times of its deltas in seconds after the request."""

    text: str
    times: tuple[float, ...]  # of the text deltas
    seconds: float

    @property
    def first(self) -> float:
        return self.times[0]

    @property
    def rate(self) -> float:
        """Return the tokens per second from the first token to the last."""
        return (NEW - 1) / (self.seconds - self.first)


@dataclass
class Server:
    """A running server and a client for it."""

    name: str
    address: str
    dtype: str
    client: httpx.Client
    ids: list[int]  # token ids for prompts
    listened: float  # time.perf_counter() when the server began to listen
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def prompt(self, length: int) -> list[int]:
        """Return the token ids of a new random prompt."""
        return self.random.choices(self.ids, k=length)

    def ask(self, prompt: list[int], count: int = 1) -> Answer:
        # Exactly `count` tokens: end tokens are forbidden.
        bias = {str(id): -100 for id in range(3)}
        body = {"model": MODEL, "prompt": prompt, "max_tokens": count, "temperature": 0}
        started, times, text = time.perf_counter(), [], ""
        with self.client.stream(
            "POST",
            f"{self.address}/v1/completions",
            json={**body, "logit_bias": bias, "stream": True},
        ) as response:
            if response.status_code != 200:
                raise SystemExit(f"{self.name}: {response.read().decode()}")
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                choice = json.loads(line[6:])["choices"][0]
                if choice["text"]:
                    times.append(time.perf_counter() - started)
                    text += choice["text"]
        return Answer(text, tuple(times), time.perf_counter() - started)

    def ask_all(self, prompts: list[list[int]], count: int) -> tuple[list[Answer], float]:
        """Send requests at once; return the answers, and the seconds until the last one ended."""
        started = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda prompt: self.ask(prompt, count), prompts))
        return answers, time.perf_counter() - started


@contextmanager
def serving(
    name: str,
    folder: Path,
    dtype: str,
    env: dict[str, str] | None = None,
    started: Callable[[int], object] = lambda pid: None,
) -> Iterator[Server]:
    process = subprocess.Popen(
        [sys.executable, "-m", "serve", "serve", "--port", "0", "-m", MODEL, "--json"]
        + ["--dtype", dtype],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        started(process.pid)
        line = process.stdout.readline()
        listened = time.perf_counter()
        if not line:
            raise SystemExit(f"{name} did not start")
        banner = json.loads(line)
        wait_until_idle(process.pid)
        dtypes = banner.get("formats", {})
        with httpx.Client(timeout=120, limits=httpx.Limits(max_connections=32)) as client:
            url, chosen_dtype = banner["url"], dtypes.get(MODEL, dtype)
            yield Server(name, url, chosen_dtype, client, word_ids(), listened)
    finally:
        process.terminate()
        process.wait()


def wait_until_idle(pid: int) -> None:
    """Wait until the process of a server is idle: after the start it compiles programs."""
    import psutil

    process, before = psutil.Process(pid), float("-inf")
    while (spent := sum(process.cpu_times()[:2])) - before > 0.05:
        before = spent
        time.sleep(3.5)


def measure_memory(dtype: str) -> None:
    """Measure two starts of a server in one new data folder that contains only the models."""
    import psutil

    from serve import settings

    class Watch(threading.Thread):
        """Samples the memory of a process and its children ten times per second."""

        def __init__(self, pid: int) -> None:
            super().__init__(daemon=True)
            self.pid, self.most, self.ended = pid, 0, threading.Event()
            self.start()

        def run(self) -> None:
            while not self.ended.wait(0.1):
                with suppress(psutil.Error):
                    process = psutil.Process(self.pid)
                    resident = [
                        p.memory_info().rss for p in [process, *process.children(recursive=True)]
                    ]
                    self.most = max(self.most, sum(resident))

    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "models").symlink_to(settings.data_folder() / "models")
        for start in ("first", "second"):
            began = time.perf_counter()
            with ExitStack() as stack:
                watch = []
                server = stack.enter_context(
                    serving(
                        start,
                        ROOT,
                        dtype,
                        env={**os.environ, "PELLUCID_HOME": home},
                        started=lambda pid, watch=watch: watch.append(Watch(pid)),
                    )
                )
                seconds = server.listened - began
                server.ask_all([server.prompt(2048 - NEW) for _ in range(4)], NEW)
                status = Path(f"/proc/{watch[0].pid}/status").read_text()
                watch[0].ended.set()
            peak = next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line)
            figures = {"listens after, s": round(seconds, 1), "format": server.dtype}
            figures |= {"peak, MB": peak // 1024, "with children, MB": watch[0].most // 2**20}
            print(json.dumps({"case": f"{start} start", **figures}))


def word_ids() -> list[int]:
    import bpe
    from serve import settings
    from serve.models import catalogue, download

    path = download.find_path(catalogue.load().models[MODEL], settings.data_folder())
    if path is None:
        raise SystemExit(f"this needs a model: run `pellucid pull {MODEL}` first")
    encoding = bpe.load(path).encoding
    return sorted(
        set(encoding.encode_ordinary(Path(__file__).with_name("passage.txt").read_text()))
    )


def check(server: Server) -> None:
    """Exit with an error if a request has another answer alone than among eight requests."""
    prompts = [server.prompt(PROMPT) for _ in range(8)]
    together, _ = server.ask_all(prompts, NEW)
    for prompt, answer in zip(prompts, together, strict=True):
        if server.ask(prompt, NEW).text != answer.text:
            raise SystemExit(
                f"an answer differs with and without concurrent requests: {answer.text!r}"
            )


def measure(server: Server, before: Server | None, rounds: int, progress: Console) -> dict:
    results: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        results.setdefault(name, []).append(value)

    for number in range(rounds):
        progress.print(f"round {number + 1} of {rounds}")
        for target in (server, before)[:: 1 if number % 2 else -1]:  # alternate the order
            if target is not None:
                answer = target.ask(target.prompt(PROMPT), NEW)
                note("stream, tok/s" if target is server else "stream before, tok/s", answer.rate)
                if target is server:
                    note("one, tok/s", NEW / answer.seconds)
        if before is not None:
            note(
                "stream / before",
                results["stream, tok/s"][-1] / results["stream before, tok/s"][-1],
            )
        _, seconds = server.ask_all([server.prompt(PROMPT) for _ in range(8)], NEW)
        note("eight, tok/s", 8 * NEW / seconds)
        note("eight / one", results["eight, tok/s"][-1] / results["one, tok/s"][-1])

        note("short alone, s", server.ask(server.prompt(SHORT)).first)
        with ThreadPoolExecutor() as pool:
            long = pool.submit(server.ask, server.prompt(LONG))
            time.sleep(HEAD_START)
            note("short behind 1,500, s", server.ask(server.prompt(SHORT)).first)
            if long.done():
                raise SystemExit("the long prefill ended before the short request was sent")
            note("the 1,500 itself, s", long.result().first)

        shared = server.prompt(SHARED)
        note("prefix unknown, s", server.ask(shared + server.prompt(OWN)).first)
        note("prefix known, s", server.ask(shared + server.prompt(OWN)).first)
        note("unknown / known", results["prefix unknown, s"][-1] / results["prefix known, s"][-1])
    return results


@contextmanager
def unpacked(revision: str) -> Iterator[Path]:
    """Yield a folder with the files of another revision."""
    command = ["git", "archive", "--format=tar", revision]
    archive = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
        yield Path(folder)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--before", metavar="REVISION", help="compare one stream with that of REVISION"
    )
    parser.add_argument("--memory", action="store_true", help="measure memory only")
    options = parser.parse_args()
    if options.memory:
        return measure_memory(options.dtype)

    progress = Console(stderr=True)
    with ExitStack() as stack:
        server = stack.enter_context(serving("serve", ROOT, options.dtype))
        before = None
        if options.before:
            folder = stack.enter_context(unpacked(options.before))
            before = stack.enter_context(serving("before", folder, server.dtype))
            before.ask(before.prompt(PROMPT), NEW)
        check(server)
        results = measure(server, before, options.rounds, progress)

    out = Console(width=100, highlight=False)
    out.print(f"{processor()}, {os.cpu_count()} cores; {MODEL} in {server.dtype}, over HTTP")
    out.print(f"{options.rounds} rounds; answers did not depend on concurrent requests\n")
    table = Table("", "median", "min", "max", box=None)
    for name, values in results.items():
        figures = (statistics.median(values), min(values), max(values))
        table.add_row(name, *(f"{value:.3g}" for value in figures))
    out.print(table, "")
    for name, values in results.items():
        print(json.dumps({"case": name, "format": server.dtype, "values": values}))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
