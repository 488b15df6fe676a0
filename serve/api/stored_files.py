"""Uploaded files as routes look them up: one that has expired is not there."""

import time
from typing import Any

from starlette.requests import Request

from serve.api.errors import APIError
from serve.api.state import state_of
from serve.jobs.store import Store


def store_of(request: Request) -> Store:
    """The store of the application that serves ``request``."""
    return state_of(request).store


def find_file(store: Store, id: str, param: str = "id") -> dict[str, Any]:
    """The record of a file.

    Args:
        param: where the id came in, for the error.

    Raises:
        APIError: 404 where there is none.
    """
    file = store.get("file", id)
    if file is None or not is_alive(file):
        raise no_such_file(id, param)
    return file


def no_such_file(id: str, param: str = "id") -> APIError:
    return APIError(404, f"No such File object: {id[:80]}", param=param, code="not_found")


def is_alive(file: dict[str, Any]) -> bool:
    return file.get("expires_at", float("inf")) > time.time()
