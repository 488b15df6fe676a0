"""Metrics of a run: records, the plot of the loss, the progress bar, and the peak FLOP/s."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.naming import names, naming
from training import TrainConfig, bench, loss_plot, metrics, train

ROOT = Path(__file__).parent.parent.parent
SUMS = {"loss": 6.0, "weight": 4.0, "correct": 3.0, "tokens": 10, "grad_norm": 2.0, "lr": 0.5}


def test_step_record_has_all_metrics():
    config = TrainConfig(steps=9, learning_rate=1.0, steps_per_epoch=4)
    line = metrics.step_record(3, SUMS | {"squares": 8.0}, 2.0, config, 100.0, 5000.0)
    assert line.pop("time") > 1.7e9
    assert line == {
        "step": 3, "epoch": 0.75, "loss": 1.5, "accuracy": 0.75, "squares": 2.0, "lr": 0.5,
        "grad_norm": 2.0, "tokens": 10, "tokens_per_second": 5.0, "mfu": 0.1, "seconds": 2.0,
    }  # fmt: skip


def test_step_record_leaves_out_metrics_that_do_not_apply():
    sums = {name: SUMS[name] for name in ("loss", "weight", "grad_norm", "lr")}
    line = metrics.step_record(3, sums, 2.0, TrainConfig(steps=9, learning_rate=1.0), None, None)
    assert line.keys() == {
        "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds", "time",
    }  # fmt: skip
    assert line["tokens"] == 4


def test_log_removes_lines_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "valid_loss": 1}\n{"step": 3}\n{"ste')
    assert len(metrics.read(path)) == 4  # the incomplete line is left out
    log = metrics.Log(path, 2)
    log.write({"step": 3, "loss": 0.5})
    assert metrics.read(path)[2:] == [{"step": 2, "valid_loss": 1}, {"step": 3, "loss": 0.5}]
    log.close()
    metrics.Log(path, 0).close()
    assert metrics.read(path) == []


def test_plot_losses_writes_a_png(tmp_path):
    path, target = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    path.write_text("")
    loss_plot.plot_losses(path, target)
    assert not target.exists()
    path.write_text("".join(f'{{"step": {n}, "loss": {1 / n}}}\n' for n in range(1, 60)))
    loss_plot.plot_losses(path, target)
    plain = target.read_bytes()
    assert plain.startswith(b"\x89PNG")
    with path.open("a") as file:
        file.write('{"step": 59, "valid_loss": 0.5}\n')
    loss_plot.plot_losses(path, target)
    assert target.read_bytes() != plain


def test_smooth_keeps_linear_values():
    line = np.arange(100.0)
    np.testing.assert_allclose(loss_plot.smooth(line)[5:-5], line[5:-5])
    np.testing.assert_allclose(loss_plot.smooth(np.ones(100)), 1)


def test_peak_flops_is_above_1_gflops():
    assert bench.peak_flops("float32") > 1e9


def test_patience_without_validation_batches_raises(tmp_path):
    config = TrainConfig(steps=9, learning_rate=1.0, validate_every=2, patience=1)
    with pytest.raises(ValueError, match=naming("patience", 1)):
        train(None, None, lambda step: {}, config, tmp_path)


@pytest.mark.heavy
def test_progress_bar_is_shown_on_a_terminal_only(tmp_path):
    """The bar on a pseudo-terminal shows steps, loss, tokens per second and MFU."""
    code = (
        "from training import metrics\n"
        "bar = metrics.ProgressBar(8, 2, is_enabled=True)\n"
        "bar.update({'step': 5, 'loss': 1.5, 'tokens_per_second': 1234.5, 'mfu': 0.42})\n"
        "bar.close()\n"
    )
    parent, child = pty.openpty()
    environment = os.environ | {"COLUMNS": "100", "TERM": "xterm"}
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stderr=child, check=True, env=environment
    )
    os.close(child)
    output = os.read(parent, 10_000).decode()
    os.close(parent)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)
    assert names(text, "5/8", "1.5000", "1,234", "42%")
    silent = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True
    )  # fmt: skip
    assert not silent.stderr
