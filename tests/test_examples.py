"""The scripts in examples/, each in its own process, as a user starts them."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTED_ELSEWHERE = {"batch"}  # tests/transformer/engine/test_batch.py


def run(name: str, *arguments: object) -> str:
    """Return the output of examples/NAME.py."""
    return subprocess.run(
        [sys.executable, ROOT / f"examples/{name}.py", *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stdout


def test_every_example_has_a_test():
    tested = {
        node.args[0].value
        for node in ast.walk(ast.parse(Path(__file__).read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "run"
    }
    assert tested | TESTED_ELSEWHERE == {path.stem for path in (ROOT / "examples").glob("*.py")}


def test_tokens_example_prints_ids_that_decode_to_the_text():
    lines = [line.split(maxsplit=1) for line in run("tokens", "a hamburger 🍔").splitlines()]
    text = b"".join(ast.literal_eval(token) for _, token in lines).decode()
    assert text == "a hamburger 🍔" and all(id.isdigit() for id, _ in lines)


@pytest.mark.heavy
def test_train_example_finds_the_slope(tmp_path):
    assert run("train", tmp_path) == "w = 3.00\n"


@pytest.mark.heavy
def test_client_example_prints_the_streamed_answer():
    from tests.serve import scripted

    with scripted.serve_models(scripted.model()) as address:
        assert run("client", address, "Say hello") == f"{scripted.HELLO}\n"


@pytest.mark.slow
def test_generate_example_continues_the_text(model_file):
    assert run("generate", model_file("smollm2-135m-instruct"), "1, 2, 3, 4,").startswith(" 5, 6")


@pytest.mark.slow
def test_transcribe_example_prints_times_and_words(model_file):
    recording = ROOT / "tests/golden/audio/austen-0870.flac"
    printed = run("transcribe", model_file("whisper-tiny.en"), recording)
    assert re.match(r"\d+\.\d-\d+\.\d s: And Mr\. John Dashwood had", printed)


@pytest.mark.slow
def test_image_example_writes_a_png(model_file, tmp_path):
    from PIL import Image

    run("image", model_file("all-minilm-l6-v2"), "a red apple", tmp_path / "apple.png")
    with Image.open(tmp_path / "apple.png") as image:
        red, _, blue = image.convert("RGB").resize((1, 1)).getpixel((0, 0))
        assert image.size == (64, 64) and red > blue
