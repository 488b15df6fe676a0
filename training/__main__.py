"""Training from the command line, without a server.

    python -m training check examples.jsonl --model MODEL [--fix fixed.jsonl]
    python -m training finetune --model MODEL --data examples.jsonl --out FOLDER
    python -m training pretrain --data text.txt --out FOLDER

MODEL is a GGUF file or a Hugging Face folder. Only the result is printed to standard output, with
--json as one object per line; progress goes to standard error.

The exit code is 0 if the run is complete, 1 after an error, 6 if a data file cannot be used for
training, and 128 plus the signal number if a signal stopped the run after it saved its state.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

EXIT_INVALID_DATA = 6


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: arguments without the program name; None for `sys.argv[1:]`.
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"python -m training: {error}", file=sys.stderr)
        return 1


def _finetune(args: argparse.Namespace) -> int:
    from training.recipes import finetune

    settings = finetune.FinetuneConfig(**_settings_fields(args, finetune.FinetuneConfig))
    result = finetune.run(settings, notify=_notify, progress=not args.json)
    for report in result.reports:
        _print_problems(report, args.json)
    if result.reason == "refused":
        return EXIT_INVALID_DATA
    return _print_outcome(args, result)


def _pretrain(args: argparse.Namespace) -> int:
    from training.recipes import pretrain

    settings = pretrain.PretrainConfig(**_settings_fields(args, pretrain.PretrainConfig))
    result = pretrain.run(settings, notify=_notify, progress=not args.json)
    return _print_outcome(args, result)


def _print_outcome(args: argparse.Namespace, result: Any) -> int:
    if result.reason == "signal":
        _notify("stopped and saved; run the same command to resume")
        return 128 + result.signal
    print(json.dumps(result.job) if args.json else args.out)
    return 0


def _check(args: argparse.Namespace) -> int:
    from training import check, fixes
    from training.recipes.finetune import read_tokenizer

    tokenizer, max_tokens = read_tokenizer(args.model, args.max_tokens)
    path = args.data
    if args.fix is not None:
        applied = fixes.fix_file(path, args.fix, tokenizer, max_tokens=max_tokens)
        for fix in applied:
            _notify(fix)
        if applied:
            path = args.fix
        else:
            _notify(f"{path} has no unambiguous problem to fix; {args.fix} is not written")
    report = check.check(path, tokenizer, max_tokens=max_tokens)
    _print_problems(report, args.json)
    if args.json:
        print(json.dumps(check.summary(report)))
    else:
        print("\n".join(check.report_lines(report)))
    if not report.ok and (available := fixes.available_fixes(report)):
        _notify(f"--fix FILE writes a copy with these changes: {'; '.join(available)}")
    return 0 if report.ok else EXIT_INVALID_DATA


def _print_problems(report: Any, as_json: bool) -> None:
    for problem in report.problems:
        if as_json:
            print(json.dumps({"file": str(report.path), **asdict(problem)}))
        else:
            location = f"{report.path}:{problem.line}" if problem.line else str(report.path)
            param = f" {problem.param}:" if problem.param else ""
            print(f"{location}:{param} {problem.message}")
    if more := report.counts.total() - len(report.problems):
        _notify(f"and {more} more problems, which are not listed")


def _notify(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _settings_fields(args: argparse.Namespace, settings: type) -> dict[str, Any]:
    """Return a dict of the parsed arguments that are fields of the dataclass `settings`."""
    values = vars(args)
    return {field.name: values[field.name] for field in fields(settings) if field.name in values}


def _auto(kind: type) -> Any:
    """Return an argparse type that parses a number of type `kind`, and "auto" as None."""

    def parse(text: str) -> Any:
        return None if text == "auto" else kind(text)

    parse.__name__ = kind.__name__  # argparse shows it: "invalid int value"
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description="Train a model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str, run: Any) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print JSON, one object per line")
        return added

    check = command("check", "check whether a file can be used for training", _check)
    check.add_argument("data", type=Path, help="JSON lines")
    check.add_argument("--model", type=Path, required=True, help="a GGUF file or a folder")
    check.add_argument("--max-tokens", type=_auto(int), help="maximum length of an example")
    check.add_argument(
        "--fix", type=Path, metavar="FILE", help="write a copy with unambiguous problems fixed"
    )
    check.add_argument("--mend", dest="fix", type=Path, help=argparse.SUPPRESS)  # old name

    tune = command("finetune", "fine-tune a model on a file of examples", _finetune)
    tune.add_argument("--model", type=Path, required=True, help="a GGUF file or a folder")
    tune.add_argument("--data", type=Path, required=True, help="JSON lines")
    tune.add_argument("--valid", type=Path, help="JSON lines for validation")
    tune.add_argument("--out", type=Path, required=True, help="a folder; run again to resume")
    tune.add_argument("--method", choices=("lora", "full"), default="lora")
    tune.add_argument("--epochs", type=_auto(int), metavar="N|auto")
    tune.add_argument("--batch-size", type=_auto(int), metavar="N|auto", help="examples per step")
    tune.add_argument("--learning-rate-multiplier", type=_auto(float), metavar="X|auto")
    tune.add_argument("--rank", type=int, default=16, help="rank of the adapter")
    tune.add_argument("--seed", type=int, default=0)
    tune.add_argument(
        "--max-tokens", type=_auto(int), metavar="N|auto", help="maximum length of an example"
    )
    dtypes = ("float32", "bfloat16")
    tune.add_argument("--dtype", choices=dtypes, help="dtype of matrix products")
    tune.add_argument("--format", dest="dtype", choices=dtypes, help=argparse.SUPPRESS)  # old name

    pretrain = command("pretrain", "train a small model from scratch", _pretrain)
    pretrain.add_argument("--data", type=Path, required=True, help="text, or JSON lines of texts")
    pretrain.add_argument("--out", type=Path, required=True, help="a folder; run again to resume")
    pretrain.add_argument("--vocab-size", type=int, default=2048)
    pretrain.add_argument("--layers", type=int, default=4)
    pretrain.add_argument("--width", type=int, default=128)
    pretrain.add_argument("--length", type=int, default=128, help="tokens per row")
    pretrain.add_argument("--batch-size", type=int, default=8, help="rows per step")
    pretrain.add_argument("--steps", type=int, default=500)
    pretrain.add_argument("--learning-rate", type=float, default=3e-3)
    pretrain.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
