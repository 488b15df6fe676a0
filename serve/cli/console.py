"""Output of the commands: results on stdout, everything else on stderr.

On a terminal there are colours and progress bars, and control characters are escaped. In files and
pipes there are none of these. NO_COLOR or TERM=dumb turns off colours and bars.
"""

import json
import os
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

DIM, BOLD = "2", "1"
# Dark text on light backgrounds is readable in dark and in light terminals.
_BACKGROUNDS = ("30;48;5;153", "30;48;5;222", "30;48;5;157", "30;48;5;217", "30;48;5;189")


def is_plain(stream: TextIO) -> bool:
    """Return whether to write to `stream` without colours and progress bars."""
    return (
        not stream.isatty() or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    )


def style(text: str, code: str, stream: TextIO) -> str:
    """Return `text` in the ANSI style `code`, or unchanged if `stream` is plain."""
    return text if is_plain(stream) else f"\x1b[{code}m{text}\x1b[0m"


def info(line: str) -> None:
    """Print a line of progress or information to stderr."""
    print(style(line, DIM, sys.stderr), file=sys.stderr, flush=True)


def error(line: str) -> None:
    """Print an error message to stderr."""
    print(f"{style('error:', '1;31', sys.stderr)} {line}", file=sys.stderr, flush=True)


def write(text: str, end: str = "\n") -> None:
    """Print text to stdout; on a terminal, with control characters escaped."""
    print(escape_control(text, keep="\n\t") if sys.stdout.isatty() else text, end=end, flush=True)


def write_json(value: object) -> None:
    """Print a value to stdout as JSON on one line."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def write_result(value: object, text: str, *, json: bool) -> None:
    """Print the result of a command: `value` as JSON if `json`, otherwise `text`."""
    write_json(value) if json else write(text)


def escape_control(text: str, keep: str = "") -> str:
    """Replace control characters by escapes, so that the text of a model cannot move the cursor.

    Args:
        text: any text.
        keep: control characters to leave as they are.
    """
    return "".join(
        c if c in keep or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def format_tokens(parts: Sequence[bytes]) -> str:
    """Return tokens side by side: coloured on a terminal, otherwise separated by bars.

    Bytes of a token that are not whole characters are written as escapes.

    Args:
        parts: the bytes of each token.
    """
    texts = [escape_control(part.decode(errors="backslashreplace")) for part in parts]
    if is_plain(sys.stdout):
        return "|".join(texts)
    backgrounds = (_BACKGROUNDS[i % len(_BACKGROUNDS)] for i in range(len(texts)))
    return "".join(f"\x1b[{b}m{text}\x1b[0m" for b, text in zip(backgrounds, texts, strict=True))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with aligned columns; long lines are not wrapped.

    Args:
        head: the titles of the columns.
        rows: the cells of each row, as many as there are titles.
    """
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
    return "\n".join([style(lines[0], BOLD, sys.stdout), *lines[1:]])


class DownloadProgress:
    """Show the progress of a download on stderr: a bar, or a line per 10 % if not on a terminal."""

    def __init__(self, id: str):
        self._id, self._tenth = id, -1
        self._bar: Progress | None = None

    def __enter__(self) -> "DownloadProgress":
        return self

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes have arrived."""
        if not is_plain(sys.stderr):
            bar = self._bar = self._bar or _progress_bar(self._id, total)
            bar.update(bar.tasks[0].id, completed=done)
            if done == total:
                bar.stop()  # before the next line is printed
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


class EventPrinter:
    """Print events of a job to stderr.

    On a terminal the steps overwrite each other on one line. In files and pipes a line is
    printed for each validation and each tenth of the steps.
    """

    def __init__(self) -> None:
        self._is_live = not is_plain(sys.stderr)
        self._tenth, self._is_open = -1, False

    def show(self, event: dict) -> None:
        """Print an event: its message, and its step and their number if it has them as `data`."""
        line, data = event["message"], event.get("data") or {}
        if (step := data.get("step")) is None:
            self.close()
            info(line)
            return
        total = data.get("total_steps")
        # If the number of steps is unknown, print the steps 1, 2, 4, 8, ...
        tenth = step * 10 // total if total else step.bit_length()
        if self._is_live:
            print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
            self._is_open = True
        elif tenth != self._tenth or "valid_loss" in data:
            self._tenth = tenth
            info(line)

    def close(self) -> None:
        """End the line of the last step."""
        if self._is_open:
            print(file=sys.stderr)
            self._is_open = False


def _progress_bar(id: str, total: int) -> "Progress":
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
