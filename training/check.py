"""Validation of a file of training examples: all of its problems, line by line.

A file is read once, line by line. Memory holds only the current line, and a digest of each example
to find duplicates. A duplicate is reported as a warning, not as a problem, because repeating an
example is a way to give it more weight.

`fixes.py` fixes the unambiguous problems.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from training import examples
from training.examples import Example, Fault, Kind, Tokenizer

MAX_BYTES = 256 * 2**20
MAX_EXAMPLES = 500_000
MIN_EXAMPLES = 10
MAX_LISTED = 100  # problems that a report lists; further problems are only counted
BOM, BOM_UTF16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Problem:
    """A problem that prevents training on a file.

    Attributes:
        line: line number, from 1; None if the problem is that of the whole file.
        code: identifier of the type of problem, such as "missing_key", for programs.
        message: a sentence for people, which names the line as "Example 7".
        param: path of the invalid field in the JSON object of the line, such as
            "messages[1].role"; None if the problem is not in one field.
    """

    line: int | None
    code: str
    message: str
    param: str | None = None


@dataclass
class Report:
    """Statistics and problems of a file of training examples.

    Attributes:
        path: the file.
        bytes: the size of the file.
        kind: the kind of its examples (see `examples`); None if unknown.
        examples: the number of valid examples.
        tokens: the number of tokens in all valid examples.
        target_tokens: the number of tokens with a weight above 0 in the loss.
        longest: the number of tokens in the longest example.
        lengths: a histogram of the lengths in tokens: a dict from an upper bound, which is a power
            of 2, to the number of examples.
        problems: the first `MAX_LISTED` problems, in order.
        counts: a dict from each code to the number of problems with it, listed or not.
        notes: a dict from each code of a harmless irregularity, such as "blank_line", to its count.
        first_duplicate: the line of the first example that repeats an earlier one, and the line of
            the earlier one.
    """

    path: Path
    bytes: int
    kind: Kind | None = None
    examples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    longest: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    first_duplicate: tuple[int, int] | None = None

    @property
    def warnings(self) -> list[Problem]:
        """Return warnings: properties that do not prevent training but might be mistakes."""
        if self.first_duplicate is None:
            return []
        line, first = self.first_duplicate
        message = (
            f"{self.notes['duplicate']} of {self.examples} example(s) are duplicates; each copy "
            f"counts in the loss. The first duplicate is example {line}, which repeats "
            f"example {first}."
        )
        return [Problem(line, "duplicate", message)]

    @property
    def ok(self) -> bool:
        """Return whether the file can be used for training."""
        return not self.counts

    def add(self, line: int | None, code: str, message: str, param: str | None = None) -> None:
        """Count a problem, and list it unless `MAX_LISTED` are listed; see `Problem`."""
        message, param = _printable(message), param and _printable(param)
        self.counts[code] += 1
        if len(self.problems) < MAX_LISTED:
            self.problems.append(Problem(line, code, message, param))

    def error(self, param: str = "training_file") -> dict[str, str]:
        """Return the first problem as the `error` object of a fine-tuning job in OpenAI's API.

        Args:
            param: the field of the job that names the file: "training_file" or "validation_file".
        """
        problem, more = self.problems[0], self.counts.total() - 1
        if problem.code == "invalid_n_examples":
            return {"code": problem.code, "message": problem.message, "param": param}
        name = param.replace("_", " ")
        reason = "" if problem.line is None else "Invalid file format. "
        message = f"The job failed due to an invalid {name}. {reason}{problem.message}"
        if more:
            message += f" ({more} more problem{'s' if more > 1 else ''} in this file.)"
        return {"code": f"invalid_{param}", "message": message, "param": param}


def _printable(text: str) -> str:
    """Truncate a text to 500 characters; escape lone surrogates, which UTF-8 cannot encode."""
    return text[:500].encode("utf-8", "backslashreplace").decode()


def check(
    path: Path,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    kind: Kind | None = None,
    minimum: int = MIN_EXAMPLES,
) -> Report:
    """Validate a file of training examples and return a report.

    Args:
        path: a file of JSON lines; see `examples`.
        tokenizer: the tokenizer of the model.
        max_tokens: the maximum length of an example in tokens.
        kind: the kind of the examples; None to take that of the first, which must be "chat" or
            "completion".
        minimum: the minimum number of examples: that of OpenAI's API, or 1 for a validation file.

    Raises:
        OSError: the file cannot be read.
    """
    report, _ = read_examples(
        path, tokenizer, max_tokens=max_tokens, kind=kind, minimum=minimum, keep=False
    )
    return report


def read_examples(
    path: Path,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    kind: Kind | None = None,
    minimum: int = MIN_EXAMPLES,
    keep: bool = True,
) -> tuple[Report, list[Example]]:
    """Validate a file of training examples; return a report and the valid examples in order.

    Args:
        path: a file of JSON lines; see `examples`.
        tokenizer: the tokenizer of the model.
        max_tokens: the maximum length of an example in tokens.
        kind: as for `check`.
        minimum: as for `check`.
        keep: whether to return the examples; if not, the list is empty.

    Raises:
        OSError: the file cannot be read.
    """
    path = Path(path)
    report = Report(path, path.stat().st_size, kind)
    valid: list[Example] = []
    if not _looks_like_jsonl(report):
        return report, valid
    lines_by_digest: dict[bytes, int] = {}
    for number, line in examples.lines(path):
        if number == 1 and line.startswith(BOM):
            report.notes["byte_order_mark"] += 1
            line = line.removeprefix(BOM)
        if line.endswith(b"\r"):
            report.notes["carriage_return"] += 1
        if not line.strip():
            report.notes["blank_line"] += 1
            continue
        example, digest = _read_line(report, number, line, tokenizer, max_tokens)
        if example is None:
            continue
        if report.examples == MAX_EXAMPLES:
            report.add(
                None, "too_many_examples", f"The file has more than {MAX_EXAMPLES} examples."
            )
            break
        _count(report, example)
        if (first := lines_by_digest.setdefault(digest, number)) != number:
            report.notes["duplicate"] += 1
            report.first_duplicate = report.first_duplicate or (number, first)
        if keep:
            valid.append(example)
    if not report.examples and report.ok:
        report.add(None, "empty_file", "The file has no examples.")
    elif report.examples < minimum and report.ok:
        name = "Training file" if minimum > 1 else "File"
        report.add(
            None,
            "invalid_n_examples",
            f"{name} has {report.examples} example(s), but must have at least {minimum} examples",
        )
    return report, valid


def summary(report: Report) -> dict[str, Any]:
    """Convert a report to a JSON object, without the list of its problems."""
    return {
        "file": str(report.path),
        "ok": report.ok,
        "bytes": report.bytes,
        "kind": report.kind,
        "examples": report.examples,
        "tokens": report.tokens,
        "learned": report.target_tokens,
        "longest": report.longest,
        "lengths": {str(upper): report.lengths[upper] for upper in sorted(report.lengths)},
        "problems": report.counts.total(),
        "counts": dict(report.counts),
        "notes": dict(report.notes),
        "warnings": [asdict(warning) for warning in report.warnings],
    }


def report_lines(report: Report) -> list[str]:
    """Format a report as lines of text: counts, a histogram of lengths, and warnings."""
    lines = [
        f"{report.examples} examples ({report.kind or 'unknown kind'}), {report.tokens} tokens, "
        f"{report.target_tokens} of them targets; the longest example has {report.longest}"
    ]
    most = max(report.lengths.values(), default=0)
    for upper in sorted(report.lengths):
        number = report.lengths[upper]
        bar = "#" * max(1, round(30 * number / most))
        lines.append(f"  up to {upper:5} tokens {number:7} {bar}")
    return [*lines, *(f"warning: {warning.message}" for warning in report.warnings)]


def _looks_like_jsonl(report: Report) -> bool:
    """Return whether a file looks like JSON lines; if not, add the problem to the report."""
    if report.bytes > MAX_BYTES:
        size, most = (number / 2**20 for number in (report.bytes, MAX_BYTES))
        reason = f"The file has {size:.0f} MB; the maximum for training is {most:.0f} MB."
        report.add(None, "file_too_large", reason)
        return False
    with open(report.path, "rb") as file:
        start = file.read(4096)
    if start.startswith(BOM_UTF16):
        report.add(
            1,
            "utf16",
            "Example 1 is not UTF-8: the file begins with a UTF-16 byte order mark.",
        )
    elif b"\0" in start:
        line = start[: start.index(b"\0")].count(b"\n") + 1
        reason = "The file is binary: it has zero bytes. Expected file to have JSONL format."
        report.add(line, "binary", reason)
    elif start.removeprefix(BOM).lstrip()[:1] == b"[":
        report.add(
            1,
            "json_array",
            "Expected file to have JSONL format, where every line is a JSON dictionary. Line 1 is "
            'not a dictionary (HINT: line starts with: "["; the file is one JSON array).',
        )
    elif ends_in_carriage_returns(report.path):
        report.add(
            1,
            "carriage_return_only",
            "The lines end in carriage returns only. Expected file to have JSONL format, where "
            "lines end in line feeds.",
        )
    return report.ok


def ends_in_carriage_returns(path: Path) -> bool:
    """Return whether the first example of a file ends in a carriage return without a line feed."""
    _, line = next(examples.lines(path), (1, b""))
    first, end, rest = line.removeprefix(BOM).lstrip().partition(b"\r")
    return bool(end and rest) and not isinstance(examples.parse(first), Fault)


def _read_line(
    report: Report,
    number: int,
    line: bytes,
    tokenizer: Tokenizer,
    max_tokens: int,
) -> tuple[Example | None, bytes]:
    """Return the example of a line and its digest; if invalid, add its problems and return None."""

    def refuse(*faults: Fault) -> tuple[None, bytes]:
        for fault in faults:
            subject = f"Example {number}" + (f", {fault.location}" if fault.location else "")
            report.add(number, fault.code, f"{subject} {fault.message}", fault.param)
        return None, b""

    if isinstance(row := examples.parse(line), Fault):
        return refuse(row)
    if report.kind is None:
        report.kind = examples.kind_of(row)
        if report.kind in (None, "text"):
            reason = (
                "Unexpected file format, expected either prompt/completion pairs or chat messages."
            )
            if {"preferred_output", "preferred_completion"} & row.keys():
                reason += " Preference pairs are for method dpo, which is not supported."
            report.kind = None
            report.add(number, "unknown_format", reason)
            return None, b""
    if faults := examples.faults(row, report.kind):
        return refuse(*faults)
    try:
        example = examples.encode(row, report.kind, tokenizer, number)
    except ValueError as error:
        return refuse(Fault("refused_by_template", f"cannot be encoded for this model: {error}."))
    if len(example) > max_tokens:
        reason = f"has {len(example)} tokens; the maximum is {max_tokens}."
        return refuse(Fault("too_long", reason))
    return example, _digest(row)


def _count(report: Report, example: Example) -> None:
    report.examples += 1
    report.tokens += len(example)
    report.target_tokens += int((example.weights > 0).sum())
    report.longest = max(report.longest, len(example))
    report.lengths[1 << (len(example) - 1).bit_length()] += 1


def _digest(row: dict[str, Any]) -> bytes:
    """Return a digest of a JSON object that does not depend on whitespace or the order of keys."""
    text = json.dumps(row, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=12).digest()
