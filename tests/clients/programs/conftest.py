"""Fixtures for programs that run in the environment of a client, without Pellucid."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def base_url() -> str:
    """Return the base URL of the server, with /v1."""
    return os.environ["CLIENT_BASE_URL"]


@pytest.fixture(scope="session")
def model() -> str:
    """Return the id of the model."""
    return os.environ["CLIENT_MODEL"]


@pytest.fixture(scope="session")
def people() -> list[tuple[str, int]]:
    """Return names and ages for five sentences."""
    return [("Ann", 31), ("Bob", 7), ("Chloé", 54), ("Dmitri", 90), ("Eve", 18)]


@pytest.fixture(scope="session")
def cities() -> list[str]:
    """Return five cities to ask about."""
    return ["Oslo", "Paris", "Lima", "Rome", "Cairo"]


@pytest.fixture
def judge(request):
    """Return a function that asks about all cases at once, and counts the right choices.

    What the model chooses does not fail a test, because it is no property of the server. The counts
    are listed. The form of a response is: the function that judges asserts it.
    """

    def report(is_right: Callable[[Any], bool], cases: Sequence[Any]) -> None:
        with ThreadPoolExecutor(len(cases)) as pool:
            list_choices(request.node.nodeid, sum(pool.map(is_right, cases)), len(cases))

    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """List a test of the client's authors that judges the model; it is marked xfail."""
    if report.when == "call" and hasattr(report, "wasxfail"):
        list_choices(report.nodeid, int(report.passed), 1)


def list_choices(nodeid: str, num_right: int, num_cases: int) -> None:
    with Path(os.environ["CLIENT_CHOICES"]).open("a") as file:
        file.write(f"{num_right} of {num_cases}  {nodeid.removeprefix('client_')}\n")
