"""The command `pellucid inspect`: its output and plots equal those of the library."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tests.naming import names
from tests.serve import tiny
from transformer import checkpoint, interpret, plots

pytestmark = pytest.mark.heavy

ROOT = str(Path(__file__).parent.parent.parent)
TEXT = "a bad $cab"
IDS = list(TEXT.encode())  # the tiny model's tokens are bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("tiny"))


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve", "inspect", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env=os.environ | {"PELLUCID_HOME": str(cwd / "home"), "PYTHONPATH": ROOT},
    )


def test_inspect_plots_and_numbers_equal_those_of_the_library(folder, tmp_path):
    done = run(TEXT, "-m", f"tiny={folder}", "--layer", "1", "--heads", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)
    names = ["attention-1", "lens", "alternatives", "heads"]
    assert output["model"] == "tiny"
    assert output["pictures"] == [f"inspect/{name}.png" for name in names]

    params, cfg, _ = checkpoint.load(folder)
    others = interpret.alternatives(params, cfg, IDS)
    assert [row["id"] for row in output["tokens"]] == IDS[1:]
    assert [row["text"] for row in output["tokens"]] == list(TEXT[1:])
    assert [row["rank"] for row in output["tokens"]] == others.rank.tolist()
    for name, expected in (
        ("probability", np.exp(others.token_logprobs)),
        ("entropy", others.entropy),
    ):
        np.testing.assert_allclose([row[name] for row in output["tokens"]], expected, rtol=1e-4)

    maps, effects = interpret.attention(params, cfg, IDS), interpret.head_effects(params, cfg, IDS)
    plots.attention(np.asarray(maps), list(TEXT), 1, tmp_path / "expected" / "attention-1.png")
    plots.head_effects(np.asarray(effects), tmp_path / "expected" / "heads.png")
    for name in names:
        image = imread(tmp_path / "inspect" / f"{name}.png")
        assert image.std() > 0.05
        if (expected := tmp_path / "expected" / f"{name}.png").exists():
            np.testing.assert_allclose(image, imread(expected), atol=0.02)


def test_inspect_wrong_usage_exits_with_2_and_creates_no_folder(folder, tmp_path):
    for arguments, facts in (
        (["a"], ["1 tokens", 2, 48]),
        (["a" * 49], ["49 tokens", 2, 48]),
        (["ab", "--layer", "2"], ["layer", 0, 1, 2]),
    ):
        done = run(*arguments, "-m", f"tiny={folder}", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert names(done.stderr, *facts) and "Traceback" not in done.stderr
    assert not (tmp_path / "inspect").exists()
