"""What reaches the terminal: answers on stdout, everything else on stderr.

Colour, bars and escaping of control characters are for people: a stream that is not a terminal, or
a user who set NO_COLOR, gets none of them.
"""

import json
import os
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

DIM, BOLD = "2", "1"
# Dark text on light grounds: readable on a dark and on a light terminal.
_BACKGROUNDS = ("30;48;5;153", "30;48;5;222", "30;48;5;157", "30;48;5;217", "30;48;5;189")


def is_plain(stream: TextIO) -> bool:
    """Whether to write no colour codes to `stream`."""
    return (
        not stream.isatty() or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    )


def style(text: str, code: str, stream: TextIO) -> str:
    """`text` in an ANSI style, or as it is where colour is not wanted."""
    return text if is_plain(stream) else f"\x1b[{code}m{text}\x1b[0m"


def info(line: str) -> None:
    """A line about what is going on, for a person."""
    print(style(line, DIM, sys.stderr), file=sys.stderr, flush=True)


def error(line: str) -> None:
    """A line about what went wrong."""
    print(f"{style('error:', '1;31', sys.stderr)} {line}", file=sys.stderr, flush=True)


def write(text: str, end: str = "\n") -> None:
    """Part of the answer. On a terminal, what could steer it is shown as escapes."""
    print(escape_control(text, keep="\n\t") if sys.stdout.isatty() else text, end=end, flush=True)


def write_json(value: object) -> None:
    """The whole answer, as one JSON object on one line."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def write_result(value: object, text: str, *, json: bool) -> None:
    """The whole answer: a value as JSON, or a text in its place."""
    write_json(value) if json else write(text)


def escape_control(text: str, keep: str = "") -> str:
    """Writes control characters as escapes: what a model says must not move the cursor."""
    return "".join(
        c if c in keep or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def format_tokens(parts: Sequence[bytes]) -> str:
    """Tokens side by side: coloured on a terminal, else with a bar between them.

    A part that is only some bytes of a character is written as escapes.
    """
    shown = [escape_control(part.decode(errors="backslashreplace")) for part in parts]
    if is_plain(sys.stdout):
        return "|".join(shown)
    grounds = (_BACKGROUNDS[i % len(_BACKGROUNDS)] for i in range(len(shown)))
    return "".join(f"\x1b[{g}m{s}\x1b[0m" for g, s in zip(grounds, shown, strict=True))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, never wrapped: a terminal may wrap, a pipe must not."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
    return "\n".join([style(lines[0], BOLD, sys.stdout), *lines[1:]])


class DownloadProgress:
    """Shows how far a download is: a bar on a terminal, else a line for every ten percent."""

    def __init__(self, id: str):
        self._id, self._bar, self._tenth = id, None, -1

    def __enter__(self) -> "DownloadProgress":
        return self

    def __call__(self, done: int, total: int) -> None:
        if not is_plain(sys.stderr):
            bar = self._bar = self._bar or _progress_bar(self._id, total)
            bar.update(bar.tasks[0].id, completed=done)
            if done == total:
                bar.stop()  # before the next line is said
        elif (tenth := done * 10 // total) > self._tenth:
            self._tenth = tenth
            info(f"pulling {self._id}: {tenth * 10} % of {total / 1e6:.0f} MB")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()


def _progress_bar(id: str, total: int) -> "Bar":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(20), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(f"pulling {id}", *columns, console=Console(stderr=True))
    bar.add_task("", total=total)
    bar.start()
    return bar
