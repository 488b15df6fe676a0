"""The command `pellucid bench`; `tests/transformer` tests its measurements."""

import json
import re
import subprocess
import sys

import pytest
from matplotlib.image import imread

from audio import bench
from tests.naming import names
from tests.serve import tiny
from transformer.bench import decoder_cases

pytestmark = pytest.mark.heavy


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_bench_cases_have_the_sizes_of_the_model(tmp_path):
    folder = tiny.model(tmp_path / "tiny")
    done = run("-m", f"tiny={folder}", "--context", "300", "--list")
    assert done.returncode == 0, done.stderr
    expected = [case.name for case in decoder_cases.bench_cases(decoder_cases.Sizes(tiny.CFG, 300))]
    audio_cases = [case.name for case in bench.cases()]
    assert done.stdout.splitlines() == expected + audio_cases
    assert "attend_cached 1x1 behind 300 float32" in expected


@pytest.mark.slow
def test_bench_with_wrong_usage_exits_with_code_and_names_the_value():
    for arguments, status, facts in (
        (["add"], 2, ["'add'", "decode"]),
        (["--impl", "norm=fused"], 2, ["norm", "reference", "sum_by_matmul", "'fused'"]),
        (["--compare", "/nowhere.jsonl"], 1, ["/nowhere.jsonl"]),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (status, "")
        assert names(done.stderr, *facts) and "Traceback" not in done.stderr


@pytest.mark.slow
def test_bench_results_are_printed_saved_compared_and_plotted(tmp_path):
    saved, plot = tmp_path / "a.jsonl", tmp_path / "roofline.png"
    case = ("norm rms 1x", "--seconds", "0")
    done = run(*case, "--json", "--save", str(saved), "--roofline", str(plot))
    assert done.returncode == 0, done.stderr
    assert done.stdout == saved.read_text()
    machine, result = map(json.loads, done.stdout.splitlines())
    assert machine["machine"]["roofs"]["gbs"] > 0
    assert result["case"] == "norm rms 1x576" and result["n"] >= 5
    assert imread(plot).std() > 0.05
    again = run(*case, "--compare", str(saved))
    assert again.returncode == 0 and re.search(r"\bx\d+\.\d\d\b", again.stdout), (
        "the output shows the ratio to the saved result"
    )
