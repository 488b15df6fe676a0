"""The validation of a job's files, as a program: ``python -m serve.jobs.validate``.

A file of a million lines takes minutes to read, so a niced process reads it, not the server. The
program prints a JSON object with `error`, which is null for valid files, and a list of `warnings`.
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
    """Check the files of a job; stop after the first invalid file.

    Args:
        model: the files of the model to fine-tune.
        data: the training file.
        valid: the validation file, if any.

    Returns:
        The reports, with the keys "training_file" and, if it was checked, "validation_file".
    """
    tokenizer: Any
    tokenizer, max_tokens = read_tokenizer(model)
    report = check.check(data, tokenizer, max_tokens=max_tokens)
    reports = {"training_file": report}
    if report.ok and valid is not None:
        reports["validation_file"] = check.check(
            valid, tokenizer, max_tokens=max_tokens, kind=report.kind, minimum=1
        )
    return reports


def warning_messages(reports: Mapping[str, Report]) -> list[str]:
    """Return the warnings of the reports of `validate_files` as messages for events of the job."""
    return [
        f"{name.replace('_', ' ').capitalize()}: {warning.message}"
        for name, report in reports.items()
        for warning in report.warnings
    ]


if __name__ == "__main__":
    reports = validate_files(*map(Path, sys.argv[1:]))
    errors = [report.error(name) for name, report in reports.items() if not report.ok]
    error = errors[0] if errors else None
    print(json.dumps({"error": error, "warnings": warning_messages(reports)}))
