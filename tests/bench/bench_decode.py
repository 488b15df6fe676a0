"""Compare the speed of generating one sequence: Pellucid, transformers with torch, llama.cpp.

    python -m tests.bench.bench_decode [--rounds 7]

Every contender (a library, or Pellucid in one dtype) gets the same 512 prompt ids and weights and
generates 64 tokens greedily. The
tokens of transformers and of Pellucid in float32 must be equal; otherwise nothing is timed and the
exit status is 1. Other dtypes round differently, so the number of equal tokens is reported. Each
round times every contender once, and ratios are computed within a round, so that a change of the
machine's speed affects all contenders.

A contender is a process of its own (this module with --worker), because the thread pools of torch
and XLA would compete. It answers JSON lines and does not compute while another is timed. It records
the time of each token:

    prefill   1 token requested: from the request to the token, 512 ids computed
    decode    64 tokens requested: from the first token to the last but one, 62 steps

`generate` starts step i + 1 before it yields token i. Where JAX computes within that call, as on a
CPU, every token but the last is one step late. The two intervals are chosen so that this cancels.

llama.cpp is compared if llama-cpp-python is installed. It multiplies with the quantized weights of
the file; the others use dequantized ones. `serve` is a server in the dtype that it chooses, called
through the official client, so its times include HTTP, JSON and detokenization.

Not measured: concurrent streams, long contexts, memory.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.pulled import pulled_path

ROOT = Path(__file__).parent.parent.parent
PASSAGE = Path(__file__).with_name("passage.txt")
MODEL = "smollm2-135m-instruct"
PROMPT_TOKENS, NEW_TOKENS = 512, 64
DECODE_STEPS = NEW_TOKENS - 2  # number of timed steps; see the docstring above
PAUSE = 0.3  # seconds between two contenders, so that spinning threads fall asleep

PEER, LLAMA, SERVE = "transformers", "llama.cpp", "serve"
DTYPES = ("float32", "bfloat16", "int8", "int4")
OURS = {f"generate {dtype}": dtype for dtype in DTYPES}
PACKAGES = ("jax", "torch", "transformers", "llama-cpp-python")


# --- contenders: each loads a model and returns a function ------------------------------------
#
# The function takes a prompt and the number of new tokens. It calls `on_token` with each id as soon
# as it is known (`serve`: with each text delta). Every call starts with an empty cache.

OnToken = Callable[[int | str], None]
Contender = Callable[[list[int], int, OnToken], None]


def load_transformers(path: Path, threads: int) -> tuple[Contender, str]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()

    # A bare loop is faster than `generate` of the library.
    @torch.inference_mode()
    def run(prompt: list[int], count: int, on_token: OnToken) -> None:
        ids, kv_cache = torch.tensor([prompt]), None
        for _ in range(count):
            step = model(ids, past_key_values=kv_cache, use_cache=True, logits_to_keep=1)
            ids, kv_cache = step.logits[:, -1].argmax(-1, keepdim=True), step.past_key_values
            on_token(ids.item())

    return run, f"torch float32, {torch.get_num_threads()} threads"


def load_pellucid(path: Path, dtype: str) -> tuple[Contender, str]:
    import jax.numpy as jnp

    from transformer import checkpoint
    from transformer.generate import generate

    params, cfg, _ = checkpoint.load(path, dtype=dtype)
    cache_dtype = jnp.float32 if dtype == "float32" else jnp.bfloat16  # as `serve` does

    def run(prompt: list[int], count: int, on_token: OnToken) -> None:
        for id in generate(params, cfg, prompt, max_new_tokens=count, cache_dtype=cache_dtype):
            on_token(id)

    return run, "JAX"


def load_llama(path: Path, threads: int) -> tuple[Contender, str]:
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(
        str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def run(prompt: list[int], count: int, on_token: OnToken) -> None:
        model.reset()
        model.eval(prompt)
        for step in range(count):
            logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
            id = int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())
            on_token(id)
            if step + 1 < count:
                model.eval([id])

    return run, f"the file's own quantisation, {threads} threads"


def load_serve(path: Path, stack: ExitStack) -> tuple[Contender, str]:
    from openai import OpenAI

    server = subprocess.Popen(
        [sys.executable, "-m", "serve", "serve", "--port", "0", "--model", f"bench={path}"]
        + ["--json"],  # one line on stdout once it listens
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    stack.callback(server.wait)
    stack.callback(server.terminate)
    line = server.stdout.readline()
    if not line:
        raise SystemExit("pellucid serve did not start; its error is printed above")
    wait_until_idle(server.pid)
    ready = json.loads(line)
    (dtype,) = ready["formats"].values()
    client = OpenAI(base_url=ready["url"] + "/v1", api_key="any", max_retries=0)

    def run(prompt: list[int], count: int, on_token: OnToken) -> None:
        chunks = client.completions.create(
            model="bench", prompt=prompt, max_tokens=count, temperature=0, stream=True
        )
        for chunk in chunks:
            if chunk.choices[0].text:
                on_token(chunk.choices[0].text)

    return run, f"{dtype}, over HTTP"


def wait_until_idle(pid: int) -> None:
    """Wait until the process of `serve` is idle: it compiles more programs after it listens."""
    import psutil

    process, before = psutil.Process(pid), float("-inf")
    while (spent := sum(process.cpu_times()[:2])) - before > 0.05:
        before = spent
        time.sleep(3)


def work(name: str, path: Path, threads: int) -> None:
    """Run a contender: answer each prompt on stdin with the generated tokens and their times."""
    answers = os.fdopen(os.dup(1), "w")  # libraries print to stderr instead
    os.dup2(2, 1)

    def answer(line: dict) -> None:
        print(json.dumps(line), file=answers, flush=True)

    with ExitStack() as stack:
        if name == PEER:
            run, setup = load_transformers(path, threads)
        elif name == LLAMA:
            run, setup = load_llama(path, threads)
        elif name == SERVE:
            run, setup = load_serve(path, stack)
        else:
            run, setup = load_pellucid(path, OURS[name])
        answer({"how": setup})
        for line in sys.stdin:
            tokens, times = [], []

            def on_token(token: int | str, tokens: list = tokens, times: list = times) -> None:
                times.append(time.perf_counter())
                tokens.append(token)

            started = time.perf_counter()
            run(*json.loads(line), on_token)
            answer({"tokens": tokens, "times": [moment - started for moment in times]})


# --- the comparison ---------------------------------------------------------------------------


@dataclass
class Worker:
    """The process of a contender, and the measurements of that contender."""

    name: str
    process: subprocess.Popen
    setup: str = ""
    agrees: str = ""
    prefill: list[float] = field(default_factory=list)  # seconds, one per round
    decode: list[float] = field(default_factory=list)  # seconds for DECODE_STEPS, one per round

    def receive(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise SystemExit(
                f"{self.name} ended with status {status}; --without {self.name} leaves it out"
                if self.name == LLAMA
                else f"{self.name} ended with status {status}; its error is printed above"
            )
        return json.loads(line)

    def run(self, prompt: list[int], count: int) -> dict:
        print(json.dumps([prompt, count]), file=self.process.stdin, flush=True)
        reply = self.receive()
        if len(reply["tokens"]) != count:
            # The passage must avoid end tokens and characters of several tokens.
            raise SystemExit(
                f"{self.name} returned {len(reply['tokens'])} tokens instead of {count}, so its "
                f"times are not comparable; change {PASSAGE.name}"
            )
        return reply


@contextmanager
def started(name: str, path: Path, threads: int) -> Iterator[Worker]:
    command = [sys.executable, "-m", "tests.bench.bench_decode", "--worker", name]
    process = subprocess.Popen(
        [*command, "--file", str(path.resolve()), "--threads", str(threads)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        worker = Worker(name, process)
        worker.setup = worker.receive()["how"]
        yield worker
    finally:
        process.stdin.close()  # ends the loop of the process
        process.wait()


def agree(workers: dict[str, Worker], prompt: list[int], decode: Callable[[list], str]) -> bool:
    """Run every contender once; return whether Pellucid and transformers agree in float32."""
    tokens = {name: worker.run(prompt, NEW_TOKENS)["tokens"] for name, worker in workers.items()}
    for name, worker in workers.items():
        if name == SERVE:  # text, not ids: compare with `generate` in the same dtype
            dtype = worker.setup.partition(",")[0]
            other = next(key for key, value in OURS.items() if value == dtype)
            text = "".join(tokens[SERVE])
            same = sum(text.startswith(decode(tokens[other][: i + 1])) for i in range(NEW_TOKENS))
        else:
            other = PEER
            same = next(
                (i for i in range(NEW_TOKENS) if tokens[name][i] != tokens[other][i]), NEW_TOKENS
            )
        worker.agrees = "" if name == other else f"first {same} ids as {other}"
        if same == NEW_TOKENS and name != other:
            worker.agrees = f"all {same} ids as {other}"
    if tokens["generate float32"] != tokens[PEER]:
        print(f"{PEER}: {tokens[PEER]}\nPellucid: {tokens['generate float32']}", file=sys.stderr)
        return False
    return True


def measure(workers: list[Worker], prompt: list[int], rounds: int, progress: Console) -> None:
    for number in range(rounds):
        progress.print(f"round {number + 1} of {rounds}")
        first = number % len(workers)  # no contender always follows the same other
        fresh = [prompt[number + 1], *prompt[1:]]  # a new prefix, which serve has not cached
        for worker in workers[first:] + workers[:first]:
            time.sleep(PAUSE)
            worker.prefill.append(worker.run(fresh, 1)["times"][0])
            times = worker.run(fresh, NEW_TOKENS)["times"]
            worker.decode.append(times[DECODE_STEPS] - times[0])


def rates(worker: Worker) -> dict:
    """Return the median tokens per second of prefill and decode."""
    return {
        "prefill": PROMPT_TOKENS / statistics.median(worker.prefill),
        "decode": DECODE_STEPS / statistics.median(worker.decode),
    }


def ratio(worker: Worker, baseline: Worker, stage: str) -> dict[str, float]:
    """Return median, min and max over rounds of the speed of `worker` divided by `baseline`'s."""
    pairs = zip(getattr(worker, stage), getattr(baseline, stage), strict=True)
    ratios = [baseline_seconds / seconds for seconds, baseline_seconds in pairs]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def report(workers: dict[str, Worker], rounds: int) -> None:
    out = Console(width=110, highlight=False)
    out.print(f"{processor()}, {os.cpu_count()} cores; Python {platform.python_version()}")
    out.print(", ".join(f"{name} {version(name)}" for name in PACKAGES))
    out.print(f"{PROMPT_TOKENS} prompt tokens, {NEW_TOKENS} generated tokens, {rounds} rounds\n")

    table = Table("contender", "in", "prefill tok/s", "decode tok/s", "agrees", box=None)
    for name, worker in workers.items():
        rate = rates(worker)
        table.add_row(
            name, worker.setup, f"{rate['prefill']:.0f}", f"{rate['decode']:.1f}", worker.agrees
        )
    out.print(table, "")

    fastest = max((workers[name] for name in OURS), key=lambda worker: rates(worker)["decode"])
    pairs = [(workers[name], workers[PEER]) for name in workers if name != PEER]
    pairs.append((workers[SERVE], fastest))
    if LLAMA in workers:
        pairs += [(workers[name], workers[LLAMA]) for name in (*OURS, SERVE)]
    table = Table(
        "ratio of speeds", "prefill median (min-max)", "decode median (min-max)", box=None
    )
    for contender, baseline in pairs:
        cells = [
            "{median:.2f} ({min:.2f}-{max:.2f})".format(**ratio(contender, baseline, stage))
            for stage in ("prefill", "decode")
        ]
        table.add_row(f"{contender.name} / {baseline.name}", *cells)
    out.print(table, "")
    if LLAMA not in workers:
        out.print("llama.cpp was not compared: left out, or llama-cpp-python is not installed\n")

    for name, worker in workers.items():
        line = {
            "contender": name,
            "how": worker.setup,
            "agrees": worker.agrees,
            "tokens_per_second": rates(worker),
            "prefill_seconds": worker.prefill,
            "decode_seconds": worker.decode,
            "ratio": {
                baseline.name: {
                    stage: ratio(worker, baseline, stage) for stage in ("prefill", "decode")
                }
                for contender, baseline in pairs
                if contender is worker
            },
        }
        print(json.dumps(line))


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def physical_cores() -> int:
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="default 7")
    parser.add_argument("--file", type=Path, help=f"a GGUF file; default {MODEL}, pulled")
    parser.add_argument(
        "--threads", type=int, help="threads of the peers; default: the number of physical cores"
    )
    parser.add_argument("--without", choices=[LLAMA], help="a peer to leave out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    path = options.file or pulled_path(MODEL)
    threads = options.threads or physical_cores()
    if options.worker:
        work(options.worker, path, threads)
        return 0
    if missing := [name for name in ("torch", "transformers") if version(name) == "not installed"]:
        raise SystemExit(f"{' and '.join(missing)} not installed: pip install -e '.[parity]'")

    import bpe

    encoding = bpe.load(path).encoding
    prompt = encoding.encode_ordinary(PASSAGE.read_text("utf-8"))[:PROMPT_TOKENS]
    if len(prompt) < PROMPT_TOKENS:
        raise SystemExit(
            f"{PASSAGE.name} must have {PROMPT_TOKENS} tokens or more, got {len(prompt)}"
        )
    names = [PEER, *OURS, SERVE]
    if importlib.util.find_spec("llama_cpp") and options.without != LLAMA:
        names.append(LLAMA)
    progress = Console(stderr=True, highlight=False)
    with ExitStack() as stack:
        workers = {}
        for name in names:
            progress.print(f"starting {name}")
            workers[name] = stack.enter_context(started(name, path, threads))
        progress.print("comparing the tokens of all contenders")
        if not agree(workers, prompt, encoding.decode):
            print(
                f"{PEER} and Pellucid in float32 generate different tokens: nothing was timed",
                file=sys.stderr,
            )
            return 1
        measure(list(workers.values()), prompt, options.rounds, progress)
    report(workers, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
