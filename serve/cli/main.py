"""The `pellucid` command: its parser, its exit codes, and the table of its commands.

Answers go to stdout and everything else to stderr; `--json` makes the answer one JSON object; exit
codes are those of `exceptions.py`. A command imports what is heavy when it runs: help is immediate.
"""

import io
import os
import sys
from typing import Annotated, Any

import typer
import typer.core

from serve.cli import (
    bench,
    chat,
    complete,
    console,
    embed,
    finetune,
    image,
    inspect_model,
    keys,
    models,
    pull,
    serve,
    tokenize,
    transcribe,
)
from serve.exceptions import Failure
from serve.models import catalogue


class CommandGroup(typer.core.TyperGroup):
    """The group of all commands, which turns what goes wrong in one into its exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except (Failure, catalogue.CatalogueError) as error:
            console.error(str(error))
            raise typer.Exit(getattr(error, "exit_code", 1)) from None
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader has all it wanted. Point stdout elsewhere, or closing it would fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except OSError as error:  # names the file: a folder that is not ours, a full disk
            console.error(str(error))
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=CommandGroup,
    help="The model stack behind the OpenAI API, from scratch, on this machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (
    bench.bench,
    embed.embed,
    transcribe.transcribe,
    image.image,
    inspect_model.inspect,
    serve.serve,
    chat.chat,
    complete.complete,
    tokenize.tokenize,
    models.models,
    pull.pull,
):
    app.command()(command)
app.add_typer(keys.app, name="keys")
app.add_typer(finetune.app, name="finetune")


def main() -> None:
    """The entry point of the `pellucid` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Where the locale cannot say a character, an escape is better than a crash.
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="pellucid")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"pellucid {version('pellucid')}")
        except PackageNotFoundError:
            print("pellucid, run from its folder without being installed")
        raise typer.Exit


@app.callback()
def _root_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    pass
