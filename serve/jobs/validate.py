"""Whether a job's files can be learned from, as a program: ``python -m serve.jobs.validate``.

A file of a million lines takes minutes to read, so it is read in a niced process, not in the
server. It prints a JSON object: a job's `error`, or null, and the `warnings` to tell of.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training import check
from training.check import Report
from training.recipes.finetune import read_tokenizer


def validate_files(model: Path, data: Path, valid: Path | None = None) -> dict[str, Report]:
    """A report of each of a job's files, up to the first that cannot be learned from.

    Args:
        model: the files of the model to be trained.
        data, valid: the training file and the validation file.

    Returns:
        The reports, by the names that the job has for the files.
    """
    tokenizer: Any
    tokenizer, max_tokens = read_tokenizer(model)
    report = check.check(data, tokenizer, max_tokens=max_tokens)
    found = {"training_file": report}
    if report.ok and valid is not None:
        found["validation_file"] = check.check(
            valid, tokenizer, max_tokens=max_tokens, kind=report.kind, minimum=1
        )
    return found


def warning_messages(reports: Mapping[str, Report]) -> list[str]:
    """What a job's events warn of."""
    return [
        f"{name.replace('_', ' ').capitalize()}: {warning.message}"
        for name, report in reports.items()
        for warning in report.warnings
    ]


if __name__ == "__main__":
    found = validate_files(*map(Path, sys.argv[1:]))
    errors = [report.error(name) for name, report in found.items() if not report.ok]
    print(json.dumps({"error": errors[0] if errors else None, "warnings": warning_messages(found)}))
