"""The database of a server: objects in SQLite, and blobs as files.

An object has a kind ("file", "job", "event", "checkpoint"), an id and a JSON body; some have a
parent, such as the events of a job. Objects of a kind are ordered by creation, and clients page
through them. One table has all objects, so that a port to another database replaces only six
methods. There is one writer at a time. When a method returns, its change is on the disk
(write-ahead log, flushed at each commit).

A blob is written under a temporary name, flushed and renamed before an object refers to it, so that
a killed process leaves no incomplete blob under a final name. The next start removes the temporary
files of killed processes; those of running processes are locked.
"""

import contextlib
import json
import os
import secrets
import sqlite3
import string
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
MAX_POSITION = 2**63 - 1
ID_LENGTH = 24  # without the prefix


def new_id(prefix: str, length: int = ID_LENGTH) -> str:
    """Return a random id: the prefix, and `length` letters and digits that cannot be guessed."""
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(length))


def file_record(id: str, filename: str, size: int, purpose: str) -> dict[str, Any]:
    """Return the body of an object of kind "file", in the format of OpenAI's API.

    Args:
        id: the id of the file.
        filename: the name that the client gave it.
        size: its size in bytes.
        purpose: its purpose, such as "fine-tune".
    """
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
    """The objects and blobs of a data folder. Several threads and processes may use it.

    Args:
        home: the data folder.

    Raises:
        Corrupt: the database is damaged, or was written by a newer version.
        Failure: the database is locked, or the disk is full.
    """

    def __init__(self, home: Path):
        self._blobs = make_private_folder(make_private_folder(home) / "files")
        self._path = home / "store.db"
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))  # private to the user
        self._lock = threading.RLock()
        self._has_erased = False  # since the last commit
        try:
            self._open()
        except sqlite3.OperationalError as error:  # locked, or no disk space
            raise Failure(
                f"cannot open the database {self._path} now ({error}): try again"
            ) from None
        except sqlite3.DatabaseError as error:
            raise Corrupt(
                f"cannot read the database {self._path} ({error}): move the file away to start "
                "with a new one"
            ) from None
        self._clean_up()

    def _open(self) -> None:
        self._database = sqlite3.connect(
            self._path, timeout=30, isolation_level=None, check_same_thread=False
        )
        run = self._database.execute
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run("PRAGMA secure_delete = ON")  # deleted texts are overwritten
        (version,) = run("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise sqlite3.DatabaseError(
                f"expected database version {VERSION} or older, got {version} of a newer Pellucid"
            )
        self._database.executescript(SCHEMA)
        run(f"PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._database.close()

    # -- objects -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all writes inside the block one transaction, which an error rolls back."""
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
            if self._has_erased:
                # The log still has the bytes; the copy into the database overwrites them there.
                self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self._has_erased = False

    def add(self, kind: str, id: str, body: JsonObject, parent: str = "") -> None:
        """Add an object; it becomes the newest of its kind.

        Args:
            kind: the kind of the object, such as "job".
            id: its id, which must be new for this kind, even after a removal.
            body: its JSON body.
            parent: the id of its parent, if it has one.

        Raises:
            sqlite3.IntegrityError: an object of this kind has or had this id.
        """
        with self.transaction():
            self._database.execute(
                "INSERT INTO objects (kind, id, parent, body) VALUES (?, ?, ?, ?)",
                (kind, id, parent, json.dumps(body)),
            )

    def get(self, kind: str, id: str, parent: str | None = None) -> JsonObject | None:
        """Return the body of an object; None if it does not exist, or has another parent."""
        with self._lock:
            row = self._database.execute(
                "SELECT body FROM objects WHERE kind = ? AND id = ? AND parent = IFNULL(?, parent)",
                (kind, id, parent),
            ).fetchone()
        return json.loads(row[0]) if row and row[0] is not None else None

    def update(self, kind: str, id: str, **fields: Any) -> JsonObject:
        """Set fields of an object's body, and return the body.

        Raises:
            KeyError: the object does not exist.
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
        """Delete an object, but keep its row for paging; return whether the object existed."""
        with self.transaction():
            cursor = self._database.execute(
                "UPDATE objects SET body = NULL WHERE kind = ? AND id = ? AND body IS NOT NULL",
                (kind, id),
            )
            return cursor.rowcount > 0

    def erase(self, kind: str, ids: Iterable[str]) -> None:
        """Delete objects and their rows, and overwrite their bytes on the disk."""
        with self.transaction():
            self._database.executemany(
                "DELETE FROM objects WHERE kind = ? AND id = ?", ((kind, id) for id in ids)
            )
            self._has_erased = True

    def total_bytes(self, kinds: Sequence[str]) -> int:
        """Return the size of the bodies of all objects of some kinds, in bytes."""
        with self._lock:
            row = self._database.execute(
                "SELECT SUM(LENGTH(CAST(body AS BLOB))) FROM objects WHERE kind IN "
                f"({', '.join('?' * len(kinds))})",
                kinds,
            ).fetchone()
        return row[0] or 0

    def erase_oldest(self, kinds: Sequence[str], *, stored_before: float, num_bytes: int) -> int:
        """Erase the oldest objects of some kinds; return the size of their bodies in bytes.

        Args:
            kinds: the kinds, whose bodies have the field `stored_at`, in seconds since 1970.
            stored_before: all objects that were stored before this time are erased.
            num_bytes: number of bytes to free.
        """
        with self._lock:
            rows = self._database.execute(
                "SELECT kind, id, LENGTH(CAST(body AS BLOB)), json_extract(body, '$.stored_at') "
                f"FROM objects WHERE kind IN ({', '.join('?' * len(kinds))}) ORDER BY position",
                kinds,
            )
            oldest: dict[str, list[str]] = {}
            erased = 0
            with contextlib.closing(rows):  # an open cursor would lock the table
                for kind, id, size, stored_at in rows:
                    if erased >= num_bytes and stored_at >= stored_before:
                        break
                    oldest.setdefault(kind, []).append(id)
                    erased += size
            for kind, ids in oldest.items():
                self.erase(kind, ids)
        return erased

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
        """Return a page of the bodies of objects of a kind, and whether more follow.

        Args:
            kind: the kind of the objects, such as "job".
            parent: the id of their parent; "" for objects without a parent.
            after: the id of the object before the page, which may have been removed; None for the
                first page.
            limit: the maximum number of objects; None for all.
            newest_first: whether the newest object is first.
            predicate: takes a body and returns whether to include the object.

        Raises:
            KeyError: no object had the id `after`.
        """
        with self._lock:
            start = MAX_POSITION if newest_first else 0
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
                f" AND position {sign} ? ORDER BY position {order}",
                (kind, parent, start),
            )
            bodies: list[JsonObject] = []
            for (text,) in rows:
                if predicate(body := json.loads(text)):
                    if len(bodies) == limit:
                        return bodies, True
                    bodies.append(body)
        return bodies, False

    # -- blobs ---------------------------------------------------------------------------------

    def blob_path(self, id: str) -> Path:
        """Return the path of the blob of a file object."""
        return self._blobs / id

    @contextlib.contextmanager
    def open_blob(self, id: str) -> "Iterator[BlobWriter]":
        """Open a new blob for writing; without a `commit` inside the block, it is deleted."""
        blob = BlobWriter(self, id, _open_locked(self._blobs / f"{_NEW_PREFIX}{id}"))
        try:
            yield blob
        finally:
            blob.close()

    def delete_file(self, id: str) -> bool:
        """Delete a file object and then its blob; return whether the object existed."""
        existed = self.remove("file", id)
        if existed:
            self.blob_path(id).unlink(missing_ok=True)
        return existed

    def delete_blob(self, kind: str, id: str) -> None:
        """Delete an object of a kind and then its blob."""
        self.remove(kind, id)
        self.blob_path(id).unlink(missing_ok=True)

    def _has_blob(self, id: str) -> bool:
        return any(self.get(kind, id) is not None for kind in ("file", "upload.part"))

    def _clean_up(self) -> None:
        """Remove blobs of killed processes: those without an object that no process is writing."""
        for path in self._blobs.iterdir():
            if not path.name.startswith(_NEW_PREFIX) and self._has_blob(path.name):
                continue
            if not path.exists() or (lock := disk.try_lock(path)) is None:
                continue
            if not self._has_blob(path.name):  # again: the object may have been added since
                path.unlink(missing_ok=True)
            os.close(lock)


class BlobWriter:
    """Writes the bytes of a new file; see `Store.open_blob`.

    Args:
        store: the store of the file.
        id: the id of the file.
        file: the temporary file, locked.
    """

    def __init__(self, store: Store, id: str, file: BinaryIO):
        self._store, self.id, self._file = store, id, file
        self.size = 0

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._file.write(data)
        self.size += len(data)

    def commit(self, body: JsonObject, kind: str = "file", parent: str = "") -> None:
        """Flush the blob and add its object; after the return, the file survives a crash.

        Args:
            body: the body of the object.
            kind: its kind: "file", or "upload.part".
            parent: the id of its parent, if it has one.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        path = self._store.blob_path(self.id)
        path.with_name(_NEW_PREFIX + path.name).rename(path)
        disk.flush(path.parent)
        self._store.add(kind, self.id, body, parent)  # while the blob is still locked

    def close(self) -> None:
        """Close the blob, and delete it if it was not committed."""
        path = self._store.blob_path(self.id)
        path.with_name(_NEW_PREFIX + path.name).unlink(missing_ok=True)
        self._file.close()


def _open_locked(path: Path) -> BinaryIO:
    """Open a new file for writing, and lock it, so that `_clean_up` does not remove it."""
    descriptor = disk.lock(path)
    os.ftruncate(descriptor, 0)
    return os.fdopen(descriptor, "wb")
