"""`pellucid rm`: deletes pulled models from the disk."""

import shutil
from typing import Annotated

import typer

from serve import settings
from serve.cli import console
from serve.cli.options import Json
from serve.exceptions import NotFound, WrongUsage
from serve.models import adapters, catalogue, disk, hub


def rm(
    ids: Annotated[
        list[str],
        typer.Argument(metavar="ID...", help="A pulled model of `pellucid models`."),
    ],
    json: Json = False,
) -> None:
    """Delete pulled models. Running servers stop serving them."""
    from serve.models import download

    home = settings.data_folder()
    known_models = catalogue.load(settings.config_folder())
    freed: list[dict[str, object]] = []
    for id in ids:
        entry = known_models.get(id)
        if entry is not None and entry.folder is not None:
            raise WrongUsage(f"{entry.id} is part of Pellucid: it cannot be deleted")
        if entry is not None and entry.files:
            folder = download.model_folder(entry, home)
            if not folder.is_dir():
                raise NotFound(
                    f"{entry.id} is not pulled: `pellucid models` lists the pulled models"
                )
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            shutil.rmtree(folder)
            disk.mark_changed(home)
        else:
            name = entry.hub if entry is not None and entry.hub else id
            named = [record for record in hub.records(home) if name in (record.name, record.id)]
            if not named and adapters.exists(home, id):
                raise WrongUsage(f"{id} is fine-tuned: run `pellucid finetune delete {id}`")
            if not named:
                raise NotFound(f"{id} is not pulled: `pellucid models` lists the pulled models")
            size = sum(hub.remove(record, home) for record in named)
        freed.append({"id": entry.id if entry else id, "freed": size})
        console.info(f"deleted {id}: {disk.human_size(size)}")
    if json:
        console.write_json({"models": freed})
