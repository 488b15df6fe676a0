"""Benchmark training a decoder: speed and memory, compared with transformers and PEFT on torch.

    python tests/bench/bench_finetune.py [--methods lora full] [--steps 20] [--batch 4x256]

SmolLM2-135M-Instruct is trained: all weights, or a LoRA adapter of rank 16 on every linear layer.
The contenders (Pellucid and torch, each in float32 and bfloat16) use the same initial weights,
batches and steps: cross-entropy of the next token, gradients clipped to norm 1, AdamW. If
the losses of Pellucid and of torch in float32 differ by more than 1e-3 at any step, the exit status
is 1.

Each contender is a separate process (this script with --worker), which sleeps while another one
computes. The contenders alternate after every step, so that a slow phase of the machine slows all
of them. Speeds are medians over steps; ratios are taken within a step, and their median is
reported. The minimum CPU time of a step is reported too, for machines that are never idle. The peer
is torch as a Trainer runs it: eager, with fused AdamW, in float32 and in bfloat16 by autocast.
Memory is the peak resident memory from before the first step, with compilation; it includes
libraries and weights, but not the peak of loading.

Left out: torch.compile, several machines, packing (the rows are full).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
MODEL = "smollm2-135m-instruct"
RANK, ALPHA = 16, 32
RATES = {"lora": 2e-4, "full": 2e-5}
CONTENDERS = ("pellucid float32", "torch float32", "pellucid bfloat16", "torch bfloat16")
TOLERANCE = 1e-3

Step = Callable[[np.ndarray], float]  # ids [B, T] -> the loss before the update


def ours(path: Path, method: str, format: str, adapter: Path) -> Step:
    import jax

    from training import TrainConfig, state
    from training.recipes.decoder import DecoderTask, LoraTask, cast_params
    from training.step import make_train_step
    from transformer import checkpoint, lora

    params, cfg, _ = checkpoint.load(path, dtype="float32")
    config = TrainConfig(steps=1000, learning_rate=RATES[method], schedule="constant")
    if method == "lora":
        task = LoraTask(cfg=cfg, rank=RANK, alpha=ALPHA, dtype=format)
        start = lora.load(adapter, cfg)
        object.__setattr__(task, "init", lambda key: jax.tree.map(jax.numpy.copy, start))
        frozen = cast_params(params, format)
    else:
        task, frozen = DecoderTask(cfg=cfg, init_params=params, dtype=format), None
    train_state = state.init(task, config)
    if method == "full":
        object.__setattr__(task, "start", None)
    del params
    take_step = make_train_step(task, config)
    masks: dict = {}

    def step(ids: np.ndarray) -> float:
        nonlocal train_state
        if not masks:
            masks.update(segments=np.ones_like(ids), weights=np.ones(ids.shape, np.float32))
        train_state, sums = take_step(train_state, frozen, {"ids": ids, **masks})
        return float(sums["loss"]) / float(sums["weight"])

    return step


def theirs(path: Path, method: str, format: str, adapter: Path) -> Step:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    if method == "lora":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATES[method], weight_decay=0.0, fused=True)

    def step(ids: np.ndarray) -> float:
        batch = torch.from_numpy(ids).long()
        with torch.autocast("cpu", torch.bfloat16, enabled=format == "bfloat16"):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def batches(path: Path, batch: int, length: int) -> Iterator[np.ndarray]:
    """Yield batches of token ids [B, T] from the documentation of Pellucid, with a fixed seed."""
    import bpe

    text = "\n".join(
        (ROOT / name).read_text("utf-8") for name in ("README.md", "ARCHITECTURE.md", "NOTICE")
    )
    ids = np.array(bpe.load(path).encoding.encode_ordinary(text), np.int32)
    rng = np.random.default_rng(0)
    while True:
        starts = rng.integers(0, len(ids) - length, batch)
        yield np.stack([ids[start : start + length] for start in starts])


def worker(args: argparse.Namespace) -> None:
    """Answer each line of token ids with loss and seconds, an empty line with peak memory."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not reach stdout
    package, format = args.worker.split()
    load = ours if package == "pellucid" else theirs
    step = load(args.model, args.methods[0], format, args.adapter)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        if not line.strip():
            break
        ids = np.array(json.loads(line), np.int32)
        started, cpu_seconds = time.perf_counter(), time.process_time()
        loss = step(ids)
        answer = {"loss": loss, "seconds": time.perf_counter() - started}
        answer["cpu_seconds"] = time.process_time() - cpu_seconds
        print(json.dumps(answer), file=answers, flush=True)
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps(int(peak.split()[1]) * 1024), file=answers, flush=True)


def compare(args: argparse.Namespace, method: str, adapter: Path) -> dict:
    command = [sys.executable, __file__, "--model", args.model, "--methods", method,
               "--adapter", adapter]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(os.cpu_count())}
    workers = {}
    for name in args.contenders:
        workers[name] = subprocess.Popen(
            [*map(str, command), "--worker", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert _answer(workers[name]) == "ready"
    batch, length = map(int, args.batch.split("x"))
    losses: dict[str, list[float]] = {name: [] for name in workers}
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in workers}
    source = batches(args.model, batch, length)
    for step in range(args.steps):
        ids = json.dumps(next(source).tolist())
        for name, process in workers.items():
            time.sleep(0.2)  # lets spinning threads fall asleep
            print(ids, file=process.stdin, flush=True)
            answer = _answer(process)
            losses[name].append(answer["loss"])
            seconds[name].append(answer["seconds"])
            cpu_seconds[name].append(answer["cpu_seconds"])
            if step in (0, args.steps - 1) or args.verbose:
                print(f"{method} step {step + 1:3} {name:18} loss {answer['loss']:.5f} "
                      f"{answer['seconds']:6.2f} s", flush=True)  # fmt: skip
    peaks = {}
    for name, process in workers.items():
        print("", file=process.stdin, flush=True)
        peaks[name] = _answer(process)
        process.wait()
    timed = {name: times[1:] for name, times in seconds.items()}  # without compilation
    tokens = batch * length
    results = {
        "method": method,
        "batch": args.batch,
        "first_step": {name: round(times[0], 1) for name, times in seconds.items()},
        "tokens_per_second": {
            name: round(tokens / statistics.median(times), 1) for name, times in timed.items()
        },
        "tokens_per_second_best": {
            name: round(tokens / min(times), 1) for name, times in timed.items()
        },
        "cpu_seconds_least": {
            name: round(min(times[1:]), 2) for name, times in cpu_seconds.items()
        },
        "peak_gb": {name: round(peak / 1e9, 2) for name, peak in peaks.items()},
    }
    for contender, other in (("pellucid float32", "torch float32"),
                       ("pellucid bfloat16", "torch float32"),
                       ("pellucid bfloat16", "torch bfloat16")):  # fmt: skip
        if contender in timed and other in timed:
            rates = [b / a for a, b in zip(timed[contender], timed[other], strict=True)]
            results.setdefault("ratios", {})[f"{contender} / {other}"] = round(
                statistics.median(rates), 3
            )
            difference = max(
                abs(a - b) for a, b in zip(losses[contender], losses[other], strict=True)
            )
            results.setdefault("losses_apart", {})[f"{contender} / {other}"] = round(difference, 6)
    return results


def _answer(process: subprocess.Popen):
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the process of a contender ended with status {process.wait()}")
    return json.loads(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a GGUF file; by default the pulled SmolLM2")
    parser.add_argument("--methods", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", default="4x256", help="rows x tokens per row, such as 4x256")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--adapter", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return 0
    if args.model is None:
        from serve import settings
        from serve.models import catalogue, download

        args.model = download.find_path(catalogue.load().models[MODEL], settings.data_folder())
    if args.model is None:
        raise SystemExit(f"this needs a model: run `pellucid pull {MODEL}` first")
    status = 0
    for method in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            _write_adapter(args.model, Path(folder))
            results = compare(args, method, Path(folder))
        for name, speed in results["tokens_per_second"].items():
            print(f"{method} {name:18} {speed:7.1f} tokens/s  {results['peak_gb'][name]:5.2f} GB  "
                  f"first step {results['first_step'][name]:5.1f} s")  # fmt: skip
        for name, ratio in results.get("ratios", {}).items():
            difference = results["losses_apart"][name]
            print(f"{method} {name:36} {ratio:.2f}  losses differ by at most {difference:.6f}")
        if results.get("losses_apart", {}).get("pellucid float32 / torch float32", 0) > TOLERANCE:
            print(f"{method}: the losses differ by more than {TOLERANCE}")
            status = 1
        print(json.dumps(results), flush=True)
    return status


def _write_adapter(path: Path, folder: Path) -> None:
    """Write the initial adapter in a separate process, to keep JAX out of this one."""
    code = (
        "import sys, jax; from pathlib import Path; from transformer import checkpoint, lora\n"
        "cfg = checkpoint.read_config(Path(sys.argv[1]))\n"
        f"adapter = lora.init(jax.random.key(0), cfg, rank={RANK}, alpha={ALPHA})\n"
        "lora.save(Path(sys.argv[2]), adapter, cfg)"
    )
    subprocess.run([sys.executable, "-c", code, path, folder], check=True, cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
