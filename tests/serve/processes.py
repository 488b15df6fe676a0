"""Helpers that run Pellucid in its own process, with a controlled environment."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TIMEOUT = 300  # seconds for an answer, enough for a busy machine


def environment(**variables: str) -> dict[str, str]:
    """Return the environment without the user's settings of Pellucid, pip and the terminal."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PELLUCID_", "PIP_", "FORCE_COLOR"))
    }
    terminal = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    return {**inherited, "PYTHONPATH": str(ROOT), **terminal, **variables}


@dataclass
class Server:
    """A running `pellucid serve` process.

    Attributes:
        ready_line: the JSON line that the server prints when it is ready.
        stderr_lines: the lines of stderr so far; all of them after the server has ended.
    """

    ready_line: dict[str, Any]
    stderr_lines: list[str]

    @property
    def url(self) -> str:
        return self.ready_line["url"]


@contextmanager
def serving(*arguments: str, **variables: str) -> Iterator[Server]:
    """Run `pellucid serve` on a free port; stop it with SIGTERM at the end.

    Args:
        arguments: more arguments of the command.
        variables: environment variables.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "serve", "serve", "--port", "0", "--json", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(**variables),
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    errors: list[str] = []
    reader = threading.Thread(target=errors.extend, args=(process.stderr,))
    reader.start()
    try:
        line = process.stdout.readline()
        assert line, errors
        yield Server(json.loads(line), errors)
    finally:
        process.terminate()
        process.wait(TIMEOUT)
        reader.join()
        process.stdout.close()
        process.stderr.close()
    assert process.returncode == 0, errors


def run(*arguments: str, **variables: str) -> str:
    """Run a `pellucid` command that must succeed, and return its stdout.

    Args:
        arguments: the arguments of the command.
        variables: environment variables.
    """
    done = subprocess.run(
        [sys.executable, "-m", "serve", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(**variables),
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true; fail after twice `TIMEOUT`."""
    end = time.monotonic() + 2 * TIMEOUT
    while not condition():
        assert time.monotonic() < end, "the condition is still false"
        time.sleep(0.1)
