"""SHA-256 of files, remembered in the data folder with each file's size and times.

Hashing gigabytes takes seconds at each start; a file whose size and times are the same has not
changed, unless somebody set out to deceive, which `fresh` finds out.
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
        fresh: read the file whatever is remembered.

    Raises:
        OSError: the file cannot be read.
    """
    stamp = _stamp(path)
    known = json_cache.read(home / CACHE_FILE).get(str(path.resolve()))
    if not fresh and isinstance(known, list) and known[1:] == stamp:
        return known[0]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    json_cache.add(home / CACHE_FILE, str(path.resolve()), [digest, *stamp])
    return digest


def record(path: Path, home: Path, digest: str) -> None:
    """Note the SHA-256 of a file that was hashed as it was written."""
    json_cache.add(home / CACHE_FILE, str(path.resolve()), [digest, *_stamp(path)])


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
