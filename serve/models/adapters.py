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
from urllib.parse import quote, unquote

from serve.models import disk

METADATA_FILE = "card.json"
CHECKPOINT_INFIX = (
    ":ckpt-step-"  # between a model's id and a number: the model as it was after that step
)
MAX_NAME_BYTES = 255  # bytes of a file's name, on nearly every file system
_NEW_PREFIX, _DELETED_PREFIX = ".new-", ".deleted-"


@dataclass(frozen=True)
class AdapterMetadata:
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


def adapter_folder(home: Path, id: str) -> Path:
    """Where the user's model with this id stands. An id may hold any character, a name may not."""
    return home / "made" / quote(id, safe="").replace(".", "%2E")


def exists(home: Path, id: str) -> bool:
    """Whether the user made a model with this id."""
    return os.path.isdir(
        adapter_folder(home, id)
    )  # unlike Path's, also where the name is far too long


def is_valid_id(id: str) -> bool:
    """Whether a folder can be named after a model, and after its checkpoints."""
    longest = adapter_folder(Path(), f"{id}{CHECKPOINT_INFIX}{10**9}")
    return len(f"{_DELETED_PREFIX}{longest.name}") <= MAX_NAME_BYTES


def ids_with_checkpoints(home: Path, id: str) -> list[str]:
    """Those of a model and its checkpoints that are here, by their ids."""
    prefix = adapter_folder(home, id + CHECKPOINT_INFIX).name
    steps = sorted(name for name in folder_names(home) if name.startswith(prefix))
    return [id] * exists(home, id) + [unquote(name) for name in steps]


def folder_names(home: Path) -> frozenset[str]:
    """The names of the folders that hold a model."""
    try:
        return frozenset(name for name in os.listdir(home / "made") if not name.startswith("."))
    except FileNotFoundError:
        return frozenset()


def read_metadata(folder: Path) -> AdapterMetadata:
    """The card of the model in a folder.

    Raises:
        OSError: there is none.
        ValueError: it is damaged.
    """
    try:
        return AdapterMetadata(**json.loads((folder / METADATA_FILE).read_text("utf-8")))
    except TypeError as error:
        raise ValueError(f"{folder / METADATA_FILE} is damaged: {error}") from None


def list_metadata(home: Path) -> list[AdapterMetadata]:
    """The cards of all models that are here, oldest first; without what is damaged."""
    found: list[AdapterMetadata] = []
    for name in folder_names(home):
        with contextlib.suppress(OSError, ValueError):  # deleted this moment, or not of our making
            found.append(read_metadata(home / "made" / name))
    return sorted(found, key=lambda card: (card.created, card.step, card.id))


def save(home: Path, metadata: AdapterMetadata, adapter: Path) -> None:
    """Makes a model of an adapter: copies its files, flushes them, and only then shows them.

    One that is there already stays as it is.

    Args:
        adapter: a folder with the files of an adapter.
    """
    place = adapter_folder(home, metadata.id)
    if place.exists():
        return
    fresh = place.with_name(_NEW_PREFIX + place.name)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for file in sorted(adapter.iterdir()):
        shutil.copyfile(file, fresh / file.name)
    (fresh / METADATA_FILE).write_text(json.dumps(asdict(metadata), indent=1), "utf-8")
    for path in (*fresh.iterdir(), fresh):
        disk.flush(path)
    fresh.rename(place)
    disk.flush(place.parent)


def hide(home: Path, id: str) -> Path:
    """Takes a model out of sight, at once and for good. Gives the folder that is left to remove.

    Raises:
        OSError: it could not be done; the model is there as before.
    """
    path = adapter_folder(home, id)
    doomed = path.with_name(_DELETED_PREFIX + path.name)
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    return doomed


def delete(home: Path, id: str) -> None:
    """Removes a model and its files; there may be none."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(hide(home, id))


def clean_up(home: Path) -> None:
    """Removes what a kill left half made or half deleted, while nobody makes a model."""
    with contextlib.suppress(FileNotFoundError):
        for path in (home / "made").iterdir():
            if path.name.startswith((_NEW_PREFIX, _DELETED_PREFIX)):
                shutil.rmtree(path, ignore_errors=True)
