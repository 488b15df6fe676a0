"""What outlives a server: objects in SQLite, and blobs as files beside it.

An object is a kind, an id and a JSON body; some have a parent, as the events of a job do. Objects
of a kind have an order, that of their making, by which clients page through them. One table holds
them all: whoever needs another database has six methods to write. One writer at a time, and what a
method has returned from is on the disk (a write-ahead log, flushed at each commit).

A blob is written under a temporary name, flushed, renamed, and only then told of by an object: a
kill at any moment leaves nothing half-written to be seen. What it leaves behind is swept up at the
next start; a lock on the file tells what another process is still writing.
"""

import contextlib
import json
import os
import secrets
import sqlite3
import string
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from serve.exceptions import Corrupt, Failure
from serve.models import disk
from serve.settings import make_private_folder

VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    id TEXT NOT NULL,
    parent TEXT NOT NULL,
    body TEXT,  -- JSON; NULL when removed: a page can still begin after it
    UNIQUE (kind, id)
);
CREATE INDEX IF NOT EXISTS by_parent ON objects (kind, parent, position);
"""

JsonObject = dict[str, Any]

_LETTERS = string.ascii_letters + string.digits
_NEW_PREFIX = ".new-"


def new_id(prefix: str, length: int = 24) -> str:
    """An id that nobody can guess: `file-` and 24 letters and digits, for one."""
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(length))


def file_record(id: str, filename: str, size: int, purpose: str) -> dict[str, Any]:
    """The body of an object of kind "file", which is what clients are shown of it."""
    return {
        "id": id,
        "object": "file",
        "bytes": size,
        "created_at": int(time.time()),
        "filename": filename,
        "purpose": purpose,
        "status": "processed",
        "status_details": None,
    }


class Store:
    """Objects and blobs of a data folder. Any thread may use it, and so may several processes.

    Args:
        home: the data folder.

    Raises:
        Corrupt: the database is damaged, or a newer version's.
    """

    def __init__(self, home: Path):
        self._blobs = make_private_folder(make_private_folder(home) / "files")
        self._path = home / "store.db"
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))  # what others may not read
        self._lock = threading.RLock()
        try:
            self._open()
        except sqlite3.OperationalError as error:  # locked, or no room: nothing is wrong with it
            raise Failure(f"{self._path} cannot be opened now: {error}") from None
        except sqlite3.DatabaseError as error:
            raise Corrupt(
                f"{self._path} cannot be read ({error}): move it out of the way"
            ) from None
        self._clean_up()

    def _open(self) -> None:
        self._database = sqlite3.connect(
            self._path, timeout=30, isolation_level=None, check_same_thread=False
        )
        run = self._database.execute
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        (version,) = run("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise sqlite3.DatabaseError(f"a newer version of Pellucid wrote it: {version}")
        self._database.executescript(SCHEMA)
        run(f"PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        """Lets go of the database."""
        with self._lock:
            self._database.close()

    # -- objects -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written inside is written together, or not at all; nobody writes between."""
        with self._lock:
            if self._database.in_transaction:
                yield
                return
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def add(self, kind: str, id: str, body: JsonObject, parent: str = "") -> None:
        """Makes an object, which comes last in the order of its kind."""
        with self.transaction():
            self._database.execute(
                "INSERT INTO objects (kind, id, parent, body) VALUES (?, ?, ?, ?)",
                (kind, id, parent, json.dumps(body)),
            )

    def get(self, kind: str, id: str) -> JsonObject | None:
        """The body of an object; None if there is none."""
        with self._lock:
            row = self._database.execute(
                "SELECT body FROM objects WHERE kind = ? AND id = ?", (kind, id)
            ).fetchone()
        return json.loads(row[0]) if row and row[0] is not None else None

    def update(self, kind: str, id: str, **fields: Any) -> JsonObject:
        """Sets fields of an object's body, and gives it.

        Raises:
            KeyError: there is none.
        """
        with self.transaction():
            if (body := self.get(kind, id)) is None:
                raise KeyError(id)
            body |= fields
            self._database.execute(
                "UPDATE objects SET body = ? WHERE kind = ? AND id = ?",
                (json.dumps(body), kind, id),
            )
        return body

    def remove(self, kind: str, id: str) -> bool:
        """Forgets an object, but not its place. Gives whether it was there."""
        with self.transaction():
            found = self._database.execute(
                "UPDATE objects SET body = NULL WHERE kind = ? AND id = ? AND body IS NOT NULL",
                (kind, id),
            )
            return found.rowcount > 0

    def page(
        self,
        kind: str,
        *,
        parent: str = "",
        after: str | None = None,
        limit: int | None = None,
        newest_first: bool = False,
        predicate: Callable[[JsonObject], bool] = lambda body: True,
    ) -> tuple[list[JsonObject], bool]:
        """Some objects of a kind, and whether more follow.

        Args:
            parent: whose they are.
            after: the id that the page begins behind; it may have been removed since.
            limit: how many at most; None for all.
            keep: which of them count.

        Raises:
            KeyError: there never was an object `after`.
        """
        with self._lock:
            start = None
            if after is not None:
                row = self._database.execute(
                    "SELECT position FROM objects WHERE kind = ? AND parent = ? AND id = ?",
                    (kind, parent, after),
                ).fetchone()
                if row is None:
                    raise KeyError(after)
                start = row[0]
            sign, order = ("<", "DESC") if newest_first else (">", "ASC")
            rows = self._database.execute(
                "SELECT body FROM objects WHERE kind = ? AND parent = ? AND body IS NOT NULL"
                f" AND (? IS NULL OR position {sign} ?) ORDER BY position {order}",
                (kind, parent, start, start),
            )
            found: list[JsonObject] = []
            for (text,) in rows:
                if predicate(body := json.loads(text)):
                    if len(found) == limit:
                        return found, True
                    found.append(body)
        return found, False

    # -- blobs ---------------------------------------------------------------------------------

    def blob_path(self, id: str) -> Path:
        """Where the bytes of an object of kind "file" are."""
        return self._blobs / id

    @contextlib.contextmanager
    def open_blob(self, id: str) -> "Iterator[BlobWriter]":
        """A blob to be written; what is not kept by the end is gone."""
        incoming = BlobWriter(self, id, _locked_new(self._blobs / f"{_NEW_PREFIX}{id}"))
        try:
            yield incoming
        finally:
            incoming.close()

    def delete_file(self, id: str) -> bool:
        """Removes a file, the object first. Gives whether it was there."""
        was_there = self.remove("file", id)
        if was_there:
            self.blob_path(id).unlink(missing_ok=True)
        return was_there

    def _clean_up(self) -> None:
        """Removes what a kill left behind: blobs that no object tells of and nobody is writing."""
        for path in self._blobs.iterdir():
            if not path.name.startswith(_NEW_PREFIX) and self.get("file", path.name) is not None:
                continue
            if not path.exists() or (lock := disk.try_lock(path)) is None:
                continue
            if self.get("file", path.name) is None:  # nor was it told of a moment ago
                path.unlink(missing_ok=True)
            os.close(lock)


class BlobWriter:
    """The bytes of a file on their way in; see `Store.receiving`."""

    def __init__(self, store: Store, id: str, file: BinaryIO):
        self._store, self.id, self._file = store, id, file
        self.size = 0

    def write(self, data: bytes) -> None:
        """Appends bytes."""
        self._file.write(data)
        self.size += len(data)

    def commit(self, body: JsonObject) -> None:
        """Makes the blob a file with this body; once this returns, it outlives a crash."""
        self._file.flush()
        os.fsync(self._file.fileno())
        path = self._store.blob_path(self.id)
        path.with_name(_NEW_PREFIX + path.name).rename(path)
        disk.flush(path.parent)
        self._store.add("file", self.id, body)  # the lock on the blob holds until it is in there

    def close(self) -> None:
        """Lets go; removes what was not kept."""
        path = self._store.blob_path(self.id)
        path.with_name(_NEW_PREFIX + path.name).unlink(missing_ok=True)
        self._file.close()


def _locked_new(path: Path) -> BinaryIO:
    """A new file to write, locked before a sweep could take it for left behind."""
    while True:
        descriptor = disk.lock(path)
        if os.fstat(descriptor).st_nlink:
            os.ftruncate(descriptor, 0)
            return os.fdopen(descriptor, "wb")
        os.close(descriptor)
