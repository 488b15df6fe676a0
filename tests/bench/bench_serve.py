"""What a server makes of several requests: throughput, waiting, and prompts that begin alike.

    python tests/bench/bench_serve.py [--rounds 5] [--dtype auto] [--before REVISION]
    python tests/bench/bench_serve.py --memory

One `pellucid serve` in a process of its own is asked over HTTP, streamed, greedily. Rounds repeat
all measurements one after the other, so that a machine that slows down slows all of them, and the
ratios are taken within a round. No prompt is ever asked twice unless that is the point, and all are
cut from one text, so that none is easier than another.

    one     200 prompt tokens, 100 new ones, nobody else: tokens a second over all of it
    stream  the same request: tokens a second from the first to the last. With --before also on the
            server of another revision of this repository, unpacked beside, in turn with this one
    eight   eight different ones of those at once, until the last is through
    short   a prompt of 20 tokens alone, and one asked when a prompt of 1,500 has been reading for
            0.2 s: seconds to the first token of the short one
    prefix  a prompt of 1,000 tokens with 30 more behind it, then the same with 30 others: seconds
            to the first token of each

The text of a request must be the same alone, among eight, and with its prefix known: it is compared
before anything is timed.

`--memory` is a run of its own: a server in a data folder where nothing was measured or compiled
yet, then again in the same folder; each answers four conversations of 2,048 tokens at once. Printed
are the seconds until it listens, and the most memory that its process held, and that it held
together with those it had started.

Left out: several models at once, the sampler's settings, long contexts.
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
    """What came, and when, in seconds after it was asked for."""

    text: str
    times: tuple[float, ...]  # of the pieces of text
    seconds: float

    @property
    def first(self) -> float:
        return self.times[0]

    @property
    def rate(self) -> float:
        """Tokens a second, from the first to the last."""
        return (NEW - 1) / (self.seconds - self.first)


@dataclass
class Server:
    """A running server and a client for it."""

    name: str
    address: str
    format: str
    client: httpx.Client
    ids: list[int]  # ids that stand for common words, to make prompts of
    listened: float  # when it did, on the clock of time.perf_counter
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def prompt(self, length: int) -> list[int]:
        """A prompt that was never asked before."""
        return self.random.choices(self.ids, k=length)

    def ask(self, prompt: list[int], count: int = 1) -> Answer:
        # No end before `count`: the ids that end a text are forbidden.
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
        """Asks at once. Gives the answers and the seconds until the last of them."""
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
        said = json.loads(line)
        wait_until_idle(process.pid)
        formats = said.get("formats", {})
        with httpx.Client(timeout=120, limits=httpx.Limits(max_connections=32)) as client:
            url, format = said["url"], formats.get(MODEL, dtype)
            yield Server(name, url, format, client, word_ids(), listened)
    finally:
        process.terminate()
        process.wait()


def wait_until_idle(pid: int) -> None:
    """Waits until a server rests: at first it compiles ahead."""
    import psutil

    process, before = psutil.Process(pid), float("-inf")
    while (spent := sum(process.cpu_times()[:2])) - before > 0.05:
        before = spent
        time.sleep(3.5)


def measure_memory(dtype: str) -> None:
    """Two starts in one fresh data folder, in which only the models are found."""
    import psutil

    from serve import settings

    class Watch(threading.Thread):
        """Looks ten times a second at how much a process and its children hold together."""

        def __init__(self, pid: int) -> None:
            super().__init__(daemon=True)
            self.pid, self.most, self.ended = pid, 0, threading.Event()
            self.start()

        def run(self) -> None:
            while not self.ended.wait(0.1):
                with suppress(psutil.Error):
                    own = psutil.Process(self.pid)
                    held = [p.memory_info().rss for p in [own, *own.children(recursive=True)]]
                    self.most = max(self.most, sum(held))

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
            figures = {"listens after, s": round(seconds, 1), "format": server.format}
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
    """Alone, among eight, and with its prefix known, a request has the same answer."""
    prompts = [server.prompt(PROMPT) for _ in range(8)]
    together, _ = server.ask_all(prompts, NEW)
    for prompt, answer in zip(prompts, together, strict=True):
        if server.ask(prompt, NEW).text != answer.text:
            raise SystemExit(f"an answer changed with company: {answer.text!r}")


def measure(server: Server, before: Server | None, rounds: int, progress: Console) -> dict:
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for number in range(rounds):
        progress.print(f"round {number + 1} of {rounds}")
        for each in (server, before)[:: 1 if number % 2 else -1]:  # nobody is always second
            if each is not None:
                answer = each.ask(each.prompt(PROMPT), NEW)
                note("stream, tok/s" if each is server else "stream before, tok/s", answer.rate)
                if each is server:
                    note("one, tok/s", NEW / answer.seconds)
        if before is not None:
            note("stream / before", found["stream, tok/s"][-1] / found["stream before, tok/s"][-1])
        _, seconds = server.ask_all([server.prompt(PROMPT) for _ in range(8)], NEW)
        note("eight, tok/s", 8 * NEW / seconds)
        note("eight / one", found["eight, tok/s"][-1] / found["one, tok/s"][-1])

        note("short alone, s", server.ask(server.prompt(SHORT)).first)
        with ThreadPoolExecutor() as pool:
            long = pool.submit(server.ask, server.prompt(LONG))
            time.sleep(HEAD_START)
            note("short behind 1,500, s", server.ask(server.prompt(SHORT)).first)
            if long.done():
                raise SystemExit("the long prompt was read before the short one was asked")
            note("the 1,500 itself, s", long.result().first)

        shared = server.prompt(SHARED)
        note("prefix unknown, s", server.ask(shared + server.prompt(OWN)).first)
        note("prefix known, s", server.ask(shared + server.prompt(OWN)).first)
        note("unknown / known", found["prefix unknown, s"][-1] / found["prefix known, s"][-1])
    return found


@contextmanager
def unpacked(revision: str) -> Iterator[Path]:
    """A folder with the files of another revision."""
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
    parser.add_argument("--before", metavar="REVISION", help="compare one stream with this one's")
    parser.add_argument("--memory", action="store_true", help="measure memory, and nothing else")
    options = parser.parse_args()
    if options.memory:
        return measure_memory(options.dtype)

    progress = Console(stderr=True)
    with ExitStack() as stack:
        server = stack.enter_context(serving("serve", ROOT, options.dtype))
        before = None
        if options.before:
            folder = stack.enter_context(unpacked(options.before))
            before = stack.enter_context(serving("before", folder, server.format))
            before.ask(before.prompt(PROMPT), NEW)
        check(server)
        found = measure(server, before, options.rounds, progress)

    out = Console(width=100, highlight=False)
    out.print(f"{processor()}, {os.cpu_count()} cores; {MODEL} in {server.format}, over HTTP")
    out.print(f"{options.rounds} rounds; every answer was the same alone and among eight\n")
    table = Table("", "median", "min", "max", box=None)
    for name, values in found.items():
        figures = (statistics.median(values), min(values), max(values))
        table.add_row(name, *(f"{value:.3g}" for value in figures))
    out.print(table, "")
    for name, values in found.items():
        print(json.dumps({"case": name, "format": server.format, "values": values}))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
