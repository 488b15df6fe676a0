"""The command `pellucid batch` in its own process, with a server on a real socket."""

import json
import signal
import subprocess
import sys

import pytest

from tests.naming import names
from tests.serve import scripted
from tests.serve.conftest import client as open_client
from tests.serve.processes import environment
from tests.serve.test_batches import line
from tests.waiting import wait_until

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def address():
    with scripted.serve_models(scripted.model()) as address:
        yield address


@pytest.fixture
def batch(address, tmp_path):
    """Return a function that runs the command; without a code, it returns the process."""

    def batch(*arguments, code=0):
        process = subprocess.Popen(
            [sys.executable, "-m", "serve", "batch", *map(str, arguments)],
            env=environment(PELLUCID_HOST=address),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if code is None:
            return process
        out, errors = process.communicate(timeout=100)
        assert process.returncode == code, errors
        return out, errors

    return batch


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_batch_command_writes_answers_to_stdout_and_names_failed_requests(batch, tmp_path):
    file = write(tmp_path / "in.jsonl", [line(0), line(1, max_tokens=10_000), line(2)])
    out, errors = batch(file, "--follow", code=1)
    assert [json.loads(text)["custom_id"] for text in out.splitlines()] == ["line-0", "line-2"]
    assert names(errors, "line-1", "2 of 3")


def test_batch_command_prints_id_and_later_writes_files(batch, tmp_path):
    file = write(tmp_path / "in.jsonl", [line(0), line(1, max_tokens=10_000)])
    id = batch(file)[0].strip()
    output, errors = tmp_path / "out.jsonl", tmp_path / "errors.jsonl"
    assert batch(id, "--follow", "-o", output, "--errors", errors, code=1)[0] == ""
    assert json.loads(output.read_text())["custom_id"] == "line-0"
    assert json.loads(errors.read_text())["custom_id"] == "line-1"
    assert names(batch(id)[0], id, "completed", 1, 2)


def test_interrupted_batch_command_continues_by_id(batch, address, tmp_path):
    file = write(tmp_path / "in.jsonl", [line(number, "endless") for number in range(40)])
    process = batch(file, "--follow", code=None)
    id = process.stderr.readline().partition(",")[0]
    assert process.stderr.readline()  # the first progress
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130 and names(errors, f"`pellucid batch {id} --follow`")
    batch(id, "--cancel")
    out, errors = batch(id, "--follow", code=1)
    assert names(errors, id, "cancelled", 40) and len(out.splitlines()) < 40
    with open_client(address, strict=True) as client:
        wait_until(lambda: client.batches.retrieve(id).status == "cancelled")


@pytest.mark.parametrize(
    ("text", "arguments", "code", "facts"),
    [
        (None, [], 3, ["in.jsonl"]),
        ("{}\n", [], 6, ["in.jsonl", "url"]),
        (json.dumps(line(0)) + "\n{}\n", ["--follow"], 6, [2, "custom_id"]),
        (json.dumps(line(0) | {"url": "/v1/nowhere"}), [], 1, ["/v1/nowhere", "/v1/embeddings"]),
        (json.dumps(line(0)), ["--output", "x"], 2, ["--output", "--follow"]),
        (json.dumps(line(0)), ["--cancel"], 2, ["--cancel", "in.jsonl"]),
        (json.dumps(line(0)), ["--host", "http://127.0.0.1:1"], 4, ["http://127.0.0.1:1"]),
    ],
)
def test_bad_batch_exits_with_code_and_names_the_cause(
    batch, tmp_path, text, arguments, code, facts
):
    file = tmp_path / "in.jsonl"
    if text is not None:
        file.write_text(text)
    out, errors = batch(file, *arguments, code=code)
    assert out == "" and names(errors, *facts)


def test_unknown_batch_exits_with_3(batch):
    assert names(batch("batch_x", "--follow", code=3)[1], "batch_x")
