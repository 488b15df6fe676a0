"""`pellucid bench`: measures the operations of a model against the peak rates of this machine.

The measurements are in `transformer/bench`, which `python -m transformer.bench` runs for a path;
this command also takes the id of a model. Only the sizes of the model are read: the weights are
random. The bench cases are in `transformer/bench/decoder_cases.py` and `audio/bench.py`.
"""

from pathlib import Path
from typing import Annotated

import typer

from serve.cli import console
from serve.cli.options import model_option
from serve.exceptions import WrongUsage


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Prefixes of case names. [default: all]"),
    ] = None,
    model: Annotated[
        str | None,
        model_option(
            "Use the sizes of a pulled model, or of NAME=PATH. [default: those of SmolLM2-135M]"
        ),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the KV cache.")] = 512,
    all_impls: Annotated[
        bool, typer.Option("--all-impls", help="Measure every implementation of each operation.")
    ] = False,
    impls: Annotated[
        list[str] | None,
        typer.Option(
            "--impl",
            metavar="OPERATION=IMPL",
            help="Also measure this implementation of an operation. Repeatable.",
        ),
    ] = None,
    show_profile: Annotated[
        bool, typer.Option("--profile", help="Profile one decoding step by operation, and exit.")
    ] = False,
    names_only: Annotated[
        bool, typer.Option("--list", help="Print the names of the cases, and exit.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time to measure each case.")] = 1.0,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the results to FILE as JSON lines.")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compare with the results that --save wrote to FILE."),
    ] = None,
    roofline: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Plot the results in a roofline diagram."),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines instead of a table.")
    ] = False,
) -> None:
    """Measure the speed of a model's operations on this machine."""
    path = None
    if model is not None:
        from serve.cli import local

        path = local.locate_model(model).path

    import audio.bench
    from transformer import bench
    from transformer.bench import decoder_cases, profile

    try:
        baseline = bench.read(compare) if compare else None
        sizes = decoder_cases.Sizes.from_checkpoint(path, context=context)
        plan = bench.BenchPlan(
            names=names or (),
            all_impls=all_impls,
            overrides=bench.parse_overrides(impls or ()),
            seconds=seconds,
        )
        cases = plan.select([*decoder_cases.bench_cases(sizes), *audio.bench.cases()])
    except ValueError as error:
        raise WrongUsage(str(error)) from None
    if names_only:
        print("\n".join(case.name for case in cases))
        return
    if show_profile:
        profile.report(sizes, overrides=plan.overrides, as_json=json, say=console.info)
        return
    status = bench.report(
        plan,
        cases,
        as_json=json,
        save=save,
        old=baseline,
        roofline_path=roofline,
        say=console.info,
    )
    if status:
        raise typer.Exit(status)
