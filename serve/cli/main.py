"""The `pellucid` command: its parser, its exit codes, and the table of its commands.

Results go to stdout, everything else to stderr. `--json` prints the result as one JSON object. Exit
codes are those of `exceptions.py`. A command imports heavy modules only when it runs, so that
`--help` is fast.
"""

import io
import os
import sys
from typing import Annotated, Any

import typer
import typer.core

from serve.cli import (
    batch,
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
    old_flags,
    ps,
    pull,
    rm,
    serve,
    tokenize,
    transcribe,
)
from serve.exceptions import Failure
from serve.models import catalogue


class CommandGroup(typer.core.TyperGroup):
    """The root command: renames old flags, and turns exceptions into exit codes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, with old flags replaced (see `old_flags`)."""
        command: Any = self
        for name in old_flags.command_of(args):
            command = command.get_command(ctx, name)
        takes_value = {
            flag
            for option in command.params
            if not getattr(option, "is_flag", True)  # positional arguments have no `is_flag`
            for flag in option.opts
        }
        args, used = old_flags.rename(args, takes_value)
        for old, new in used.items():
            console.info(f"{old} is now {new}")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; exit with the code of the exception that it raises."""
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
            # The reader, such as `head`, has closed the pipe. Python flushes stdout once more at
            # exit, which would fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except OSError as error:  # the message names the file
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
    pull.pull,
    rm.rm,
    ps.ps,
    batch.batch,
):
    app.command()(command)
app.add_typer(models.app, name="models")
app.add_typer(keys.app, name="keys")
app.add_typer(finetune.app, name="finetune")


def main() -> None:
    """Run the `pellucid` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Write characters that the locale cannot encode as escapes.
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="pellucid")


def _print_version(is_set: bool) -> None:
    if is_set:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"pellucid {version('pellucid')}")
        except PackageNotFoundError:
            print("pellucid, run from its source folder without being installed")
        raise typer.Exit


@app.callback()
def _root_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass
