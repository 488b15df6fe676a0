"""`pellucid chat`: answers one question, or holds a conversation at a terminal (see `repl`)."""

import sys
from typing import Annotated

import typer

from serve.cli import stdin
from serve.cli.options import Json, ModelName, Seed, Stats, Stop, Temperature, TopP
from serve.exceptions import WrongUsage


def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="The question. Piped text is appended to it.")
    ] = None,
    model: ModelName = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System message.")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum length of the answer, in tokens.")
    ] = None,
    seed: Seed = None,
    stop: Stop = None,
    stats: Stats = False,
    json: Json = False,
) -> None:
    """Answer one question, or, without a question, start a conversation."""
    from serve.cli import local_completion, repl

    piped, system = stdin.piped(), stdin.require_utf8(system)
    question = stdin.joined(prompt, piped.removesuffix("\n") if piped else None)
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    if question is None and (json or not at_terminal):
        raise WrongUsage("no question; give it as an argument, or pipe it in")
    with local_completion.open_model_timed(model) as (served, seconds):
        options = local_completion.make_options(temperature, top_p, max_tokens, seed, stop)
        conversation = repl.Conversation(default=options, system=system, stats=stats)
        if question is None:
            repl.run(
                served,
                conversation,
                read=_read_line,
                stats_line=lambda r: local_completion.stats_line(served, r),
            )
            return
        prompt_ids = local_completion.chat_prompt(served, conversation.messages(question))
        reply = local_completion.LocalCompletion(served, prompt_ids, options, is_chat=True)
        local_completion.print_completion(
            served, reply, "chat.completion", seconds, stats=stats, json=json
        )


def _read_line(prompt: str) -> str:
    import readline  # noqa: F401  adds line editing and history to `input`

    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)  # stdout holds only the answers
    return input()
