"""Lookup of uploaded files by routes. Expired files count as missing."""

import time
from typing import Any

from starlette.requests import Request

from serve.api.errors import APIError
from serve.api.state import state_of
from serve.jobs.store import Store


def store_of(request: Request) -> Store:
    """Return the store of the application that serves ``request``."""
    return state_of(request).store


def find_file(store: Store, id: str, param: str = "id") -> dict[str, Any]:
    """Return the record of a file.

    Args:
        store: The store.
        id: Id of the file.
        param: The request field that holds the id, for the error.

    Raises:
        APIError: 404 if the file does not exist or has expired.
    """
    file = store.get("file", id)
    if file is None or not is_alive(file):
        raise no_such_file(id, param)
    return file


def no_such_file(id: str, param: str = "id") -> APIError:
    """Return the 404 error for a missing file."""
    return APIError(404, f"No such File object: {id[:80]}", param=param, code="not_found")


def is_alive(file: dict[str, Any]) -> bool:
    """Return whether a file has not expired."""
    return file.get("expires_at", float("inf")) > time.time()
