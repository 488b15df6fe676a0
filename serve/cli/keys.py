"""`pellucid keys`: make, list and delete the keys that clients show a server."""

import time
from typing import Annotated

import typer

from serve import settings
from serve.api import auth
from serve.cli import console
from serve.cli.options import Json
from serve.exceptions import Corrupt, NotFound, WrongUsage

app = typer.Typer(no_args_is_help=True, help="Make, list and delete API keys.")

Name = Annotated[str, typer.Argument(help="Who or what the key is for.")]


@app.command()
def create(name: Name, json: Json = False) -> None:
    """Make a key and print it, this once. From then on, servers here ask for one."""
    home = settings.make_private_folder(settings.data_folder())
    is_first = not auth.read(home)
    try:
        key = auth.create(home, name)
    except ValueError as error:
        raise WrongUsage(str(error)) from None
    console.write_result({"name": name, "key": key}, key, json=json)
    console.info("Keep it now: only its digest is stored here.")
    if is_first:
        console.info("It is the first: servers on this machine now refuse requests without a key.")


@app.command("list")
def list_(json: Json = False) -> None:
    """List the keys' names."""
    try:
        found = auth.read(settings.data_folder())
    except ValueError as error:
        raise Corrupt(str(error)) from None
    if json:
        listed = [{"name": key.name, "hint": key.hint, "created": key.created} for key in found]
        console.write_json({"keys": listed})
        return
    rows = [
        (key.name, f"...{key.hint}", time.strftime("%Y-%m-%d", time.localtime(key.created)))
        for key in found
    ]
    print(console.table(("NAME", "ENDS IN", "MADE"), rows))


@app.command()
def delete(name: Name) -> None:
    """Forget a key: it stops working at once."""
    try:
        auth.delete(settings.data_folder(), name)
    except LookupError as error:
        raise NotFound(error.args[0]) from None
