"""Options that several commands share."""

from typing import Annotated, Any

import typer


def model_option(help: str) -> Any:
    """Return the option `--model` with a help text."""
    return typer.Option("--model", "-m", metavar="ID", help=help)


DEFAULT_HOST = "http://127.0.0.1:8000"
ServerHost = Annotated[
    str, typer.Option("--host", envvar="PELLUCID_HOST", help="The server to ask.")
]
ServerKey = Annotated[
    str, typer.Option("--api-key", envvar="PELLUCID_API_KEY", help="A key of the server.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Stats = Annotated[bool, typer.Option("--stats", help="Print speed and counts to stderr.")]

ModelName = Annotated[
    str | None,
    model_option(
        "A model of `pellucid models`, NAME=PATH for a GGUF file or a Hugging Face folder, or "
        "hf:OWNER/REPO[@REVISION][:FILE] of the Hugging Face Hub."
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(help="Sampling temperature; 0 for greedy. [default: that of the model]"),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Nucleus sampling: keep the most likely tokens up to this probability."),
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer. Repeatable.")]
