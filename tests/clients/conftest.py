"""Servers for the clients, behind a proxy that records, and a report of the model's choices."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.recording import Exchange, recording
from tests.serve.processes import serving

CODER = "qwen2.5-coder-0.5b-instruct"


@pytest.fixture(scope="session")
def exchanges() -> list[Exchange]:
    """Return the requests of all clients so far, with the responses."""
    return []


@pytest.fixture(scope="session")
def coder_url(model_file, exchanges: list[Exchange]) -> Iterator[str]:
    """Yield the URL of a recorded server of the coder model, as users start it."""
    model_file(CODER)
    with serving("--model", CODER) as server, recording(server.url, exchanges) as url:
        yield url


CHOICES = pytest.StashKey[Path]()


@pytest.fixture(scope="session")
def choices(pytestconfig, tmp_path_factory) -> Path:
    """Return the file to which the programs append how often the model chose as expected."""
    path = tmp_path_factory.mktemp("clients") / "choices.txt"
    path.touch()
    pytestconfig.stash[CHOICES] = path
    return path


def pytest_terminal_summary(terminalreporter, config) -> None:
    if path := config.stash.get(CHOICES, None):
        terminalreporter.section("what the model chose")
        terminalreporter.write(path.read_text())
