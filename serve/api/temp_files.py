"""Temporary files that expire after an hour, with names that cannot be guessed.

The URL of a generated image works without a key, because its name is secret. The age of a file is
its modification time, so files also expire while no server runs; the next start deletes them.
"""

import os
import re
import time
from pathlib import Path

from serve.jobs.store import new_id
from serve.settings import make_private_folder

LIFETIME_SECONDS = 3600

_NAME = re.compile(r"img-[A-Za-z0-9]{24}\.[a-z]{3,4}")


class TempFiles:
    """A folder of temporary files. It is thread-safe.

    Args:
        folder: The folder; created if missing.
    """

    def __init__(self, folder: Path):
        self._folder = make_private_folder(folder)
        self.clean_up()

    def put(self, data: bytes, format: str) -> str:
        """Store bytes for an hour and return their file name, which ends in `.{format}`."""
        name = f"{new_id('img-')}.{format}"
        descriptor = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        return name

    def find(self, name: str) -> tuple[Path, int] | None:
        """Return path and remaining lifetime in seconds of a file; None if missing or expired."""
        path = self._folder / name
        remaining = _seconds_left(path) if _NAME.fullmatch(name) else 0
        return (path, remaining) if remaining > 0 else None

    def drop(self, name: str) -> None:
        """Delete a file, if it exists."""
        (self._folder / name).unlink(missing_ok=True)

    def clean_up(self) -> None:
        """Delete expired files. Other files in the folder are left alone."""
        for path in self._folder.iterdir():
            if _NAME.fullmatch(path.name) and _seconds_left(path) <= 0:
                path.unlink(missing_ok=True)


def _seconds_left(path: Path) -> int:
    try:
        return int(path.stat().st_mtime + LIFETIME_SECONDS - time.time())
    except FileNotFoundError:  # another server has deleted it
        return 0
