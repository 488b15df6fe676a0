"""Metrics of a run: a file of JSON lines, and a progress bar on the terminal.

Each step writes an object with the keys "step", "epoch", "loss", "accuracy", "lr", "grad_norm",
"tokens", "tokens_per_second", "mfu", "seconds" and "time"; each validation "step", "valid_loss",
"valid_accuracy" and "time". Keys that do not apply to a run are left out.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from training.config import TrainConfig

_RESERVED = ("loss", "weight", "grad_norm", "lr", "tokens")


def means(sums: Mapping[str, Any]) -> dict[str, float]:
    """Return the sums of a task divided by the sum of weights; "correct" is renamed "accuracy".

    Args:
        sums: "loss", "weight" and other sums; see `Task.loss`.
    """
    weight = max(float(sums["weight"]), 1e-30)
    values = {"loss": float(sums["loss"]) / weight}
    for name, value in sums.items():
        if name not in _RESERVED:
            values["accuracy" if name == "correct" else name] = float(value) / weight
    return values


class Log:
    """The metrics file of a run, open for appending."""

    def __init__(self, path: Path, step: int):
        """Open the file, and remove the lines after `step`, because the run writes them again.

        Args:
            path: the metrics file.
            step: the step of the checkpoint that the run resumes from; 0 for a new run.
        """
        lines = [line for line in _lines(path) if line["step"] <= step] if step else []
        draft = path.with_name(f".{path.name}")
        draft.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        os.replace(draft, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record as a line and flush it, so that readers see it at once."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Sync the file to the disk and close it."""
        os.fsync(self._file.fileno())
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Return all complete lines of a metrics file; an empty list if there is no file."""
    return list(_lines(path))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield json.loads(line)


def step_record(
    step: int,
    sums: Mapping[str, Any],
    seconds: float,
    config: TrainConfig,
    flops_per_token: float | None,
    peak_flops: float | None,
) -> dict[str, Any]:
    """Return the record of a step for the metrics file.

    Args:
        step: the number of the step, from 1.
        sums: the sums that the step returned; see `step.make_train_step`.
        seconds: the duration of the step.
        config: the settings of the run.
        flops_per_token: the FLOPs of training on one token, without rematerialization; None leaves
            "mfu" out.
        peak_flops: the peak FLOP/s of this machine; None leaves "mfu" out.
    """
    tokens = int(sums.get("tokens", sums["weight"]))
    record: dict[str, Any] = {"step": step}
    if config.steps_per_epoch is not None:
        record["epoch"] = round(step / config.steps_per_epoch, 4)
    record |= means(sums)
    record |= {"lr": float(sums["lr"]), "grad_norm": float(sums["grad_norm"]), "tokens": tokens}
    record["tokens_per_second"] = round(tokens / seconds, 2)
    if flops_per_token is not None and peak_flops is not None:
        record["mfu"] = round(tokens * flops_per_token / seconds / peak_flops, 4)
    return record | {"seconds": round(seconds, 4), "time": round(time.time(), 3)}


class ProgressBar:
    """A progress bar on standard error; it does nothing if that is not a terminal."""

    def __init__(self, steps: int, done: int, *, is_enabled: bool):
        self._progress = None
        if is_enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            self._progress = Progress(
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task("compiling", total=steps, completed=done)
            self._progress.start()

    def update(self, record: Mapping[str, Any]) -> None:
        """Advance the bar to the step of a record, and show its loss and speed."""
        if self._progress is None:
            return
        text = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tok/s"
        if "mfu" in record:
            text += f"  {record['mfu']:.0%} MFU"
        self._progress.update(self._task, completed=record["step"], description=text)

    def close(self) -> None:
        """Stop the bar; its last state stays on the terminal."""
        if self._progress is not None:
            self._progress.stop()


def check_finite(record: Mapping[str, Any], names: Iterable[str] = ("loss", "grad_norm")) -> None:
    """Raise an error if values of a record are not finite.

    Args:
        record: the record of a step or of a validation.
        names: the keys of the values to check.

    Raises:
        FloatingPointError: a value is NaN or infinite.
    """
    for name in names:
        if not math.isfinite(record[name]):
            raise FloatingPointError(
                f"step {record['step']}: {name} is {record[name]}; lower learning_rate or "
                "clip_norm. The last checkpoint is of an earlier step"
            )
