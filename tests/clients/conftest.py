"""Servers for the clients, behind a proxy that records, and a report of the model's choices."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.decided import decided_models
from tests.clients.recording import Exchange, recording
from tests.serve.processes import serving
from tests.serve.scripted import serve_models

CODER, OTHER_MODEL = "qwen2.5-coder-0.5b-instruct", "smollm2-135m-instruct"
CHOICES = pytest.StashKey[Path]()


@pytest.fixture(scope="session")
def exchanges() -> list[Exchange]:
    """Return the requests of all clients so far, with the responses."""
    return []


@pytest.fixture(scope="session", params=["decided", "coder"])
def server_url(request, model_file, exchanges: list[Exchange]) -> Iterator[str]:
    """Yield the URL of a recorded server: of decided tokens, then of the coder model itself."""
    if request.param == "decided":
        models = decided_models(model_file(CODER), CODER, OTHER_MODEL)
        with serve_models(*models) as address, recording(address, exchanges) as url:
            yield url
    else:
        ids = [argument for id in (CODER, OTHER_MODEL) for argument in ("--model", id)]
        with serving(*ids) as server, recording(server.url, exchanges) as url:
            yield url


@pytest.fixture(scope="session")
def choices(pytestconfig, tmp_path_factory) -> Path:
    """Return the file to which the programs append how often the model chose as expected."""
    path = tmp_path_factory.mktemp("clients") / "choices.txt"
    path.touch()
    pytestconfig.stash[CHOICES] = path
    return path


def pytest_terminal_summary(terminalreporter, config) -> None:
    if path := config.stash.get(CHOICES, None):
        terminalreporter.section(f"how often {CODER} chose as expected")
        terminalreporter.write(path.read_text())
