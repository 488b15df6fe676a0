"""`pellucid pull`: fetch models."""

from typing import Annotated

import typer

from serve import settings
from serve.cli import console
from serve.cli.options import Json
from serve.exceptions import NotFound, WrongUsage
from serve.models import catalogue


def pull(
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID]...", help="[default: the chat model]"),
    ] = None,
    all: Annotated[bool, typer.Option("--all", help="Every model of `pellucid models`.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Fetch nothing; hash what is here again, in full.")
    ] = False,
    json: Json = False,
) -> None:
    """Fetch models, checked; print where they are."""
    from serve.models import download, hub

    if all and ids:
        raise WrongUsage("--all already means every model: leave the ids out")
    home = settings.data_folder()
    known = catalogue.load(settings.config_folder())
    done = []
    for id in known.models if all else ids or [known.default]:
        model = known.get(id)
        if id.startswith("hf:") and not verify:
            path = hub.pull(id, home, notify=console.info)
        elif model is None:
            raise NotFound(download.unknown_model_message(id, known))
        elif verify:
            path = download.verify(model, home)
        else:
            with console.DownloadProgress(model.id) as progress:
                path = download.pull(model, home, notify=console.info, progress=progress)
        done.append({"id": model.id if model else id, "path": str(path)})
    if json:
        console.write_json({"models": done})
    else:
        for entry in done:
            print(entry["path"])
