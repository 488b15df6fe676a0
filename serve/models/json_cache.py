"""Small JSON files that only save time: what was hashed, measured, chosen before.

Several processes may write one, so a file is never changed in place: the new text goes to a name
that nobody could have put something under beforehand, and takes the old one's place at once. Of two
that write at the same time the later wins, and the other's entry is found out again.
"""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """What is noted there; nothing, if there is no such file or it is damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def add(path: Path, key: str, value: Any) -> None:
    """Notes one thing more. Where we may not write it is not noted, and costs time again."""
    with contextlib.suppress(OSError):
        replace(path, json.dumps(read(path) | {key: value}, indent=1))


def replace(path: Path, text: str) -> None:
    """Puts a text in the place of a file, readable by its owner only: all of it or none.

    Raises:
        OSError: it could not be written.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
