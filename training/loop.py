"""The loop: read a batch, take a step, write a line; now and then validate and save.

Everything that decides a step is its number: the batch is `batches(step)`, keys are folded from
it, and the state is all that is carried over. So a run that was stopped, or killed, at any point
goes on from its last checkpoint to the very bits it would have reached.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from training import bench, checkpoint, loss_plot, metrics
from training import state as states
from training.config import TrainConfig
from training.state import State
from training.step import make_eval_step, make_train_step
from training.task import Batch, Task


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    state: State
    reason: Literal["finished", "stopped early", "signal"]
    signal: int | None = None


def train(
    task: Task,
    frozen: Any,
    batches: Callable[[int], Batch],
    config: TrainConfig,
    folder: Path,
    *,
    validation_batches: Sequence[Batch] = (),
    on_step: Callable[[State, dict[str, Any]], None] | None = None,
    flops_per_token: float | None = None,
    dtype: str = "float32",
    progress: bool = False,
) -> Outcome:
    """Trains until it is done, or told to stop; called again with the same, it goes on.

    Args:
        frozen: weights that the loss needs and that stay; None if there are none.
        batches: the batch of a step, from 0; the same whenever it is asked, always of one shape.
        folder: gets `metrics.jsonl`, `checkpoints/` and `loss.png`.
        validate: batches that are only looked at, with the running mean of weights if there is one.
        on_step: told of each step, after it and before it is saved: after a kill it may hear of a
            step again. The arrays of the state are valid only until it returns.
        flops_per_token: for "mfu" in the metrics, against what this machine multiplies.
        dtype: of the products that this counts.
        progress: shows a bar if standard error is a terminal.

    SIGTERM and SIGINT finish the step, save, and return.

    Raises:
        ValueError: the folder holds a run with other settings or of another model, or `patience` is
            set and there is nothing to validate with.
        FloatingPointError: the loss or the gradient is no number any more.
    """
    if config.patience is not None and not validation_batches:
        raise ValueError(f"patience is {config.patience}, and there is nothing to validate with")
    folder.mkdir(parents=True, exist_ok=True)
    state, seen = _restore_or_init(task, config, folder)
    done = int(state.step)
    if _is_over(done, seen, config):
        if not (folder / "loss.png").exists():  # killed just before it was drawn
            loss_plot.plot_losses(folder / "metrics.jsonl", folder / "loss.png")
        return Outcome(state, "finished" if done == config.steps else "stopped early")

    take_step, evaluate = make_train_step(task, config), make_eval_step(task)
    roof = bench.peak_flops(dtype) if flops_per_token is not None else None
    log = metrics.Log(folder / "metrics.jsonl", done)
    bar = metrics.ProgressBar(config.steps, done, is_enabled=progress)
    with contextlib.closing(log), contextlib.closing(bar), _catch_signals() as caught:
        batch = batches(done)
        while not _is_over(done, seen, config):
            started = time.perf_counter()
            state, sums = take_step(state, frozen, batch)
            done += 1
            if done < config.steps:  # while the device computes
                batch = batches(done)
            sums = jax.device_get(sums)
            seconds = time.perf_counter() - started
            line = metrics.step_record(done, sums, seconds, config, flops_per_token, roof)
            metrics.check_finite(line)
            log.write(line)
            bar.update(line)
            if validation_batches and _is_due(done, config.validate_every, config.steps):
                weights = state.weights if state.average is None else state.average
                found = _evaluate(evaluate, weights, frozen, validation_batches)
                metrics.check_finite({"step": done, **found}, ["valid_loss"])
                log.write({"step": done, **found, "time": round(time.time(), 3)})
                seen = _update_best(seen, found["valid_loss"])
            if on_step is not None:
                on_step(state, line)
            is_last = _is_over(done, seen, config) or bool(caught)
            if is_last or done % config.save_every == 0:
                checkpoint.save(folder / "checkpoints", state, config, seen)
            if caught:
                break
    loss_plot.plot_losses(folder / "metrics.jsonl", folder / "loss.png")
    if caught and not _is_over(done, seen, config):
        return Outcome(state, "signal", caught[0])
    return Outcome(state, "finished" if done == config.steps else "stopped early")


def _restore_or_init(task: Task, config: TrainConfig, folder: Path) -> tuple[State, dict[str, Any]]:
    """The state to go on from, and how validation went so far."""
    fresh = jax.eval_shape(lambda: states.init(task, config))
    found = checkpoint.load(folder / "checkpoints", fresh, config)
    if found is not None:
        return found
    return states.init(task, config), {"best": None, "since": 0}


def _is_over(done: int, seen: dict[str, Any], config: TrainConfig) -> bool:
    has_stalled = config.patience is not None and seen["since"] >= config.patience
    return done >= config.steps or has_stalled


def _is_due(done: int, every: int | None, steps: int) -> bool:
    return done == steps or (every is not None and done % every == 0)


def _evaluate(evaluate, weights: Any, frozen: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """Means over all batches together, not the mean of their means."""
    total: dict[str, float] = {}
    for batch in batches:
        for name, value in jax.device_get(evaluate(weights, frozen, batch)).items():
            total[name] = total.get(name, 0.0) + float(value)
    return {f"valid_{name}": value for name, value in metrics.means(total).items()}


def _update_best(seen: dict[str, Any], loss: float) -> dict[str, Any]:
    """The best loss, and how many validations there were since."""
    if seen["best"] is None or loss < seen["best"]:
        return {"best": loss, "since": 0}
    return {**seen, "since": seen["since"] + 1}


@contextlib.contextmanager
def _catch_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT are put into instead of ending the process."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # signals go to the main thread, which is somebody else's
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: caught.append(number)) for number in numbers]
    try:
        yield caught
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
