"""A file that can be learned from, made of one that nearly can.

Only what needs no guess: marks and line ends that editors leave behind, another encoding of
Unicode, one JSON array instead of lines, blank lines, examples that are too long. A line with
another fault stays as it is, for whoever wrote it to put right; `check` names it. Repeated examples
stay: repeating an example is how people give it more weight.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training import examples
from training.check import BOM, BOM_UTF16, Report, ends_in_carriage_returns
from training.examples import Fault, Kind, Tokenizer

MAX_ARRAY = 64 * 2**20  # bytes of a file that is one array: it is read as a whole

# What is done, by the code of the problem or note that it ends.
_FIXES = {
    "byte_order_mark": "remove the byte order mark",
    "carriage_return": "end {n} line(s) without a carriage return",
    "carriage_return_only": "end lines in line feeds instead of carriage returns",
    "utf16": "write the file in UTF-8",
    "json_array": "write the array as lines",
    "blank_line": "drop {n} blank line(s)",
    "too_long": "cut, or drop, {n} example(s) that are too long",
}


def available_fixes(report: Report) -> list[str]:
    """What `mend` would do about a report, a phrase each; empty if it can do nothing."""
    counts = report.counts + report.notes
    if report.counts["json_array"] and report.bytes > MAX_ARRAY:
        del counts["json_array"]
    return _descriptions(counts)


def fix_file(
    path: Path, target: Path, tokenizer: Tokenizer, *, max_tokens: int, kind: Kind | None = None
) -> list[str]:
    """Writes what can be mended of one file into another; check that one again.

    A conversation that is too long loses its last turns, as many as it must; one that would have to
    lose all is left out, as is a pair or a text.

    Args:
        path: what to mend; it is not changed, unless it is the target too.
        target: appears when it is complete, and only if anything was done.
        tokenizer, max_tokens, kind: as for `check`.

    Returns:
        What was done, as `proposals` says it.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: it is one array of more than 64 MB, or a damaged one, or has a huge line.
    """
    path, target = Path(path), Path(target)
    done: Counter[str] = Counter()
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            for line in _lines(path, done):
                if len(line) > examples.MAX_LINE:
                    raise ValueError(f"{path}: has a line of more than {len(line) - 1} bytes")
                row = examples.parse(line)
                if isinstance(row, Fault):
                    file.write(line + b"\n")
                    continue
                kind = kind or examples.kind_of(row)
                if kind is not None and not examples.faults(row, kind):
                    short = _truncated(row, kind, tokenizer, max_tokens)
                    if short is not row:
                        done["too_long"] += 1
                        if short is None:
                            continue
                        line = _to_json(short)
                file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if done:
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return _descriptions(done)


def _descriptions(counts: Counter[str]) -> list[str]:
    return [phrase.format(n=counts[code]) for code, phrase in _FIXES.items() if counts[code]]


def _lines(path: Path, done: Counter[str]) -> Iterator[bytes]:
    """The lines that hold something, in UTF-8."""
    with open(path, "rb") as file:
        start = file.read(4096)
    if start.removeprefix(BOM).lstrip()[:1] == b"[":
        if (size := path.stat().st_size) > MAX_ARRAY:
            raise ValueError(f"{path}: an array of {size} bytes is more than can be taken apart")
        done["json_array"] += 1
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{path}: begins as an array, but is none: {error}") from None
        yield from map(_to_json, rows)
        return
    if start.startswith(BOM_UTF16):
        done["utf16"] += 1
        with open(path, encoding="utf-16", newline="\n") as text:
            lines: Iterator[bytes] = (line.rstrip("\n").encode() for line in text)
            yield from _clean_lines(lines, done)
        return
    if ends_in_carriage_returns(path):
        done["carriage_return_only"] += 1
        with open(path, encoding="utf-8", errors="surrogateescape") as text:  # any end of a line
            rows = (line.rstrip("\n").encode("utf-8", "surrogateescape") for line in text)
            yield from _clean_lines(rows, done)
        return
    yield from _clean_lines((line for _, line in examples.lines(path)), done)


def _clean_lines(lines: Iterator[bytes], done: Counter[str]) -> Iterator[bytes]:
    for number, line in enumerate(lines):
        if number == 0 and line.startswith(BOM):
            done["byte_order_mark"] += 1
            line = line.removeprefix(BOM)
        if line.endswith(b"\r"):
            done["carriage_return"] += 1
            line = line.rstrip(b"\r")
        if line.strip():
            yield line
        else:
            done["blank_line"] += 1


def _truncated(
    row: dict[str, Any], kind: Kind, tokenizer: Tokenizer, max_tokens: int
) -> dict[str, Any] | None:
    """The row itself if it is short enough; else what fits of it, or None."""

    def fits(row: dict[str, Any]) -> bool:
        return len(examples.encode(row, kind, tokenizer)) <= max_tokens

    try:
        if fits(row):
            return row
        messages = row.get("messages", [])
        for end in range(len(messages) - 1, 0, -1):
            if messages[end - 1]["role"] == "assistant":
                short = {**row, "messages": messages[:end]}
                if not examples.faults(short, kind) and fits(short):
                    return short
    except ValueError:  # the template refuses it: that is for `check` to say
        return row
    return None


def _to_json(row: Any) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can write
        return json.dumps(row).encode()
