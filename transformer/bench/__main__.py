"""`python -m transformer.bench`: times what a decoder is made of."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformer.bench import decoder_cases, profile
from transformer.bench.measure import BenchPlan, parse_overrides
from transformer.bench.report import read, report


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m transformer.bench", description="Times what a decoder is made of."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="beginnings of cases' names")
    parser.add_argument("--model", type=Path, help="take the sizes of this GGUF file or folder")
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache; default 512")
    parser.add_argument(
        "--all-impls", dest="forms", action="store_true", help="every implementation of operations"
    )
    parser.add_argument("--forms", action="store_true", help=argparse.SUPPRESS)  # old name
    parser.add_argument(
        "--impl", action="append", default=[], metavar="OPERATION=IMPL", dest="tried",
        help="also measure this implementation of an operation; repeatable",
    )  # fmt: skip
    parser.add_argument("--try", action="append", dest="tried", help=argparse.SUPPRESS)  # old name
    parser.add_argument(
        "--profile", dest="where", action="store_true", help="profile one decoding step"
    )
    parser.add_argument("--where", action="store_true", help=argparse.SUPPRESS)  # old name
    parser.add_argument("--list", action="store_true", help="name the cases and leave")
    parser.add_argument("--seconds", type=float, default=1.0, help="of samples a case; default 1")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON lines there too")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="with what --save wrote")
    parser.add_argument("--roofline", type=Path, metavar="FILE.png", help="draw the results")
    options = parser.parse_args(argv)
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    try:
        old = read(options.compare) if options.compare else None
        sizes = decoder_cases.Sizes.from_checkpoint(options.model, context=options.context)
        plan = BenchPlan(
            names=options.names,
            all_impls=options.forms,
            overrides=parse_overrides(options.tried),
            seconds=options.seconds,
        )
        chosen = plan.select(decoder_cases.bench_cases(sizes))
    except (OSError, ValueError) as error:
        say(f"python -m transformer.bench: {error}")
        return 2
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if options.where:
        return profile.report(sizes, as_json=options.json, say=say)
    return report(
        plan,
        chosen,
        as_json=options.json,
        save=options.save,
        old=old,
        roofline_path=options.roofline,
        say=say,
    )


if __name__ == "__main__":
    raise SystemExit(main())
