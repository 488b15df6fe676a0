"""`pellucid keys`: creates, lists and deletes the API keys of a server."""

import time
from typing import Annotated

import typer

from serve import settings
from serve.api import auth
from serve.cli import console
from serve.cli.options import Json
from serve.exceptions import Corrupt, NotFound, WrongUsage

app = typer.Typer(no_args_is_help=True, help="Create, list and delete API keys.")

Name = Annotated[str, typer.Argument(help="The name of the key: its user or its purpose.")]


@app.command()
def create(name: Name, json: Json = False) -> None:
    """Create a key and print it. From then on, servers on this machine require a key."""
    home = settings.make_private_folder(settings.data_folder())
    is_first = not auth.read(home)
    try:
        key = auth.create(home, name)
    except ValueError as error:
        raise WrongUsage(str(error)) from None
    console.write_result({"name": name, "key": key}, key, json=json)
    console.info("Copy the key now: only its digest is stored.")
    if is_first:
        console.info(
            "This is the first key: servers on this machine now refuse requests without a key."
        )


@app.command("list")
def list_(json: Json = False) -> None:
    """List the names of the keys."""
    try:
        records = auth.read(settings.data_folder())
    except ValueError as error:
        raise Corrupt(str(error)) from None
    if json:
        keys = [{"name": key.name, "hint": key.hint, "created": key.created} for key in records]
        console.write_json({"keys": keys})
        return
    rows = [
        (key.name, f"...{key.hint}", time.strftime("%Y-%m-%d", time.localtime(key.created)))
        for key in records
    ]
    print(console.table(("NAME", "ENDS IN", "CREATED"), rows))


@app.command()
def delete(name: Name) -> None:
    """Delete a key. Servers on this machine refuse it at once."""
    try:
        auth.delete(settings.data_folder(), name)
    except LookupError as error:
        raise NotFound(error.args[0]) from None
