"""Atomic writes, flushes and file locks.

A text is written under a temporary name, flushed to the disk, and renamed over the old file, so
that a reader sees the old text or the new text, never a part. A lock belongs to an open file: the
system releases it when the process ends, even after a crash.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

MARGIN = 16 * 2**20  # bytes of disk that a download leaves free
CHANGED_FILE = ".changed"  # in the data folder; touched when a model is pulled or removed


def human_size(size: int) -> str:
    """Return a number of bytes as text, such as "1.5 GB" or "90 MB" (powers of ten)."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def replace_text(path: Path, text: str) -> None:
    """Replace the content of a file atomically. Only the owner can read the file.

    Raises:
        OSError: the text could not be written; the file is unchanged.
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


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(path: Path) -> int | None:
    """Lock a file if no other process has locked it. A missing file is created.

    Returns:
        A descriptor that holds the lock until it is closed; None if another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def lock(path: Path) -> int:
    """Wait for the lock of a file, and return a descriptor as `try_lock` does."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # another process has removed or renamed the file meanwhile


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a file in the block; call `on_wait` before waiting for another process."""
    if (descriptor := try_lock(path)) is None:
        on_wait()
        descriptor = lock(path)
    try:
        yield
    finally:
        os.close(descriptor)


def mark_changed(home: Path) -> None:
    """Touch `CHANGED_FILE`, so that running servers look for pulled and removed models."""
    with contextlib.suppress(OSError):
        (home / CHANGED_FILE).touch()
