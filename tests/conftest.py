"""Fixtures and settings for the tests of all packages."""

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import platformdirs
import pytest

from serve import settings
from serve.models import catalogue, download

# A shell that starts the tests in the background ignores Ctrl-C, and child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests and their child processes must not use the user's server and key.
for name in ("PELLUCID_HOST", "PELLUCID_API_KEY"):
    os.environ.pop(name, None)

# Compiling small programs takes most of the time, so test workers, their child processes and later
# runs share a compilation cache on disk.
for name, value in {
    "JAX_COMPILATION_CACHE_DIR": str(platformdirs.user_cache_path("pellucid") / "tests"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}.items():
    os.environ.setdefault(name, value)

# A first call may compile a program or load a model, so no time limit applies to an example.
hypothesis.settings.register_profile("pellucid", deadline=None)
hypothesis.settings.load_profile("pellucid")

HEAVY = {"model_file", "address", "refused_url"}  # fixtures that need a model or a port


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that use a model or a port as heavy; modules that compile much mark themselves.

    Slow, parity and clients tests run the code of other projects, so their warnings are no errors.
    """
    for item in items:
        if any(map(item.get_closest_marker, ("slow", "parity", "clients"))):
            item.add_marker(pytest.mark.filterwarnings("default"))
        if HEAVY & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.heavy)


@pytest.fixture(scope="session")
def model_file() -> Callable[[str], Path]:
    """Return a function that finds a pulled model by id, or fails with the command to pull it."""
    models = catalogue.load().models
    home = settings.data_folder()

    def find(id: str) -> Path:
        path = download.find_path(models[id], home)
        if path is None:
            pytest.fail(f"this test needs a model: run `pellucid pull {id}` first")
        return path

    return find


@pytest.fixture
def refused_url() -> Iterator[str]:
    """Return the URL of a port that refuses connections: it is bound, but nothing listens on it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture(scope="module")  # playwright occupies the event loop of the thread
def browser():
    """Yield a browser: Debian's Chromium, driven by playwright, which `make slow` installs."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "this test needs Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        yield browser
        browser.close()
