"""API keys: random, shown once at creation, and stored as SHA-256 digests.

A key is 32 random bytes in URL-safe base64. The file in the data folder holds its SHA-256, so a
reader of the file cannot use the key. A slow, salted hash protects passwords that people choose; it
adds nothing to 256 random bits. A running server rereads the file when it changes, so a deleted key
stops working at once.
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
    """The record of an API key in the key file, which has the key's digest instead of the key."""

    name: str
    digest: str  # SHA-256 of the key, in hex
    hint: str  # the last characters of the key, to tell keys apart
    created: int  # Unix time, seconds


def digest(key: bytes) -> str:
    """Return the SHA-256 of a key, in hex."""
    return hashlib.sha256(key).hexdigest()


def read(home: Path) -> list[Key]:
    """Return the keys of a data folder, oldest first; none if there is no file.

    Raises:
        ValueError: The file is damaged. An empty list instead would disable authentication.
    """
    path = home / FILE
    try:
        return [Key(**entry) for entry in json.loads(path.read_text("utf-8"))]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and create new keys") from None


def create(home: Path, name: str) -> str:
    """Create an API key in a data folder, and return its text. Only its digest is stored.

    Raises:
        ValueError: The name is taken or invalid.
    """
    keys = read(home)
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is not a valid name: use 1 to 64 letters, digits, '.', '_', '@' and '-', "
            "with a letter or digit first"
        )
    if any(key.name == name for key in keys):
        raise ValueError(f"a key named {name!r} exists: delete it first, or use another name")
    key = PREFIX + secrets.token_urlsafe(32)
    _write(home, [*keys, Key(name, digest(key.encode()), key[-4:], int(time.time()))])
    return key


def delete(home: Path, name: str) -> None:
    """Delete the API key with this name from a data folder.

    Raises:
        LookupError: No key has this name.
    """
    keys = read(home)
    remaining = [key for key in keys if key.name != name]
    if len(remaining) == len(keys):
        names = ", ".join(key.name for key in keys) or "none"
        raise LookupError(f"no key is named {name!r}; existing keys: {names}")
    _write(home, remaining)


def _write(home: Path, keys: list[Key]) -> None:
    disk.replace_text(home / FILE, json.dumps([asdict(key) for key in keys], indent=1))


class KeyRing:
    """The keys that a server accepts: those it was started with, and those of its data folder.

    A server that has required a key continues to require one after the last key is deleted.

    Args:
        api_keys: Keys in plain text.
        home: The data folder.
    """

    def __init__(self, api_keys: Collection[str], home: Path):
        digests = [digest(key.encode()) for key in api_keys]
        self._fixed_keys = {key_digest: f"key {key_digest[:8]}" for key_digest in digests}
        self._home = home
        self._stamp: tuple[int, int] | None = None
        self._stored: dict[str, str] = {}
        self._requires_key = bool(api_keys)
        self._refresh()

    def requires_key(self) -> bool:
        """Return whether requests need an API key."""
        self._refresh()
        return self._requires_key

    def owner(self, key: bytes) -> str | None:
        """Return the name of an API key, or None if the key is not accepted.

        A key of `api_keys` has the name "key DIGEST", which does not depend on the other keys: the
        objects that a key stores have its name.
        """
        self._refresh()
        key_digest = digest(key)
        owner = None
        # All digests are compared in constant time, so that the response time reveals nothing.
        for known, name in (*self._fixed_keys.items(), *self._stored.items()):
            if hmac.compare_digest(known, key_digest):
                owner = name
        return owner

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
