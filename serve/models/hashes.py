"""SHA-256 of files, cached in the data folder by the size and times of each file.

Hashing gigabytes would take seconds at each start. A file with the same size, modification and
change time is assumed to be unchanged; `fresh` hashes the file anyway.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from serve.models import json_cache

CACHE_FILE = "hashes.json"  # in the data folder


def sha256(path: Path, home: Path, *, fresh: bool = False) -> str:
    """Return the SHA-256 of a file, in hex.

    Args:
        path: the file.
        home: the data folder.
        fresh: whether to read the file even if its hash is cached.

    Raises:
        OSError: the file cannot be read.
    """
    stamp = _stamp(path)
    cached = json_cache.read(home / CACHE_FILE).get(str(path.resolve()))
    if not fresh and isinstance(cached, list) and cached[1:] == stamp:
        return cached[0]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    json_cache.add(home / CACHE_FILE, str(path.resolve()), [digest, *stamp])
    return digest


def record(path: Path, home: Path, digest: str) -> None:
    """Cache the SHA-256 of a file that was hashed while it was written."""
    json_cache.add(home / CACHE_FILE, str(path.resolve()), [digest, *_stamp(path)])


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
