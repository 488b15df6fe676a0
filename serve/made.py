"""Models the user made: folders of their own in the data folder, which the API may delete.

Fine-tuning puts a model here: an adapter in PEFT's layout, which other tools can open, and beside
it a card that says what it is and which weights it belongs to. A folder appears whole or not at
all. A model of the catalogue, or one given by its path on the command line, is not here, and no
request can delete it.
"""

import contextlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

CARD = "card.json"


@dataclass(frozen=True)
class Card:
    """What is known of a model that was made here.

    Attributes:
        id: what it is called.
        base: the id of the model it was trained on.
        path: where its files were.
        weights: SHA-256 of them, in hex: an id, or a path, can come to mean other ones.
        created: seconds since 1970.
        job: the id of the job that made it.
        step: after how many steps.
    """

    id: str
    base: str
    path: str
    weights: str
    created: int
    job: str
    step: int


def folder(home: Path, id: str) -> Path:
    """Where the user's model with this id stands. An id may hold any character, a name may not."""
    return home / "made" / quote(id, safe="").replace(".", "%2E")


def exists(home: Path, id: str) -> bool:
    """Whether the user made a model with this id."""
    return folder(home, id).is_dir()


def names(home: Path) -> frozenset[str]:
    """The names of the folders that hold a model."""
    try:
        return frozenset(name for name in os.listdir(home / "made") if not name.startswith("."))
    except FileNotFoundError:
        return frozenset()


def read(folder: Path) -> Card:
    """The card of the model in a folder.

    Raises:
        OSError: there is none.
        ValueError: it is damaged.
    """
    try:
        return Card(**json.loads((folder / CARD).read_text("utf-8")))
    except TypeError as error:
        raise ValueError(f"{folder / CARD} is damaged: {error}") from None


def put(home: Path, card: Card, adapter: Path) -> None:
    """Makes a model of an adapter: copies its files, flushes them, and only then shows them.

    One that is there already stays as it is.

    Args:
        adapter: a folder with the files of an adapter.
    """
    place = folder(home, card.id)
    if place.exists():
        return
    fresh = place.with_name(f".new-{place.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for file in sorted(adapter.iterdir()):
        shutil.copyfile(file, fresh / file.name)
    (fresh / CARD).write_text(json.dumps(asdict(card), indent=1), "utf-8")
    for path in (*fresh.iterdir(), fresh):
        _flush(path)
    fresh.rename(place)
    _flush(place.parent)


def put_away(home: Path, id: str) -> Path:
    """Takes a model out of sight, at once and for good. Gives the folder that is left to remove.

    Raises:
        OSError: it could not be done; the model is there as before.
    """
    path = folder(home, id)
    doomed = path.with_name(f".deleted-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    return doomed


def delete(home: Path, id: str) -> None:
    """Removes a model and its files; there may be none."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(put_away(home, id))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
