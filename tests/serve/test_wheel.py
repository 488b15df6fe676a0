"""The wheel, installed in an environment without access to this repository.

All other tests import the packages from their folders. Only these tests fail if the wheel lacks a
package or a data file, or if code looks for a file outside the packages.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from tests.naming import names

ROOT = Path(__file__).parents[2]
PACKAGES = ("audio", "bpe", "diffusion", "serve", "training", "transformer")
MODEL = "smollm2-135m-instruct"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel of the working tree from a copy, because a build leaves folders behind."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    # Without setuptools here, pip fetches it: `make slow` may use the network.
    options = ["--no-build-isolation"] if find_spec("setuptools") else []
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", *options, "-w", target, source], check=True)
    (wheel_file,) = target.glob("*.whl")
    return wheel_file


class Installed:
    """A virtual environment with the wheel and the dependencies of this environment.

    Args:
        folder: the folder of the environment, and of its commands.
        wheel: the wheel to install.
    """

    def __init__(self, folder: Path, wheel: Path):
        self.folder, self.bin = folder, folder / "venv" / "bin"
        venv = ["-m", "venv", "--without-pip", folder / "venv"]
        subprocess.run([sys.executable, *venv], check=True)
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python"]
        subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True)
        self.site = Path(self.run("python", "-c", "import site; print(site.getsitepackages()[0])"))
        # Folders in a .pth file come last in the path, and their own .pth files, which an editable
        # install uses, are not read.
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (self.site / "dependencies.pth").write_text("\n".join(paths) + "\n")

    @property
    def environment(self) -> dict[str, str]:
        """Return the user's environment without PYTHONPATH, which may name this repository."""
        return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(self, program: str, *arguments: str) -> str:
        """Run a program of the environment, which must succeed, and return its stdout."""
        process = subprocess.run(
            [self.bin / program, *arguments],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=600,
            check=True,
        )
        return process.stdout.removesuffix("\n")


@pytest.fixture(scope="module")
def installed(tmp_path_factory, wheel) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheel)


def test_wheel_contains_every_file_of_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*"))
    assert names == {
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.is_file() and path.parent.name != "__pycache__"
    }


def test_modules_are_imported_from_installed_wheel(installed):
    code = """
import importlib, json, pkgutil, sys
found = {}
for package in sys.argv[1:]:
    root = importlib.import_module(package)
    found[package] = root.__file__
    for module in pkgutil.walk_packages(root.__path__, f"{package}."):
        if not module.name.endswith(".__main__"):
            found[module.name] = importlib.import_module(module.name).__file__
print(json.dumps(found))
"""
    found = json.loads(installed.run("python", "-c", code, *PACKAGES))
    assert len(found) > 100
    assert not [path for path in found.values() if not Path(path).is_relative_to(installed.site)]


def test_package_data_is_found_in_installed_wheel(installed):
    assert names(installed.run("pellucid", "--help"), "chat", "pull", "serve")
    assert installed.run("python", "-m", "bpe", "encode", "hello world") == "24912 2375"
    listed = json.loads(installed.run("pellucid", "models", "--json"))["models"]
    assert MODEL in [model["id"] for model in listed]
    code = "import diffusion; print(diffusion.weights_folder())"
    weights = Path(installed.run("python", "-c", code))
    assert weights.is_relative_to(installed.site)
    for part in ("denoiser", "upscaler"):
        assert json.loads((weights / part / "config.json").read_text())
        assert (weights / part / "model.safetensors").stat().st_size > 1e5


def test_commands_of_installed_wheel_run(installed, model_file):
    model_file(MODEL)
    assert installed.run("pellucid", "tokenize", "hamburger") == "h|amb|urger\n88 2980 44614"
    question = "What is the capital of France?"
    assert "Paris" in installed.run("pellucid", "chat", question, "--temperature", "0")


@pytest.fixture(scope="module")
def address(installed, model_file) -> Iterator[str]:
    model_file(MODEL)
    command = [installed.bin / "pellucid", "serve", "--port", "0", "--json", "--model", MODEL]
    with subprocess.Popen(
        command,
        cwd=installed.folder,
        env=installed.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        with contextlib.ExitStack() as stack:
            stack.callback(process.terminate)
            yield json.loads(process.stdout.readline())["url"]
    assert process.returncode == 0


def test_server_of_installed_wheel_has_its_pages(address):
    with httpx.Client(base_url=address, timeout=120) as client:
        for path in ("/", "/docs", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"):
            assert client.get(path).status_code == 200, path
        for path in (ROOT / "serve").rglob("web/*"):
            if path.suffix != ".html":  # which are / and /docs
                response = client.get(f"/web/{path.name}")
                assert (response.status_code, response.content) == (200, path.read_bytes()), path
        assert "/v1/chat/completions" in client.get("/openapi.json").json()["paths"]
