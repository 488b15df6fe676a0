"""Which server works on an object, if several servers share a data folder.

A server holds the lock of a file of its own as long as it runs, and the objects that it works on
have its id. The system releases the lock when the process ends, even after SIGKILL. Then another
server may continue the work, or report it as lost.
"""

import os
from pathlib import Path

from serve.jobs.store import new_id
from serve.models import disk
from serve.settings import make_private_folder


class ServerLock:
    """The lock of this server; `id` names it.

    Args:
        home: the data folder.
    """

    def __init__(self, home: Path):
        self._folder = make_private_folder(home / "servers")
        for path in self._folder.iterdir():
            self._remove_if_free(path)
        self.id = new_id("server-")
        self._descriptor = disk.lock(self._folder / self.id)

    def has_ended(self, id: str) -> bool:
        """Return whether the server with an id has ended."""
        path = self._folder / id
        return not path.is_file() or self._remove_if_free(path)

    def close(self) -> None:
        """Release the lock: the work of this server can be taken over."""
        (self._folder / self.id).unlink(missing_ok=True)
        os.close(self._descriptor)

    def _remove_if_free(self, path: Path) -> bool:
        if (descriptor := disk.try_lock(path)) is None:
            return False
        path.unlink(missing_ok=True)
        os.close(descriptor)
        return True
