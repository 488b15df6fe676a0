"""What tests of all packages share."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from serve import catalogue, settings, sources

# A shell that starts the tests in the background ignores Ctrl-C, and what we start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def model_file() -> Callable[[str], Path]:
    """Gives the path of a pulled model by its id; fails, saying what to do, if it is not there."""
    known = catalogue.load()
    home = settings.data_folder()

    def find(id: str) -> Path:
        path = sources.find(known.models[id], home)
        if path is None:
            pytest.fail(f"this test needs a model: run `pellucid pull {id}` first")
        return path

    return find
