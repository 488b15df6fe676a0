"""A plot of the loss curve of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from training import metrics

_SMOOTH_FROM = 40  # minimum number of steps for plotting a smoothed curve, too


def plot_losses(source: Path, target: Path) -> None:
    """Plot the training and validation losses of a metrics file; write the file atomically.

    Without matplotlib (the extra `pictures`), only a message is printed to standard error.

    Args:
        source: `metrics.jsonl` of a run; if it has no steps, nothing is plotted.
        target: the PNG file to write.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        print(
            f"{target.name} is not written; plots need: pip install 'pellucid[pictures]'",
            file=sys.stderr,
        )
        return
    lines = metrics.read(source)
    steps, losses = _column(lines, "loss")
    valid_steps, valid_losses = _column(lines, "valid_loss")
    if not len(steps):
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if len(steps) < _SMOOTH_FROM:
        axes.plot(steps, losses, color="C0", label="training")
    else:
        axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(losses), color="C0", label="training, smoothed")
    if len(valid_steps):
        axes.plot(valid_steps, valid_losses, "o-", color="C1", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    draft = target.with_name(f".{target.name}")
    figure.savefig(draft, dpi=120, format="png")
    draft.replace(target)


def smooth(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the centred moving average over a window of a tenth of the values.

    Args:
        values: [N]; at both ends the windows are shorter.

    Returns:
        float64 [N].
    """
    window = np.ones(2 * (len(values) // 20) + 1)
    count = np.convolve(np.ones(len(values)), window, mode="same")
    return np.convolve(values, window, mode="same") / count


def _column(lines: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps of the records that have the field `name`, and the values of that field."""
    pairs = [(line["step"], line[name]) for line in lines if name in line]
    steps, values = np.array(pairs).reshape(-1, 2).T
    return steps, values
