"""Record the interfaces of Pellucid: `python -m tests.serve.surface.record [FUNCTION ...]`.

The interfaces are observed from outside: commands and HTTP requests, which the tables `COMMANDS`
and `REQUESTS` list. The files beside this one hold the recorded results, and `test_surface.py`
compares them with the current ones. After an intended change, record again and commit the diff.

Sentences are recorded only where they are documentation (help, openapi.json). Of an error the
status, type, param and code are recorded, of JSON the keys and the types of their values.
"""

import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.serve import tiny_data
from tests.serve.old_home import make_old_home as old
from tests.serve.processes import TIMEOUT, environment, run, serving

FOLDER = Path(__file__).parent
GOLDEN = FOLDER.parents[1] / "golden"
PROGRAMS = {
    "pellucid": "serve",
    **{f"python -m {name}": name for name in ("bpe", "training", "transformer", "audio")},
    "python -m diffusion": "diffusion",
}

# --- commands and requests ------------------------------------------------------------------------

# Commands by data folder, in this order: `old` is that of tests/serve/old_home, `damaged` has
# damaged files, in `corrupt` the model differs from the catalogue. JOB is a finished job.
COMMANDS = {
    "old": """
        pellucid --version
        pellucid
        pellucid dance
        pellucid models --json
        pellucid keys create eve --json
        pellucid keys create 'no spaces'
        pellucid keys list --json
        pellucid keys delete nobody
        pellucid pull --verify tiny --json
        pellucid tokenize hi
        pellucid tokenize hi --json
        pellucid chat
        pellucid chat hi --temperature hot
        pellucid chat hi --max-tokens 2 --json
        pellucid complete hi --max-tokens 2 --json
        pellucid complete LONG
        pellucid embed hi -m tiny
        pellucid embed hi -m enc=enc --dtype float32 --json
        pellucid transcribe bad.jsonl -m tiny
        pellucid image cat -m tiny
        pellucid inspect h
        pellucid inspect hi -o pictures --json
        pellucid finetune check good.jsonl --json
        pellucid finetune check bad.jsonl --json
        pellucid finetune check nowhere
        pellucid finetune create bad.jsonl
        pellucid finetune list --json
        pellucid finetune follow JOB --json
        pellucid finetune follow nope
        pellucid finetune cancel nope
        pellucid finetune delete nope
        pellucid finetune delete JOB --json
        python -m training
        python -m training check good.jsonl --model old/models/tiny/tiny.gguf --json
        python -m training check bad.jsonl --model old/models/tiny/tiny.gguf
        python -m training check nowhere --model old/models/tiny/tiny.gguf
        python -m training finetune --data bad.jsonl --model old/models/tiny/tiny.gguf --out run
    """,
    "empty": """
        pellucid models
        pellucid chat hi -m nope
        pellucid tokenize hi
        pellucid tokenize hi -m tiny=nowhere
        pellucid tokenize hi -m tiny=bad.jsonl
        pellucid transcribe nowhere
        pellucid image cat --style nope
        pellucid bench nope
        pellucid pull
        pellucid pull nope
        pellucid pull --all nope
        pellucid pull --verify whisper-base
        pellucid serve --port 70000
        pellucid serve --host 0.0.0.0
        pellucid finetune list --host http://127.0.0.1:0
        python -m bpe encode hi --json
        python -m bpe count hi --json
        python -m bpe count hi --vocab nope
        python -m bpe compare hi --vocab cl100k_base --json
        python -m bpe train
        python -m transformer lens
        python -m transformer lens nowhere 1
        python -m audio
        python -m audio --model nowhere bad.jsonl
        python -m diffusion
        python -m diffusion cat --encoder bad.jsonl --out cat.png
    """,
    "damaged": """
        pellucid models
        pellucid keys list
    """,
    "corrupt": """
        pellucid tokenize hi
        pellucid pull --verify tiny
    """,
}
SLOW_COMMANDS = {
    "new": """
        pellucid finetune create good.jsonl --n-epochs 1 --batch-size 12 --json
        pellucid bench 'norm rms 1x576' --seconds 0 --json
        pellucid transcribe sonnet.ogg --format json
        pellucid image cat --steps 2 -o cat.png --json
        python -m training finetune --data good.jsonl --model new/models/tiny/tiny.gguf \
            --epochs 1 --batch-size 12 --out run --json
        python -m training pretrain --data text.txt --layers 1 --width 64 --steps 2 \
            --vocab-size 260 --out pretrained --json
    """,
}

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
NOTHING = {"type": "predicate", "instructions": "It is empty."}
NO_JSON = {"content": "{", "headers": {"content-type": "application/json"}}
TOO_LONG = {"content": " " * (4 * 2**20 + 1), "headers": {"content-type": "application/json"}}
FORM = {"files": {"unknown": ("a.txt", "x")}}
# In addition, every route is requested with an empty body and with ids that do not exist.
REQUESTS: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/", {}),
    ("GET", "/docs", {}),
    ("GET", "/nope", {}),
    ("GET", "/v1/models", {"headers": {"host": "example.org"}}),
    ("GET", "/v1/models", {"headers": {"origin": "http://example.org"}}),
    ("POST", CHAT, {"content": "{}"}),
    ("POST", CHAT, TOO_LONG),
    ("POST", CHAT, {"json": HI | {"max_tokens": 2}}),
    ("POST", CHAT, {"json": HI | {"model": "nope"}}),
    ("POST", CHAT, {"json": HI | {"model": "enc"}}),
    ("POST", CHAT, {"json": HI | {"messages": "hi"}}),
    ("POST", CHAT, {"json": HI | {"messages": [{"role": "robot", "content": "hi"}]}}),
    ("POST", CHAT, {"json": HI | {"temperature": 3}}),
    ("POST", CHAT, {"json": HI | {"max_tokens": 600}}),
    ("POST", CHAT, {"json": HI | {"tools": [{}]}}),
    ("POST", COMPLETIONS, {"json": {"model": "tiny", "prompt": "a", "stream": True}}),
    ("POST", COMPLETIONS, {"json": {"model": "tiny", "prompt": "hi", "n": 0}}),
    ("POST", COMPLETIONS, {"json": {"model": "tiny", "prompt": "hi", "best_of": 1, "n": 2}}),
    ("POST", COMPLETIONS, {"json": {"model": "tiny", "prompt": [70000]}}),
    ("POST", "/v1/edits", {"json": {"model": "tiny", "instruction": 5}}),
    ("POST", "/v1/embeddings", {"json": {"model": "tiny", "input": "hi"}}),
    ("POST", "/v1/embeddings", {"json": {"model": "enc", "input": "hi"}}),
    ("POST", "/v1/embeddings", {"json": {"model": "enc", "input": []}}),
    ("POST", "/v1/rerank", {"json": {"model": "tiny", "query": "a", "documents": ["b"]}}),
    ("POST", "/v1/rerank", {"json": {"model": "enc", "query": "a", "documents": []}}),
    ("POST", "/v1/score", {"json": {"model": "enc", "text_1": "a"}}),
    ("POST", "/v1/decisions", {"json": {"model": "enc", "input": "a", "questions": [NOTHING]}}),
    ("POST", "/v1/decisions", {"json": {"model": "tiny", "input": "a", "questions": []}}),
    ("POST", "/v1/systemone", {"json": {"model": "tiny", "state": "a", "questions": {}}}),
    ("POST", "/v1/images/generations", {"json": {"prompt": "a cat", "model": "tiny"}}),
    ("POST", "/v1/fine_tuning/jobs", {"json": {"model": "tiny", "training_file": "nope"}}),
    ("POST", "/v1/fine_tuning/jobs", {"json": {"model": "enc", "training_file": "nope"}}),
    ("POST", "/v1/fine-tunes", {"json": {"model": "tiny", "training_file": "nope"}}),
    ("POST", "/tokenize", {"json": {"model": "tiny", "prompt": 5}}),
    ("POST", "/detokenize", {"json": {"model": "tiny", "tokens": [70000]}}),
    # Routes of the API of 2023, which openapi.json leaves out.
    ("POST", "/v1/engines/tiny/completions", {"json": {"prompt": "hi", "n": 0}}),
    ("POST", "/v1/engines/tiny/chat/completions", {"json": {}}),
    ("POST", "/v1/engines/tiny/edits", {"json": {}}),
    ("POST", "/v1/engines/tiny/embeddings", {"json": {}}),
]
# For a server with two keys, one request per minute for each, and no time to answer.
LIMITS = "--api-key one --api-key two --rate-limit 1 --answer-timeout 0.000001"
ONE, TWO = ({"headers": {"authorization": f"Bearer {key}"}} for key in ("one", "two"))
LIMITED: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/v1/models", {}),
    ("GET", "/v1/models", {"headers": {"authorization": "Bearer wrong"}}),
    ("POST", CHAT, {"json": {}} | ONE),
    ("POST", CHAT, {"json": {}} | ONE),
    ("POST", CHAT, {"json": HI} | TWO),
]

# --- running them ---------------------------------------------------------------------------------


@contextmanager
def playground(*pulled: str) -> Iterator[Path]:
    """Create a temporary folder with the data folders and files that the commands name.

    Args:
        pulled: ids of pulled models to link into the data folder `new`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        old.put(old.HOME, folder / "old", old.PLACE, str(folder / "old"))
        for home in ("new", "corrupt"):
            shutil.copytree(folder / "old" / "models", folder / home / "models")
            shutil.copy(folder / "old" / "models.toml", folder / home)
        (folder / "corrupt" / "models" / "tiny" / "tiny.gguf").write_bytes(b"GGUF, but another")
        (folder / "damaged").mkdir()
        (folder / "damaged" / "models.toml").write_text("colour = 1")
        (folder / "damaged" / "keys.json").write_text("[{")
        shutil.copytree(GOLDEN / "encoder" / "mean", folder / "enc")
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
        (folder / "enc" / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
        (folder / "good.jsonl").write_bytes(tiny_data.examples())
        (folder / "bad.jsonl").write_bytes(tiny_data.examples() + b"{}\n")
        (folder / "text.txt").write_text("the cat sat on the mat\n" * 200)
        shutil.copy(GOLDEN / "audio" / "sonnet-1.ogg", folder / "sonnet.ogg")
        if pulled:
            user = {k: v for k, v in os.environ.items() if k == "PELLUCID_HOME"}
            for path in map(Path, run("pull", *pulled, **user).splitlines()):
                (folder / "new" / "models" / path.name).symlink_to(path)
        yield folder


def variables(folder: Path, home: str) -> dict[str, str]:
    """Return the environment of a command, without settings of the user and without network."""
    return {
        "PELLUCID_HOME": str(folder / home),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
    }


# Runs several programs in one process, to import the packages once.
WORKER = """
import contextlib, io, json, runpy, sys
done = []
for module, arguments in json.loads(sys.argv[1]):
    sys.argv = [module, *arguments]
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code or 0
    done.append((code, out.getvalue()))
print(json.dumps(done))
"""


def results(lines: Sequence[str], folder: Path | None = None, **variables: str) -> list[Any]:
    """Return exit code and standard output of command lines, which run in one process."""
    job = json.loads(old.MADE.read_text("utf-8"))["done"]
    runs = []
    for line in lines:
        program = next(program for program in PROGRAMS if line.startswith(program))
        words = shlex.split(line.removeprefix(program))
        placeholders = {"JOB": job, "LONG": "word " * 200}
        runs.append([PROGRAMS[program], [placeholders.get(word, word) for word in words]])
    done = subprocess.run(
        [sys.executable, "-c", WORKER, json.dumps(runs)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        cwd=folder,
        env=environment(**variables),
        check=True,
        text=True,
        timeout=2 * TIMEOUT,
    )
    return json.loads(done.stdout)


def shapes(values: Iterable[Any]) -> str:
    """Return a line for each key of JSON values: its path and the types of its values."""
    types: dict[str, set[str]] = {}
    names = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object"}
    names |= {list: "array", type(None): "null"}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{path}.{key}" if path else key, item)
        elif isinstance(value, list):
            for item in value:
                walk(f"{path}[]", item)
        if value in ({}, []) or not isinstance(value, dict | list):
            types.setdefault(path, set()).add(names[type(value)])

    for value in values:
        walk("", value)
    return "".join(f"{path}: {' | '.join(sorted(types[path]))}\n" for path in sorted(types))


def outcomes(table: dict[str, str], folder: Path) -> str:
    """Run the commands of a table; return exit code and output shape of each as a text section."""
    sections = []
    for home, text in table.items():
        lines = [" ".join(line.split()) for line in text.strip().splitlines()]
        runs = results(lines, folder, **variables(folder, home))
        for line, (code, out) in zip(lines, runs, strict=True):
            is_json = line.endswith((" --json", " --format json"))
            shape = shapes(documents(out)) if is_json else ""
            sections.append(f"[{home}] $ {line}\nexit code {code}\n{shape}")
    return "\n".join(sections)


def documents(text: str) -> Iterator[Any]:
    """Yield the JSON values of a text with several values in sequence."""
    while text := text.lstrip():
        value, end = json.JSONDecoder().raw_decode(text)
        yield value
        text = text[end:]


def answer(client: httpx.Client, method: str, path: str, request: dict[str, Any]) -> str:
    """Send a request and return a line with the request and its response."""
    response = client.request(method, path, **request)
    arguments = re.sub(" {9,}", "...", json.dumps(request)) if request else ""
    words = [method, path, arguments, "->", str(response.status_code)]
    if not response.is_success:
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}, response.text
        words += [str(error[name] or "-") for name in ("type", "param", "code")]
    return " ".join(filter(None, words)) + "\n"


def routes(description: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield requests for every route of openapi.json, most of them invalid."""
    for path, operations in description["paths"].items():
        path = re.sub(r"{\w+}", "nope", path)
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {})
            if content:
                yield "POST", path, {"json": {}}
                yield "POST", path, NO_JSON if "application/json" in content else FORM
            else:
                yield method.upper(), path, {}
            if method == "get":
                yield "GET", path, {"params": {"limit": "x", "after": "x", "purpose": "x"}}
        yield "PATCH", path, {}


# --- surfaces -------------------------------------------------------------------------------------


def help_pages() -> dict[str, str]:
    """Return `--help` of every program and of all its commands."""
    pages: dict[str, str] = {}
    level = list(PROGRAMS)
    while level:
        below = []
        # Avoid line breaks, because those of argparse depend on the version of Python.
        runs = results([f"{line} --help" for line in level], COLUMNS="1000")
        for line, (code, text) in zip(level, runs, strict=True):
            assert code == 0, line
            # Typer lists commands under a heading, argparse indents them by four.
            _, heading, listed = text.partition("\nCommands:\n")
            indent = 2 if heading else 4
            names = re.findall(rf"^ {{{indent}}}([a-z][\w-]*)", listed or text, re.MULTILINE)
            below += [f"{line} {name}" for name in names]
            if text.startswith("usage:"):
                text = re.sub(r"\n {6,}|(?<=\S) {2,}", "  ", text)
                text = re.sub(r"(-\w) (\S+), (--[\w-]+) \2", r"\1, \3 \2", text)  # as since 3.13
            pages[line] = text
        level = below
    return {"help.txt": "\n".join(f"$ {line} --help\n{pages[line]}" for line in sorted(pages))}


def commands() -> dict[str, str]:
    """Return the exit codes of commands, and the shapes of the output of `--json`."""
    with playground() as folder:
        return {"commands.txt": outcomes(COMMANDS, folder)}


def slow_commands() -> dict[str, str]:
    """Return the same as `commands` for commands that train, measure, or need pulled models."""
    with playground("whisper-base", "all-minilm-l6-v2") as folder:
        return {"slow_commands.txt": outcomes(SLOW_COMMANDS, folder)}


def server() -> dict[str, str]:
    """Return the OpenAPI description, the errors, the metric names, and the fields of log lines."""
    with playground() as folder:
        home = variables(folder, "new")
        arguments = (*old.SMALL_CACHE, "--log-format", "json")
        with (
            serving(*arguments, "-m", "tiny", "-m", f"enc={folder / 'enc'}", **home) as process,
            httpx.Client(base_url=process.url, timeout=TIMEOUT) as client,
        ):
            description = client.get("/openapi.json").json()
            requests = [*routes(description), *REQUESTS]
            errors = [answer(client, *request) for request in requests]
            metrics = client.get("/metrics").text
        with (
            serving(*old.SMALL_CACHE, *LIMITS.split(), "-m", "tiny", **home) as limited,
            httpx.Client(base_url=limited.url, timeout=TIMEOUT) as client,
        ):
            errors.append(f"# {LIMITS}\n")
            errors += [answer(client, *request) for request in LIMITED]
    logged: dict[str, str] = {}
    for line in process.stderr_lines:
        if line.startswith("{"):
            entry = json.loads(line)
            shape = shapes([entry])
            logged.setdefault(shape, f"# {entry.get('method')} {entry.get('path')}\n{shape}")
    samples = {
        f"{sample.name}{{{','.join(sorted(sample.labels))}}}: {family.type}\n"
        for family in text_string_to_metric_families(metrics)
        if family.name.startswith("pellucid_")  # the others depend on the operating system
        for sample in family.samples
    }
    return {
        "openapi.json": json.dumps(description, indent=1, sort_keys=True) + "\n",
        "errors.txt": "".join(errors),
        "metrics.txt": "".join(sorted(samples)),
        "logs.txt": "\n".join(
            [f"# stdout of --json\n{shapes([process.ready_line])}", *logged.values()]
        ),
    }


SURFACES: tuple[Callable[[], dict[str, str]], ...] = (help_pages, server)
SLOW_SURFACES = (commands, slow_commands)


def main(names: Sequence[str]) -> None:
    """Write the recorded files of the named functions, such as "commands"; of all by default."""
    for surface in (*SURFACES, *SLOW_SURFACES):
        if names and surface.__name__ not in names:
            continue
        for name, text in surface().items():
            (FOLDER / name).write_text(text, "utf-8")
            print(FOLDER / name)


if __name__ == "__main__":
    main(sys.argv[1:])
