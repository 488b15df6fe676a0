"""What a run says of itself: a file with a JSON object a line, and a bar on the terminal.

A step is a line {"step", "epoch", "loss", "accuracy", "lr", "grad_norm", "tokens",
"tokens_per_second", "mfu", "seconds", "time"}; a validation is {"step", "valid_loss",
"valid_accuracy", "time"}. Keys that mean nothing in a run are left out.
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
    """Loss, accuracy and whatever else a task sums up, each for one unit of weight."""
    weight = max(float(sums["weight"]), 1e-30)
    found = {"loss": float(sums["loss"]) / weight}
    for name, value in sums.items():
        if name not in _RESERVED:
            found["accuracy" if name == "correct" else name] = float(value) / weight
    return found


class Log:
    """The file, opened where a run goes on."""

    def __init__(self, path: Path, step: int):
        """Forgets what stands in the file after a step: it will be written again.

        Args:
            step: of the checkpoint from which the run goes on; 0: it begins.
        """
        kept = [line for line in _lines(path) if line["step"] <= step] if step else []
        draft = path.with_name(f".{path.name}")
        draft.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
        os.replace(draft, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds a line, which readers see at once."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Puts the file on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics file; one that is still being written is left out."""
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
    roof: float | None,
) -> dict[str, Any]:
    """The line of a step.

    Args:
        seconds: it took.
        flops_per_token: arithmetic of the model alone, nothing that is computed twice.
        roof: the most that this machine computes in a second.
    """
    tokens = int(sums.get("tokens", sums["weight"]))
    found: dict[str, Any] = {"step": step}
    if config.steps_per_epoch is not None:
        found["epoch"] = round(step / config.steps_per_epoch, 4)
    found |= means(sums)
    found |= {"lr": float(sums["lr"]), "grad_norm": float(sums["grad_norm"]), "tokens": tokens}
    found["tokens_per_second"] = round(tokens / seconds, 2)
    if flops_per_token is not None and roof is not None:
        found["mfu"] = round(tokens * flops_per_token / seconds / roof, 4)
    return found | {"seconds": round(seconds, 4), "time": round(time.time(), 3)}


class ProgressBar:
    """A progress bar on standard error, where that is a terminal; otherwise nothing."""

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
        """Shows the line of a step."""
        if self._progress is None:
            return
        text = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tok/s"
        if "mfu" in record:
            text += f"  {record['mfu']:.0%} of the machine"
        self._progress.update(self._task, completed=record["step"], description=text)

    def close(self) -> None:
        """Leaves the last state standing."""
        if self._progress is not None:
            self._progress.stop()


def check_finite(record: Mapping[str, Any], names: Iterable[str] = ("loss", "grad_norm")) -> None:
    """Raises FloatingPointError, naming the step, for a loss or a gradient that is no number."""
    for name in names:
        if not math.isfinite(record[name]):
            raise FloatingPointError(
                f"step {record['step']}: {name} is {record[name]}; a lower learning_rate or "
                "clip_norm may help. The last checkpoint is from before"
            )
