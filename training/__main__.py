"""Training from the command line, without a server.

    python -m training check examples.jsonl --model MODEL [--mend mended.jsonl]
    python -m training finetune --model MODEL --data examples.jsonl --out FOLDER
    python -m training pretrain --data text.txt --out FOLDER

MODEL is a GGUF file or a Hugging Face folder. Standard output holds the answer only, with --json as
one object a line; what happens meanwhile goes to standard error.

It ends with 0 when all is done, or was done before; 1 with an error; 6 when a file cannot be
learned from; 128 and the number of the signal when it was told to stop, and has saved.
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
    """Runs a command; returns its exit status."""
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
        _notify("stopped and saved; the same command goes on")
        return 128 + result.signal
    print(json.dumps(result.job) if args.json else args.out)
    return 0


def _check(args: argparse.Namespace) -> int:
    from training import check, fixes
    from training.recipes.finetune import read_tokenizer

    tokenizer, max_tokens = read_tokenizer(args.model, args.max_tokens)
    path = args.data
    if args.mend is not None:
        deeds = fixes.fix_file(path, args.mend, tokenizer, max_tokens=max_tokens)
        for deed in deeds:
            _notify(deed)
        if deeds:
            path = args.mend
        else:
            _notify(f"there is nothing to mend without a guess: {args.mend} was not written")
    report = check.check(path, tokenizer, max_tokens=max_tokens)
    _print_problems(report, args.json)
    if args.json:
        print(json.dumps(check.summary(report)))
    else:
        print("\n".join(check.report_lines(report)))
    if not report.ok and (able := fixes.available_fixes(report)):
        _notify(f"--mend FILE would write a copy, and {'; '.join(able)}")
    return 0 if report.ok else EXIT_INVALID_DATA


def _print_problems(report: Any, as_json: bool) -> None:
    for problem in report.problems:
        if as_json:
            print(json.dumps({"file": str(report.path), **asdict(problem)}))
        else:
            place = f"{report.path}:{problem.line}" if problem.line else str(report.path)
            param = f" {problem.param}:" if problem.param else ""
            print(f"{place}:{param} {problem.message}")
    if more := report.counts.total() - len(report.problems):
        _notify(f"and {more} more problems")


def _notify(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _settings_fields(args: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The arguments that these settings have fields for."""
    given = vars(args)
    return {field.name: given[field.name] for field in fields(settings) if field.name in given}


def _auto(kind: type) -> Any:
    """Reads a number, or "auto" as None."""

    def read(text: str) -> Any:
        return None if text == "auto" else kind(text)

    read.__name__ = kind.__name__  # what argparse calls it
    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description="Train a model.")
    commands = parser.add_subparsers(required=True, metavar="WHAT")

    def command(name: str, text: str, run: Any) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print JSON, one object a line")
        return added

    check = command("check", "say whether a file can be learned from", _check)
    check.add_argument("data", type=Path, help="JSON lines")
    check.add_argument("--model", type=Path, required=True, help="a GGUF file or a folder")
    check.add_argument("--max-tokens", type=_auto(int), help="of the longest example")
    check.add_argument("--mend", type=Path, metavar="FILE", help="write what can be mended")

    tune = command("finetune", "teach a model what is in a file of examples", _finetune)
    tune.add_argument("--model", type=Path, required=True, help="a GGUF file or a folder")
    tune.add_argument("--data", type=Path, required=True, help="JSON lines")
    tune.add_argument("--valid", type=Path, help="JSON lines that are only looked at")
    tune.add_argument("--out", type=Path, required=True, help="a folder; run again, it goes on")
    tune.add_argument("--method", choices=("lora", "full"), default="lora")
    tune.add_argument("--epochs", type=_auto(int), metavar="N|auto")
    tune.add_argument("--batch-size", type=_auto(int), metavar="N|auto", help="examples a step")
    tune.add_argument("--learning-rate-multiplier", type=_auto(float), metavar="X|auto")
    tune.add_argument("--rank", type=int, default=16, help="of the adapter")
    tune.add_argument("--seed", type=int, default=0)
    tune.add_argument("--max-tokens", type=_auto(int), metavar="N|auto", help="of an example")
    tune.add_argument("--format", choices=("float32", "bfloat16"), help="of products")

    begin = command("pretrain", "train a small model from nothing", _pretrain)
    begin.add_argument("--data", type=Path, required=True, help="text, or JSON lines of texts")
    begin.add_argument("--out", type=Path, required=True, help="a folder; run again, it goes on")
    begin.add_argument("--vocab-size", type=int, default=2048)
    begin.add_argument("--layers", type=int, default=4)
    begin.add_argument("--width", type=int, default=128)
    begin.add_argument("--length", type=int, default=128, help="tokens of a row")
    begin.add_argument("--batch-size", type=int, default=8, help="rows a step")
    begin.add_argument("--steps", type=int, default=500)
    begin.add_argument("--learning-rate", type=float, default=3e-3)
    begin.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
