"""Files that are here for an hour, under names that nobody can guess.

What is drawn can be fetched by its URL, without a key: whoever has the URL has been given it. The
time that a file was written is all there is to know of it, so an hour ends as well while no server
runs: at the next start what is left over is gone.
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
    """Such files, in a folder of their own. Any thread may use it.

    Args:
        folder: where they are; made if it is not there.
    """

    def __init__(self, folder: Path):
        self._folder = make_private_folder(folder)
        self.clean_up()

    def put(self, data: bytes, format: str) -> str:
        """Keeps bytes for an hour, and gives their name, which ends in `.format`."""
        name = f"{new_id('img-')}.{format}"
        descriptor = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        return name

    def find(self, name: str) -> tuple[Path, int] | None:
        """Where a file is, and for how many seconds more; None if it is not, or not any more."""
        path = self._folder / name
        left = _seconds_left(path) if _NAME.fullmatch(name) else 0
        return (path, left) if left > 0 else None

    def drop(self, name: str) -> None:
        """Removes a file, if it is still there."""
        (self._folder / name).unlink(missing_ok=True)

    def clean_up(self) -> None:
        """Removes the files whose hour is over, and no others: those in there are not all ours."""
        for path in self._folder.iterdir():
            if _NAME.fullmatch(path.name) and _seconds_left(path) <= 0:
                path.unlink(missing_ok=True)


def _seconds_left(path: Path) -> int:
    try:
        return int(path.stat().st_mtime + LIFETIME_SECONDS - time.time())
    except FileNotFoundError:  # another server has swept it up
        return 0
