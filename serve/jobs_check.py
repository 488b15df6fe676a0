"""Whether a job's files can be learned from, as a program: ``python -m serve.jobs_check``.

A file of a million lines takes minutes to read, so it is read in a niced process, not in the
server. What it prints is a job's `error`, as JSON, or null.
"""

import json
import sys
from pathlib import Path
from typing import Any

from training import check
from training.check import Report
from training.recipes.finetune import read_tokenizer


def refusal(model: Path, data: Path, valid: Path | None = None) -> tuple[str, Report] | None:
    """The first of a job's files that cannot be learned from, and why; None if they all can.

    Args:
        model: the files of the model to be trained.
        data, valid: the training file and the validation file.
    """
    tokenizer: Any
    tokenizer, max_tokens = read_tokenizer(model)
    report = check.check(data, tokenizer, max_tokens=max_tokens)
    if not report.ok:
        return "training_file", report
    if valid is not None:
        other = check.check(valid, tokenizer, max_tokens=max_tokens, kind=report.kind, minimum=1)
        if not other.ok:
            return "validation_file", other
    return None


def error_of(*files: Path) -> dict[str, str] | None:
    """What `refusal` says of files, in the words of OpenAI's API."""
    found = refusal(*files)
    return None if found is None else found[1].error(found[0])


if __name__ == "__main__":
    print(json.dumps(error_of(*map(Path, sys.argv[1:]))))
