"""`pellucid complete`: continue a text."""

from typing import Annotated

import typer

from serve.cli import stdin
from serve.cli.options import Json, ModelName, Seed, Stats, Stop, Temperature, TopP
from serve.exceptions import WrongUsage


def complete(
    text: Annotated[
        str | None, typer.Argument(help="How it begins. Text piped in follows.")
    ] = None,
    model: ModelName = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    seed: Seed = None,
    stop: Stop = None,
    stats: Stats = False,
    json: Json = False,
) -> None:
    """Go on with a text, without any chat template."""
    from serve.cli import local_completion

    beginning = stdin.joined(text, stdin.piped())
    if not beginning:
        raise WrongUsage("there is no text to go on with: give it as an argument, or pipe it in")
    with local_completion.open_model_timed(model) as (served, seconds):
        options = local_completion.make_options(temperature, top_p, max_tokens, seed, stop)
        reply = local_completion.LocalCompletion(
            served, local_completion.completion_prompt(served, beginning), options
        )
        local_completion.print_completion(
            served, reply, "text_completion", seconds, stats=stats, json=json
        )
