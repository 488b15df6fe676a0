"""Command line of the benchmarks: `python -m transformer.bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformer.bench import decoder_cases, profile
from transformer.bench.measure import BenchPlan, parse_overrides
from transformer.bench.report import read, report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m transformer.bench",
        description="Measure the operations and programs of a decoder.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="cases whose names start with this; default all"
    )
    parser.add_argument("--model", type=Path, help="use the sizes of this GGUF file or folder")
    parser.add_argument(
        "--context", type=int, default=512, help="tokens in the KV cache; default 512"
    )
    parser.add_argument(
        "--all-impls", action="store_true", help="measure all implementations of each operation"
    )
    parser.add_argument(
        "--impl", action="append", default=[], metavar="OPERATION=IMPL", dest="overrides",
        help="also measure OPERATION with implementation IMPL; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--profile", action="store_true", dest="show_profile",
        help="profile a decoding step by operation",
    )  # fmt: skip
    # Former names of options, still accepted.
    parser.add_argument("--forms", action="store_true", dest="all_impls", help=argparse.SUPPRESS)
    parser.add_argument("--try", action="append", dest="overrides", help=argparse.SUPPRESS)
    parser.add_argument("--where", action="store_true", dest="show_profile", help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="print the names of the cases and exit")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="sampling time per implementation; default 1"
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument("--save", type=Path, metavar="FILE", help="also write the JSON lines here")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="compare with results written by --save"
    )
    parser.add_argument(
        "--roofline", type=Path, metavar="FILE.png", help="plot the results in a roofline diagram"
    )
    options = parser.parse_args(argv)
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    try:
        old = read(options.compare) if options.compare else None
        sizes = decoder_cases.Sizes.from_checkpoint(options.model, context=options.context)
        plan = BenchPlan(
            names=options.names,
            all_impls=options.all_impls,
            overrides=parse_overrides(options.overrides),
            seconds=options.seconds,
        )
        cases = plan.select(decoder_cases.bench_cases(sizes))
    except (OSError, ValueError) as error:
        say(f"python -m transformer.bench: {error}")
        return 2
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    if options.show_profile:
        return profile.report(sizes, overrides=plan.overrides, as_json=options.json, say=say)
    return report(
        plan,
        cases,
        as_json=options.json,
        save=options.save,
        old=old,
        roofline_path=options.roofline,
        say=say,
    )


if __name__ == "__main__":
    raise SystemExit(main())
