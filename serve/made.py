"""Models the user made: folders of their own in the data folder, which the API may delete.

Fine-tuning puts a model here. A model of the catalogue, or one given by its path on the command
line, is not here, and no request can delete it.
"""

import shutil
from pathlib import Path
from urllib.parse import quote


def folder(home: Path, id: str) -> Path:
    """Where the user's model with this id stands. An id may hold any character, a name may not."""
    return home / "made" / quote(id, safe="").replace(".", "%2E")


def exists(home: Path, id: str) -> bool:
    """Whether the user made a model with this id."""
    return folder(home, id).is_dir()


def delete(home: Path, id: str) -> None:
    """Removes a model's files: out of sight first, then for good."""
    path = folder(home, id)
    doomed = path.with_name(f".deleted-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)
