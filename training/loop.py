"""The training loop: load a batch, take a step, log its metrics; validate and save periodically.

The result of a step depends only on its number and the state: its batch is `batches(step)`, and its
random key is derived from the seed and the number. Therefore a run that was stopped or killed at
any point resumes from its last checkpoint with bit-identical results.
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
    """The result of a call to `train`.

    Attributes:
        state: the last state.
        reason: why the call returned; "stopped early" is early stopping by `patience`.
        signal: the number of the signal that stopped the run; None if none did.
    """

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
    """Train until the last step, early stopping or a signal; resume if called again.

    After SIGTERM or SIGINT, the current step is finished, a checkpoint is saved, and the call
    returns.

    Args:
        task: the model and its loss.
        frozen: weights that the loss needs and that are not trained; None if there are none.
        batches: returns the batch of a step, from 0. It must return the same batch for the same
            step, and all batches must have the same shapes.
        config: the settings of the run.
        folder: the folder to write `metrics.jsonl`, `checkpoints/` and `loss.png` to.
        validation_batches: batches for validation. Validation uses the EMA of the weights if
            `config.average_decay` is set.
        on_step: called with the state and the metrics after each step, before the checkpoint of
            the step is saved; if the run is killed in between, the resumed run calls it again for
            that step. The arrays of the state are valid only until `on_step` returns.
        flops_per_token: the FLOPs of training on one token, for "mfu" in the metrics; None leaves
            "mfu" out.
        dtype: the dtype of the matrix products, whose peak FLOP/s "mfu" is relative to.
        progress: whether to show a progress bar if standard error is a terminal.

    Raises:
        ValueError: the folder contains a run with other settings or another model, or `patience` is
            set without validation batches.
        FloatingPointError: the loss or the gradient is NaN or infinite.
    """
    if config.patience is not None and not validation_batches:
        raise ValueError(
            f"patience needs validation_batches, got none; patience is {config.patience}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    state, best = _restore_or_init(task, config, folder)
    done = int(state.step)
    if _is_over(done, best, config):
        if not (folder / "loss.png").exists():  # the run was killed before it plotted the loss
            loss_plot.plot_losses(folder / "metrics.jsonl", folder / "loss.png")
        return Outcome(state, "finished" if done == config.steps else "stopped early")

    take_step, evaluate = make_train_step(task, config), make_eval_step(task)
    peak = bench.peak_flops(dtype) if flops_per_token is not None else None
    log = metrics.Log(folder / "metrics.jsonl", done)
    bar = metrics.ProgressBar(config.steps, done, is_enabled=progress)
    with contextlib.closing(log), contextlib.closing(bar), _catch_signals() as caught:
        batch = batches(done)
        while not _is_over(done, best, config):
            started = time.perf_counter()
            state, sums = take_step(state, frozen, batch)
            done += 1
            if done < config.steps:  # load the next batch while the device computes
                batch = batches(done)
            sums = jax.device_get(sums)
            seconds = time.perf_counter() - started
            record = metrics.step_record(done, sums, seconds, config, flops_per_token, peak)
            metrics.check_finite(record)
            log.write(record)
            bar.update(record)
            if validation_batches and _is_due(done, config.validate_every, config.steps):
                weights = state.weights if state.average is None else state.average
                valid = _evaluate(evaluate, weights, frozen, validation_batches)
                metrics.check_finite({"step": done, **valid}, ["valid_loss"])
                log.write({"step": done, **valid, "time": round(time.time(), 3)})
                best = _update_best(best, valid["valid_loss"])
            if on_step is not None:
                on_step(state, record)
            is_last = _is_over(done, best, config) or bool(caught)
            if is_last or done % config.save_every == 0:
                checkpoint.save(folder / "checkpoints", state, config, best)
            if caught:
                break
    loss_plot.plot_losses(folder / "metrics.jsonl", folder / "loss.png")
    if caught and not _is_over(done, best, config):
        return Outcome(state, "signal", caught[0])
    return Outcome(state, "finished" if done == config.steps else "stopped early")


def _restore_or_init(task: Task, config: TrainConfig, folder: Path) -> tuple[State, dict[str, Any]]:
    """Return the state to start from, and the best validation loss; see `_update_best`."""
    like = jax.eval_shape(lambda: states.init(task, config))
    restored = checkpoint.load(folder / "checkpoints", like, config)
    if restored is not None:
        return restored
    return states.init(task, config), {"best": None, "since": 0}


def _is_over(done: int, best: dict[str, Any], config: TrainConfig) -> bool:
    has_stalled = config.patience is not None and best["since"] >= config.patience
    return done >= config.steps or has_stalled


def _is_due(done: int, every: int | None, steps: int) -> bool:
    return done == steps or (every is not None and done % every == 0)


def _evaluate(evaluate, weights: Any, frozen: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """Return the weighted means over all validation batches, with names as in the metrics file."""
    total: dict[str, float] = {}
    for batch in batches:
        for name, value in jax.device_get(evaluate(weights, frozen, batch)).items():
            total[name] = total.get(name, 0.0) + float(value)
    return {f"valid_{name}": value for name, value in metrics.means(total).items()}


def _update_best(best: dict[str, Any], loss: float) -> dict[str, Any]:
    """Return {"best": the best validation loss, "since": number of validations since then}."""
    if best["best"] is None or loss < best["best"]:
        return {"best": loss, "since": 0}
    return {**best, "since": best["since"] + 1}


@contextlib.contextmanager
def _catch_signals() -> Iterator[list[int]]:
    """While the context is open, append SIGTERM and SIGINT to the yielded list; do not exit."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread can set signal handlers
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: caught.append(number)) for number in numbers]
    try:
        yield caught
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
