"""The loss curve of a run, from its metrics."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from training import metrics

_SMOOTH_FROM = 40  # steps from which on a smoother line is drawn over what was measured


def plot_losses(source: Path, target: Path) -> None:
    """Draws the losses of a metrics file into a PNG, whole or not at all.

    matplotlib is an extra (`pictures`); where it is missing, a line on standard error says so.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        print(f"no {target.name}: pip install 'pellucid[pictures]'", file=sys.stderr)
        return
    lines = metrics.read(source)
    steps, losses = _column(lines, "loss")
    checked, valid = _column(lines, "valid_loss")
    if not len(steps):
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if len(steps) < _SMOOTH_FROM:
        axes.plot(steps, losses, color="C0", label="training")
    else:
        axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(losses), color="C0", label="training, smoothed")
    if len(checked):
        axes.plot(checked, valid, "o-", color="C1", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    draft = target.with_name(f".{target.name}")
    figure.savefig(draft, dpi=120, format="png")
    draft.replace(target)


def smooth(values: Sequence[float]) -> np.ndarray:
    """The mean of each value and its neighbours, a twentieth of all on either side."""
    near = np.ones(2 * (len(values) // 20) + 1)
    count = np.convolve(np.ones(len(values)), near, mode="same")  # fewer at the ends
    return np.convolve(values, near, mode="same") / count


def _column(lines: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps that tell of something, and what they tell."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    return tuple(np.array(found).reshape(-1, 2).T)
