"""API keys: made here, shown once, kept as digests.

A key is 32 random bytes in letters. The file in the data folder holds its SHA-256, so whoever reads
the file cannot ask for anything; a slow, salted hash would guard passwords that people choose, and
adds nothing to 256 bits of chance. A running server notices when the file changes: a key that is
deleted stops working at once.
"""

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from serve.models import disk

PREFIX = "sk-pellucid-"
FILE = "keys.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True)
class Key:
    """What is kept of a key."""

    name: str
    digest: str  # SHA-256 of the key, in hex
    hint: str  # its last characters, to tell one from another
    created: int  # seconds since 1970


def digest(key: bytes) -> str:
    """What is kept of a key, and compared."""
    return hashlib.sha256(key).hexdigest()


def read(home: Path) -> list[Key]:
    """The keys of a data folder, oldest first; none if there is no file.

    Raises:
        ValueError: the file is damaged. Nothing is assumed then: an empty list would open doors.
    """
    path = home / FILE
    try:
        return [Key(**entry) for entry in json.loads(path.read_text("utf-8"))]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and make new keys") from None


def create(home: Path, name: str) -> str:
    """Makes a key and gives its text, which is not kept.

    Raises:
        ValueError: the name is taken, or is none.
    """
    keys = read(home)
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a key: use letters, digits, '.', '_', '@' and '-'")
    if any(key.name == name for key in keys):
        raise ValueError(f"there is a key {name!r} already: delete it first, or use another name")
    key = PREFIX + secrets.token_urlsafe(32)
    _write(home, [*keys, Key(name, digest(key.encode()), key[-4:], int(time.time()))])
    return key


def delete(home: Path, name: str) -> None:
    """Forgets a key.

    Raises:
        LookupError: there is none of this name.
    """
    keys = read(home)
    rest = [key for key in keys if key.name != name]
    if len(rest) == len(keys):
        names = ", ".join(key.name for key in keys) or "none so far"
        raise LookupError(f"no key is called {name!r}; there are: {names}")
    _write(home, rest)


def _write(home: Path, keys: list[Key]) -> None:
    disk.replace_text(home / FILE, json.dumps([asdict(key) for key in keys], indent=1))


class KeyRing:
    """The keys a server accepts: those it was started with, and those of its data folder.

    A server that has asked for keys goes on asking when the last one is deleted: nobody is let in
    by a deletion.

    Args:
        given: keys in plain text.
        home: the data folder.
    """

    def __init__(self, api_keys: Collection[str], home: Path):
        self._fixed_keys = {
            digest(key.encode()): f"key {number}" for number, key in enumerate(api_keys, 1)
        }
        self._home = home
        self._stamp: tuple[int, int] | None = None
        self._stored: dict[str, str] = {}
        self._requires_key = bool(api_keys)
        self._refresh()

    def requires_key(self) -> bool:
        """Whether a key is needed."""
        self._refresh()
        return self._requires_key

    def owner(self, key: bytes) -> str | None:
        """The name of a key; None if it is none of ours."""
        self._refresh()
        given = digest(key)
        found = None
        # All are compared, each in constant time: the answer's delay tells nothing.
        for known, name in (*self._fixed_keys.items(), *self._stored.items()):
            if hmac.compare_digest(known, given):
                found = name
        return found

    def _refresh(self) -> None:
        try:
            status = (self._home / FILE).stat()
            stamp = (status.st_mtime_ns, status.st_ino)
        except FileNotFoundError:
            stamp = None
        if stamp != self._stamp:
            self._stored = {key.digest: key.name for key in read(self._home)}
            self._stamp = stamp
            self._requires_key = self._requires_key or bool(self._stored)
