"""`pellucid pull`: downloads models."""

from typing import Annotated

import typer

from serve import settings
from serve.cli import console
from serve.cli.check_model import check_files
from serve.cli.options import Json
from serve.exceptions import NotFound, WrongUsage
from serve.models import catalogue


def pull(
    ids: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ID]...",
            help="A model of `pellucid models`, or hf:OWNER/REPO[@REVISION][:FILE] of the Hugging "
            "Face Hub. [default: the chat model]",
        ),
    ] = None,
    all: Annotated[bool, typer.Option("--all", help="Every model of `pellucid models`.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Download nothing; check the hashes of local files.")
    ] = False,
    json: Json = False,
) -> None:
    """Download models, check their hashes, and print their paths.

    A model of the hub that cannot be served is kept, and the exit code is 3.
    """
    from serve.models import download, hub

    if all and ids:
        raise WrongUsage("--all pulls every model; leave the ids out")
    home = settings.data_folder()
    known_models = catalogue.load(settings.config_folder())
    entries = []
    for id in known_models.models if all else ids or [known_models.default]:
        model = known_models.get(id)
        record = hub.find(id, home) if model is None else None
        name = record.name if record else id
        if name.startswith(hub.PREFIX) and verify:
            path = hub.verify(name, home)
        elif name.startswith(hub.PREFIX):
            with console.DownloadProgress(name) as progress:
                path = hub.pull(name, home, notify=console.info, progress=progress).path
            check_files(path)
        elif model is None:
            raise NotFound(download.unknown_model_message(id, known_models))
        elif verify:
            path = download.verify(model, home)
        else:
            with console.DownloadProgress(model.id) as progress:
                path = download.pull(model, home, notify=console.info, progress=progress)
        entries.append({"id": model.id if model else id, "path": str(path)})
    if json:
        console.write_json({"models": entries})
    else:
        for entry in entries:
            print(entry["path"])
