"""Write a copy of a file of training examples with its unambiguous problems fixed.

Unambiguous problems are byte order marks, carriage returns, UTF-16, one JSON array instead of
lines, blank lines, and examples that are too long. Lines with other problems are copied unchanged;
`check` reports them. Duplicates are copied, because repeating an example is a way to give it more
weight.
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

MAX_ARRAY = 64 * 2**20  # bytes; limited because a file that is one array is read as a whole

# Description of each fix, by the code of the problem or note in a `Report` that it resolves.
_FIXES = {
    "byte_order_mark": "remove the byte order mark",
    "carriage_return": "remove the carriage return from {n} line(s)",
    "carriage_return_only": "end lines in line feeds instead of carriage returns",
    "utf16": "convert the file to UTF-8",
    "json_array": "write the elements of the array as lines",
    "blank_line": "remove {n} blank line(s)",
    "too_long": "truncate or remove {n} example(s) that are too long",
}


def available_fixes(report: Report) -> list[str]:
    """Return descriptions of the fixes that `fix_file` would apply to the reported file."""
    counts = report.counts + report.notes
    if report.counts["json_array"] and report.bytes > MAX_ARRAY:
        del counts["json_array"]
    return _descriptions(counts)


def fix_file(
    path: Path, target: Path, tokenizer: Tokenizer, *, max_tokens: int, kind: Kind | None = None
) -> list[str]:
    """Write a copy of a file with its unambiguous problems fixed.

    A chat example that is too long is truncated after the last message of the assistant that fits,
    and removed if none fits. Other examples that are too long are removed. Other problems remain:
    check the copy again.

    Args:
        path: the file to fix.
        target: the file to write, atomically, if there is something to fix; can equal `path`.
        tokenizer: as for `check`.
        max_tokens: as for `check`.
        kind: as for `check`.

    Returns:
        Descriptions of the applied fixes, as from `available_fixes`.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the file is an array of more than 64 MB or a damaged array, or a line is longer
            than `examples.MAX_LINE`.
    """
    path, target = Path(path), Path(target)
    counts: Counter[str] = Counter()
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            for line in _lines(path, counts):
                if len(line) > examples.MAX_LINE:
                    raise ValueError(
                        f"{path}: a line must have at most {examples.MAX_LINE} bytes; shorten it"
                    )
                row = examples.parse(line)
                if isinstance(row, Fault):
                    file.write(line + b"\n")
                    continue
                kind = kind or examples.kind_of(row)
                if kind is not None and not examples.faults(row, kind):
                    truncated = _truncated(row, kind, tokenizer, max_tokens)
                    if truncated is not row:
                        counts["too_long"] += 1
                        if truncated is None:
                            continue
                        line = _to_json(truncated)
                file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if counts:
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return _descriptions(counts)


def _descriptions(counts: Counter[str]) -> list[str]:
    return [phrase.format(n=counts[code]) for code, phrase in _FIXES.items() if counts[code]]


def _lines(path: Path, counts: Counter[str]) -> Iterator[bytes]:
    """Yield the lines that are not blank, in UTF-8; count the applied fixes in `counts`."""
    with open(path, "rb") as file:
        start = file.read(4096)
    if start.removeprefix(BOM).lstrip()[:1] == b"[":
        if (size := path.stat().st_size) > MAX_ARRAY:
            raise ValueError(
                f"{path}: a JSON array must have at most {MAX_ARRAY} bytes, got {size}"
            )
        counts["json_array"] += 1
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(
                f"{path}: begins like a JSON array, but is not valid JSON: {error}"
            ) from None
        yield from map(_to_json, rows)
        return
    if start.startswith(BOM_UTF16):
        counts["utf16"] += 1
        with open(path, encoding="utf-16", newline="\n") as text:
            lines: Iterator[bytes] = (line.rstrip("\n").encode() for line in text)
            yield from _clean_lines(lines, counts)
        return
    if ends_in_carriage_returns(path):
        counts["carriage_return_only"] += 1
        # open() without `newline` splits at carriage returns as well as at line feeds.
        with open(path, encoding="utf-8", errors="surrogateescape") as text:
            lines = (line.rstrip("\n").encode("utf-8", "surrogateescape") for line in text)
            yield from _clean_lines(lines, counts)
        return
    yield from _clean_lines((line for _, line in examples.lines(path)), counts)


def _clean_lines(lines: Iterator[bytes], counts: Counter[str]) -> Iterator[bytes]:
    for number, line in enumerate(lines):
        if number == 0 and line.startswith(BOM):
            counts["byte_order_mark"] += 1
            line = line.removeprefix(BOM)
        if line.endswith(b"\r"):
            counts["carriage_return"] += 1
            line = line.rstrip(b"\r")
        if line.strip():
            yield line
        else:
            counts["blank_line"] += 1


def _truncated(
    row: dict[str, Any], kind: Kind, tokenizer: Tokenizer, max_tokens: int
) -> dict[str, Any] | None:
    """Return the row if it fits into `max_tokens`, or a truncated copy; None if neither fits."""

    def fits(row: dict[str, Any]) -> bool:
        return len(examples.encode(row, kind, tokenizer)) <= max_tokens

    try:
        if fits(row):
            return row
        messages = row.get("messages", [])
        for end in range(len(messages) - 1, 0, -1):
            if messages[end - 1]["role"] == "assistant":
                truncated = {**row, "messages": messages[:end]}
                if not examples.faults(truncated, kind) and fits(truncated):
                    return truncated
    except ValueError:  # the template rejects the row; `check` reports it
        return row
    return None


def _to_json(row: Any) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # lone surrogates can only be written as escapes
        return json.dumps(row).encode()
