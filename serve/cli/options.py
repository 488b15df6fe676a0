"""Options that several commands have."""

from typing import Annotated, Any

import typer


def model_option(help: str) -> Any:
    """Return the option `--model`."""
    return typer.Option("--model", "-m", metavar="ID", help=help)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Stats = Annotated[bool, typer.Option("--stats", help="Print speed and counts to stderr.")]

ModelName = Annotated[
    str | None,
    model_option(
        "A model of `pellucid models`, or NAME=PATH for a GGUF file or a Hugging Face folder."
    ),
]
Temperature = Annotated[
    float | None, typer.Option(help="0 for the likeliest token. [default: the model's]")
]
TopP = Annotated[float | None, typer.Option(help="Keep this much probability, likeliest first.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer. Repeatable.")]
