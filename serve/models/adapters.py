"""Fine-tuned models: LoRA adapters in the data folder, which API requests can delete.

Each fine-tuned model is a folder with an adapter in PEFT's layout, which other tools can open, and
a metadata file with the model's id and the hash of the base model's weights. The folder is renamed
into place when all its files are written. Catalogue models, and models given by their path on the
command line, are not stored here, and no request can delete them.
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
CHECKPOINT_INFIX = ":ckpt-step-"  # between a model's id and the training step of a checkpoint
MAX_NAME_BYTES = 255  # of a file name, on nearly every file system
_NEW_PREFIX, _DELETED_PREFIX = ".new-", ".deleted-"


@dataclass(frozen=True)
class AdapterMetadata:
    """The metadata of a fine-tuned model, as stored in `METADATA_FILE`.

    Attributes:
        id: the id of the model.
        base: the id of the base model.
        path: the path of the base model's files at training time.
        weights: the SHA-256 of those files, in hex. Loading compares it, because `base` and `path`
            can refer to other weights by then.
        created: seconds since 1970.
        job: the id of the fine-tuning job.
        step: the training step.
    """

    id: str
    base: str
    path: str
    weights: str
    created: int
    job: str
    step: int


def adapter_folder(home: Path, id: str) -> Path:
    """Return the folder of a fine-tuned model, with the id escaped to a valid file name."""
    return home / "made" / quote(id, safe="").replace(".", "%2E")


def exists(home: Path, id: str) -> bool:
    """Whether a fine-tuned model has this id."""
    # Unlike Path.is_dir, it also takes names that are too long for the file system.
    return os.path.isdir(adapter_folder(home, id))


def is_valid_id(id: str) -> bool:
    """Whether the folder names of this id and of its checkpoints fit into `MAX_NAME_BYTES`."""
    longest = adapter_folder(Path(), f"{id}{CHECKPOINT_INFIX}{10**9}")
    return len(f"{_DELETED_PREFIX}{longest.name}") <= MAX_NAME_BYTES


def ids_with_checkpoints(home: Path, id: str) -> list[str]:
    """Return the ids of a fine-tuned model and its checkpoints, without those that do not exist."""
    prefix = adapter_folder(home, id + CHECKPOINT_INFIX).name
    steps = sorted(name for name in folder_names(home) if name.startswith(prefix))
    return [id] * exists(home, id) + [unquote(name) for name in steps]


def folder_names(home: Path) -> frozenset[str]:
    """Return the names of the folders that hold a fine-tuned model."""
    try:
        return frozenset(name for name in os.listdir(home / "made") if not name.startswith("."))
    except FileNotFoundError:
        return frozenset()


def read_metadata(folder: Path) -> AdapterMetadata:
    """Return the metadata of the model in a folder.

    Raises:
        OSError: the metadata file cannot be read.
        ValueError: the metadata file is damaged.
    """
    try:
        return AdapterMetadata(**json.loads((folder / METADATA_FILE).read_text("utf-8")))
    except TypeError as error:
        raise ValueError(f"{folder / METADATA_FILE} is damaged: {error}") from None


def list_metadata(home: Path) -> list[AdapterMetadata]:
    """Return the metadata of all fine-tuned models, oldest first, skipping damaged ones."""
    adapters: list[AdapterMetadata] = []
    for name in folder_names(home):
        with contextlib.suppress(OSError, ValueError):  # just deleted, or not written by Pellucid
            adapters.append(read_metadata(home / "made" / name))
    return sorted(adapters, key=lambda metadata: (metadata.created, metadata.step, metadata.id))


def save(home: Path, metadata: AdapterMetadata, adapter: Path) -> None:
    """Store an adapter as a fine-tuned model; do nothing if the id exists.

    The files are copied and flushed under a temporary name, and then renamed.

    Args:
        home: the data folder.
        metadata: the metadata of the model.
        adapter: the folder with the files of the adapter.

    Raises:
        OSError: the files could not be copied; no model appears.
    """
    folder = adapter_folder(home, metadata.id)
    if folder.exists():
        return
    new_folder = folder.with_name(_NEW_PREFIX + folder.name)
    shutil.rmtree(new_folder, ignore_errors=True)
    new_folder.mkdir(parents=True)
    for file in sorted(adapter.iterdir()):
        shutil.copyfile(file, new_folder / file.name)
    (new_folder / METADATA_FILE).write_text(json.dumps(asdict(metadata), indent=1), "utf-8")
    for path in (*new_folder.iterdir(), new_folder):
        disk.flush(path)
    new_folder.rename(folder)
    disk.flush(folder.parent)


def hide(home: Path, id: str) -> Path:
    """Rename the folder of a fine-tuned model so that it is no longer listed.

    Returns:
        The new path of the folder, which the caller removes.

    Raises:
        OSError: the folder could not be renamed; the model is unchanged.
    """
    path = adapter_folder(home, id)
    hidden = path.with_name(_DELETED_PREFIX + path.name)
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    return hidden


def delete(home: Path, id: str) -> None:
    """Delete a fine-tuned model and its files, if it exists."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(hide(home, id))


def clean_up(home: Path) -> None:
    """Remove folders that a killed process left half written or half deleted.

    Call it while no other process saves a model.
    """
    with contextlib.suppress(FileNotFoundError):
        for path in (home / "made").iterdir():
            if path.name.startswith((_NEW_PREFIX, _DELETED_PREFIX)):
                shutil.rmtree(path, ignore_errors=True)
