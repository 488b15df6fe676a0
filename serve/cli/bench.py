"""`pellucid bench`: times what a model is made of, against what this machine can do.

The measuring is `transformer/bench`, which `python -m transformer.bench` runs by itself; here a
model may be named by its id. Only its sizes are read: weights are random. The cases are those of
`transformer/bench/decoder_cases.py` and of `audio/bench.py`.
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
        typer.Argument(metavar="[NAME]...", help="Beginnings of cases' names. [default: all]"),
    ] = None,
    model: Annotated[
        str | None,
        model_option(
            "Take the sizes of a pulled model, or of NAME=PATH. [default: SmolLM2-135M's]"
        ),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens that stand in the cache.")] = 512,
    all_impls: Annotated[
        bool, typer.Option("--forms", help="Every form of each operation, in turns.")
    ] = False,
    impls: Annotated[
        list[str] | None,
        typer.Option(
            "--try",
            metavar="OPERATION=FORM",
            help="Measure with this form too, in turns. Repeatable.",
        ),
    ] = None,
    show_profile: Annotated[
        bool, typer.Option("--where", help="Say where a decoded token's time goes, and leave.")
    ] = False,
    names_only: Annotated[
        bool, typer.Option("--list", help="Print the names of the cases, and leave.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.0, help="Of samples, a case.")] = 1.0,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the results there, as JSON lines.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare with what --save wrote.")
    ] = None,
    roofline: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the results under the roofs.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines instead of a table.")
    ] = False,
) -> None:
    """Time what a model is made of, against what this machine can do."""
    path = None
    if model is not None:
        from serve.cli import local

        path = local.locate_model(model).path

    import audio.bench
    from transformer import bench
    from transformer.bench import decoder_cases, profile

    try:
        old = bench.read(compare) if compare else None
        sizes = decoder_cases.Sizes.from_checkpoint(path, context=context)
        plan = bench.BenchPlan(
            names=names or (),
            all_impls=all_impls,
            overrides=bench.parse_overrides(impls or ()),
            seconds=seconds,
        )
        chosen = plan.select([*decoder_cases.bench_cases(sizes), *audio.bench.cases()])
    except ValueError as error:
        raise WrongUsage(str(error)) from None
    if names_only:
        print("\n".join(case.name for case in chosen))
        return
    if show_profile:
        profile.report(sizes, as_json=json, say=console.info)
        return
    status = bench.report(
        plan,
        chosen,
        as_json=json,
        save=save,
        old=old,
        roofline_path=roofline,
        say=console.info,
    )
    if status:
        raise typer.Exit(status)
