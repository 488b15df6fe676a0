"""The loss curve of a run, from its metrics."""

from __future__ import annotations

import sys
from pathlib import Path

from training import metrics


def draw(source: Path, target: Path) -> None:
    """Draws the losses of a metrics file into a PNG.

    matplotlib is an extra (`pictures`); where it is missing, a line on standard error says so.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {target.name}: pip install 'pellucid[pictures]'", file=sys.stderr)
        return
    lines = metrics.read(source)
    steps = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "valid_loss" in line]
    if not steps:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([x["step"] for x in steps], [x["loss"] for x in steps], label="training")
    if checks:
        places, losses = [x["step"] for x in checks], [x["valid_loss"] for x in checks]
        axes.plot(places, losses, "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(target, dpi=120)
