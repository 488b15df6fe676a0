"""Fenced code blocks of Markdown pages, and a session that runs them.

Languages of blocks:

    python   run in this process; blocks of one session share their variables
    console  a line that begins with "$ " is a command for bash; lines that begin with "> " continue
             it, and the lines after them are the output of the command
    text     the output of the Python block before it

In an output, "..." matches anything: any text if it is part of a line, any number of lines if it is
alone on a line. If a page shows no output, the block only has to succeed.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LANGUAGES = {"python", "console", "text"}
URL = "http://127.0.0.1:8000"  # address of the server in the pages
TIMEOUT = 1800  # seconds for a command; long, because a machine that runs tests is busy

_FENCE = re.compile(r" {0,3}(?P<marks>`{3,}|~{3,})(?P<info>[^`]*)$")


@dataclass(frozen=True)
class Block:
    """A fenced code block of a Markdown page.

    Attributes:
        page: the Markdown file.
        line: number of the first line of the text in the page, from 1.
        language: first word after the opening fence; can be empty.
        text: text between the fences, with its final newline.
    """

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        name = self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page
        return f"{name}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a console block, and the output that the page shows below it."""

    line: int
    text: str
    output: str


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a Markdown file, in order.

    Raises:
        ValueError: a fence is not closed.
    """
    found: list[Block] = []
    lines = enumerate(page.read_text("utf-8").splitlines(), 1)
    for number, line in lines:
        if not (fence := _FENCE.match(line)):
            continue
        marks, text = fence["marks"], []
        for _, line in lines:
            if re.fullmatch(rf" {{0,3}}{marks[0]}{{{len(marks)},}} *", line):
                break
            text.append(line + "\n")
        else:
            raise ValueError(f"{page}:{number}: the fence is not closed")
        language = fence["info"].split()[0] if fence["info"].strip() else ""
        found.append(Block(page, number + 1, language, "".join(text)))
    return found


def commands(block: Block) -> list[Command]:
    """Return the commands of a console block.

    Raises:
        ValueError: the block does not begin with a command.
    """
    found: list[tuple[int, list[str], list[str]]] = []
    for number, line in enumerate(block.text.splitlines(), block.line):
        if line.startswith("$ "):
            found.append((number, [line[2:]], []))
        elif not found:
            raise ValueError(f"{block}: a console block must begin with a command, `$ ...`")
        elif line.startswith("> ") and not found[-1][2]:
            found[-1][1].append(line[2:])
        else:
            found[-1][2].append(line)
    return [Command(number, "\n".join(text), "\n".join(shown)) for number, text, shown in found]


def matches(shown: str, output: str) -> bool:
    """Return whether an output equals the shown output, in which "..." matches anything.

    White space at the ends of lines is ignored.
    """
    lines = [
        r"(?:.*\n)*?" if line.strip() == "..." else ".*?".join(map(re.escape, parts)) + r"\n"
        for line in _lines(shown)
        for parts in [line.split("...")]
    ]
    return bool(re.fullmatch("".join(lines), "".join(line + "\n" for line in _lines(output))))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


class Session:
    """Runs blocks in order, as a reader would in the folder of the project.

    Args:
        folder: an empty folder to run the blocks in. Links to the files of the project, and the
            commands `pellucid` and `python` in `.venv/bin`, are added to it.
        url: address of a running server, which replaces `URL` in blocks.
        environment: environment variables of commands.
    """

    def __init__(self, folder: Path, url: str, environment: Mapping[str, str]):
        self._folder, self._url = folder, url
        self._names: dict[str, Any] = {"__name__": "__main__"}
        self._printed: str | None = None  # output of the Python block before
        binaries = folder / ".venv" / "bin"
        binaries.mkdir(parents=True)
        for name, arguments in {"pellucid": " -m serve", "python": ""}.items():
            script = binaries / name
            script.write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
            script.chmod(0o755)
        for entry in ROOT.iterdir():
            if not entry.name.startswith("."):
                (folder / entry.name).symlink_to(entry)
        path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
        self._environment = {**environment, "PATH": path}

    def run(self, blocks: Iterable[Block]) -> None:
        """Run blocks and compare their outputs.

        Raises:
            AssertionError: a block fails, its output does not match, or its language is unknown.
        """
        for block in blocks:
            assert block.language in LANGUAGES, f"{block}: unknown language {block.language!r}"
            getattr(self, f"_{block.language}")(block)

    def _python(self, block: Block) -> None:
        # Empty lines before the code, so that tracebacks have the line numbers of the page.
        code = compile("\n" * (block.line - 1) + self._here(block.text), str(block.page), "exec")
        with contextlib.chdir(self._folder), contextlib.redirect_stdout(io.StringIO()) as stdout:
            exec(code, self._names)
        self._printed = stdout.getvalue()

    def _text(self, block: Block) -> None:
        assert self._printed is not None, f"{block}: a text block must follow a Python block"
        self._compare(str(block), block.text, self._printed)
        self._printed = None

    def _console(self, block: Block) -> None:
        self._printed = None
        for command in commands(block):
            done = subprocess.run(
                ["bash", "-o", "pipefail", "-c", self._here(command.text)],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=TIMEOUT,
            )
            output, errors = done.stdout.decode(), done.stderr.decode()
            where = f"{block.page}:{command.line}: {command.text}"
            if done.returncode:  # a failing command is accepted if the page shows its output
                assert command.output, f"{where}\n{output}{errors}"
                output += errors
            self._compare(where, command.output, output)

    def _compare(self, where: str, shown: str, output: str) -> None:
        output = output.replace(self._url, URL)
        same = not shown or matches(shown, output)
        assert same, f"{where}\n--- shown\n{shown}\n--- printed\n{output}"

    def _here(self, text: str) -> str:
        return text.replace(URL, self._url)


def quick(blocks: Iterable[Block], slow_commands: str) -> Iterator[Block]:
    """Yield the blocks without console blocks that have a command matching `slow_commands`."""
    pattern = re.compile(slow_commands)
    for block in blocks:
        if block.language == "console" and any(
            pattern.search(command.text) for command in commands(block)
        ):
            continue
        yield block
