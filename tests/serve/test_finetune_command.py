"""The command `pellucid finetune` in its own process: on this machine, and with a server."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from serve.cli.console import EventPrinter
from serve.cli.remote_backend import open_remote_backend
from serve.models import adapters
from tests.naming import names
from tests.serve import tiny

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(tiny.examples())
    return path


class Command:
    """Run `pellucid finetune` with its own data folder."""

    def __init__(self, home, folder):
        self.model = ["--model", f"tiny={folder}"]
        self.home = home
        self.environment = {
            **os.environ,
            "PELLUCID_HOME": str(home),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "COLUMNS": "200",
        }

    def __call__(self, *arguments, code=0):
        return self.pellucid("finetune", *arguments, code=code)

    def pellucid(self, *arguments, code=0):
        with self.start(*arguments) as process:
            try:
                out, errors = process.communicate(timeout=1200)  # training yields to other work
            finally:
                process.kill()  # a server would wait for its stream to end
        assert process.returncode == code, (out, errors)
        return out, errors

    def start(self, *arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "serve", *map(str, arguments)],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def finetune(tmp_path, folder):
    return Command(tmp_path / "home", folder)


def test_finetune_check_names_lines_with_problems_and_fixes_file(finetune, file, tmp_path):
    out, _ = finetune("check", file, *finetune.model)
    assert names(out.splitlines()[0], 12, "chat")
    lines = tiny.examples().splitlines()
    lines.insert(1, lines[0])
    lines[5] = lines[5].replace(b"assistant", b"assistent")
    file.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    out, errors = finetune("check", file, *finetune.model, code=6)
    (line,) = (line for line in out.splitlines() if line.startswith(f"{file}:"))
    assert names(line, f"{file}:6", "messages[1].role", "Example 6", "message 2", "'assistent'")
    assert names(errors, "--fix", "byte order mark")
    fixed = tmp_path / "fixed.jsonl"
    out, _ = finetune("check", file, *finetune.model, "--fix", fixed, code=6)
    assert "'assistent'" in out, "an ambiguous problem is not fixed"
    assert len(fixed.read_bytes().splitlines()) == 13, "duplicate examples are not removed"
    out, _ = finetune("check", file, *finetune.model, "--json", code=6)
    *problems, summary = map(json.loads, out.splitlines())
    assert [problem["code"] for problem in problems] == ["invalid_role"]
    warnings = [(warning["line"], warning["code"]) for warning in summary["warnings"]]
    assert warnings == [(2, "duplicate")]
    finetune("check", tmp_path / "none.jsonl", *finetune.model, code=3)


def test_finetune_check_of_valid_file_writes_no_file_and_needs_a_decoder(finetune, file, tmp_path):
    _, errors = finetune("check", file, *finetune.model, "--fix", tmp_path / "fixed.jsonl")
    assert errors and not (tmp_path / "fixed.jsonl").exists()
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text('{"model_type": "bert"}')
    (encoder / "model.safetensors").write_bytes(b"never read")
    for command in ("check", "create"):
        errors = finetune(command, file, "-m", f"other={encoder}", code=2)[1]
        assert names(errors, "other")


def test_event_printer_prints_one_line_per_tenth_of_the_steps(capsys):
    """Regression: the step was parsed from the message "Step 12/100", not read from the data."""
    printer = EventPrinter()
    for step in range(1, 41):
        printer.show({"message": f"{step}!", "data": {"step": step, "total_steps": 40}})
    data = {"step": 40, "total_steps": 40, "valid_loss": 1.0}
    printer.show({"message": "validated", "data": data})
    expected = ["1!", *(f"{step}!" for step in range(4, 41, 4)), "validated"]
    assert capsys.readouterr().err.split() == expected


@pytest.mark.slow
def test_local_job_turns_file_of_examples_into_model(finetune, file):
    file.write_bytes(tiny.examples() + tiny.examples(2))  # with two duplicates
    options = ["--n_epochs", 20, "--batch_size", 4, "--suffix", "mine", "--seed", 1]
    options += ["--learning-rate-multiplier", 20]
    out, errors = finetune("create", file, *finetune.model, *options, "--follow")
    name = out.strip()
    assert name.startswith("ft:tiny:pellucid:mine:") and adapters.exists(finetune.home, name)
    # These two messages are those of OpenAI's API.
    assert "Step 1/80: training loss=" in errors and "Fine-tuning job started" in errors
    assert re.search("(?i)compil", errors) and names(errors, f"pellucid chat -m {name}")
    id = errors.split(",")[0]
    listed = json.loads(finetune("list", "--json")[0])["jobs"]
    assert [(job["id"], job["status"], job["fine_tuned_model"]) for job in listed] == [
        (id, "succeeded", name)
    ]
    chat = finetune.pellucid("chat", "1?", "-m", name, "--temperature", 0, "--max-tokens", 4)
    assert chat[0] == f"{tiny.ANSWER}\n", "the fine-tuned model answers without a server"
    assert names(finetune("create", file, "-m", name, code=2)[1], name)
    serve = ("serve", "--port", 0, "-m", name)
    assert names(finetune.pellucid(*serve, code=2)[1], name)
    table = finetune("list")[0].splitlines()
    assert table[0].split() == ["JOB", "STATUS", "MODEL", "CREATED", "RESULT"] and name in table[1]
    assert names(finetune("cancel", id, code=1)[1], id, "succeeded")
    again, errors = finetune("follow", id)
    assert again.strip() == name and "Step 80/80" in errors
    assert name in finetune.pellucid("models")[0]
    assert finetune("delete", id)[0].split() == [
        name,
        *(f"{name}:ckpt-step-{step}" for step in (72, 76, 80)),
    ]
    assert adapters.folder_names(finetune.home) == frozenset()
    assert names(finetune("list")[0], name, "deleted")
    assert names(finetune("delete", id, code=3)[1], id)
    assert names(finetune("delete", "x", code=3)[1], "x")


def test_errors_of_local_jobs_exit_with_code_and_name_the_cause(
    finetune, file, tmp_path, refused_url
):
    file.write_bytes(tiny.examples(12) + b"{}\n")
    errors = finetune("create", file, *finetune.model, code=6)[1]
    assert errors.count("Example 13") == 1 and f"{file}:13: " in errors
    assert not (finetune.home / "jobs").exists() and len(finetune("list")[0].splitlines()) == 1
    errors = finetune("create", file, *finetune.model, "--suffix", "a:b", code=2)[1]
    assert names(errors, "'suffix'", "'a:b'")
    errors = finetune("create", file, *finetune.model, "--batch-size", "0", code=2)[1]
    assert names(errors, "'0'", "'auto'", 1, 256)
    finetune("create", tmp_path / "none", *finetune.model, code=3)
    finetune.pellucid("chat", "1?", "-m", "x" * 300, code=3)
    finetune("follow", "ftjob-x", code=3)
    finetune("cancel", "ftjob-x", code=3)
    finetune("list", "--host", refused_url, code=4)
    finetune("list", "--host", "ftp://x", code=2)


class Upload(BaseHTTPRequestHandler):
    """An HTTP handler that receives an upload, and returns its size in bytes as its id."""

    def do_POST(self):
        left = size = int(self.headers["Content-Length"])
        while left:
            left -= len(self.rfile.read(min(left, 2**16)))
        file = {"object": "file", "created_at": 1, "filename": "x", "purpose": "fine-tune"}
        body = json.dumps({"id": str(size), "bytes": size, "status": "processed", **file}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_upload_is_sent_in_chunks(tmp_path):
    """Given a path, the official client would read the whole file into memory."""
    large = tmp_path / "large.jsonl"
    large.write_bytes(bytes(64 * 2**20))
    with HTTPServer(("127.0.0.1", 0), Upload) as server:
        threading.Thread(target=server.handle_request).start()
        with open_remote_backend(f"127.0.0.1:{server.server_port}", "key") as backend:
            tracemalloc.start()
            sent = int(backend.upload(large, "fine-tune"))
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
    assert sent > large.stat().st_size and peak < 8 * 2**20


@pytest.mark.slow  # the job must be long enough to stop it
def test_local_job_is_stopped_resumed_and_cancelled(finetune, file):
    file.write_bytes(tiny.examples(60))
    options = [*finetune.model, "--epochs", 50, "--batch-size", 1, "--follow"]
    process = finetune.start("finetune", "create", file, *options)
    id = process.stderr.readline().split(",")[0]
    while "Step" not in (line := process.stderr.readline()):
        assert line
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert names(errors, f"`pellucid finetune follow {id}`")
    assert json.loads(finetune("list", "--json")[0])["jobs"][0]["status"] == "stopped"
    assert names(finetune("delete", id, code=1)[1], id)
    pid = int((finetune.home / "jobs" / id / "train.pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    process = finetune.start("finetune", "follow", id)
    deadline = time.monotonic() + 60
    while not (step := _step(process.stderr.readline())):
        assert time.monotonic() < deadline
    assert step >= 1
    assert finetune("cancel", id)[0] == f"{id} cancelled\n"
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and names(errors.splitlines()[-1], id)


def _step(line):
    return int(line.split()[1].split("/")[0]) if line.startswith("Step") else 0


@pytest.mark.slow
def test_remote_job_turns_file_of_examples_into_model(finetune, file, folder, tmp_path):
    with tiny.serving(tmp_path / "server", folder, api_keys=("secret",)) as address:
        finetune.environment |= {"PELLUCID_HOST": address, "PELLUCID_API_KEY": "secret"}
        out, errors = finetune("create", file, "--epochs", 1, "--batch-size", 4)
        id = out.strip()
        assert names(errors, id, address, f"finetune follow {id}")
        out, errors = finetune("follow", id)
        assert out.startswith("ft:tiny:pellucid::")
        assert "The job has successfully completed" in errors  # a message of OpenAI's API
        name = out.strip()
        assert id in finetune("list")[0]
        assert finetune("delete", name)[0].split() == [f"{name}:ckpt-step-3", name]
        assert names(finetune("list")[0], name, "deleted")
        assert names(finetune("delete", id, code=3)[1], id)
        assert names(finetune("delete", "tiny", code=1)[1], "tiny")
        file.write_bytes(tiny.examples(12) + b"{}\n")
        errors = finetune("create", file, "--follow", code=6)[1]
        assert errors.count("Example 13") == 1
        # The command prints the messages of the server, which are those of OpenAI's API.
        assert "Job has already completed" in finetune("cancel", id, code=1)[1]
        assert "No such fine-tune job: ftjob-x" in finetune("follow", "ftjob-x", code=3)[1]
        finetune.environment["PELLUCID_API_KEY"] = "wrong"
        assert "Incorrect API key provided" in finetune("list", code=1)[1]
    assert not (finetune.home / "jobs").exists(), "the local data folder has no jobs"
