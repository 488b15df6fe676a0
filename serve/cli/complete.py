"""`pellucid complete`: continues a text."""

from typing import Annotated

import typer

from serve.cli import stdin
from serve.cli.options import Json, ModelName, Seed, Stats, Stop, Temperature, TopP
from serve.exceptions import WrongUsage


def complete(
    text: Annotated[
        str | None, typer.Argument(help="The text to continue. Piped text is appended to it.")
    ] = None,
    model: ModelName = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum length of the continuation, in tokens.")
    ] = 128,
    seed: Seed = None,
    stop: Stop = None,
    stats: Stats = False,
    json: Json = False,
) -> None:
    """Continue a text, without a chat template."""
    from serve.cli import local_completion

    prompt = stdin.joined(text, stdin.piped())
    if not prompt:
        raise WrongUsage("no text to continue; give it as an argument, or pipe it in")
    with local_completion.open_model_timed(model) as (served, seconds):
        options = local_completion.make_options(temperature, top_p, max_tokens, seed, stop)
        reply = local_completion.LocalCompletion(
            served, local_completion.completion_prompt(served, prompt), options
        )
        local_completion.print_completion(
            served, reply, "text_completion", seconds, stats=stats, json=json
        )
