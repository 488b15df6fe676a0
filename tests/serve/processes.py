"""Pellucid as users run it: in processes, with settings that tests choose."""

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
TIMEOUT = 300  # seconds for an answer: machines that run tests are busy


def environment(**variables: str) -> dict[str, str]:
    """Ours, without what the user has set for Pellucid, pip or the terminal."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PELLUCID_", "PIP_", "FORCE_COLOR"))
    }
    shown = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    return {**ours, "PYTHONPATH": str(ROOT), **shown, **variables}


@dataclass
class Server:
    """A server in a process of its own.

    Attributes:
        first: the line that it has printed.
        errors: lines of stderr so far; all of them, once it has ended.
    """

    ready_line: dict[str, Any]
    stderr_lines: list[str]

    @property
    def url(self) -> str:
        return self.ready_line["url"]


@contextmanager
def serving(*arguments: str, **variables: str) -> Iterator[Server]:
    """`pellucid serve` on a free port, stopped in order at the end.

    Args:
        variables: of the environment.
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
    """What `pellucid` prints, which succeeds.

    Args:
        variables: of the environment.
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
    """Wait for a condition."""
    end = time.monotonic() + 2 * TIMEOUT
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
