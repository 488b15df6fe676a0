"""The client of 2023, `openai` 0.27.10, in its own process, because today's has the same name."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).with_name("openai_2023.txt")
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def install() -> Path:
    """Install the client in a folder beside this Python's packages, once; return the folder."""
    folder = Path(sys.prefix) / "openai-2023"
    done = folder / REQUIREMENTS.name
    if done.is_file() and done.read_text() == REQUIREMENTS.read_text():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as half_done:
        target = Path(half_done) / "packages"
        options = ["--no-input", "--no-deps", "--target", str(target), "-r", str(REQUIREMENTS)]
        subprocess.run([*PIP, *options], check=True, stdout=sys.stderr)
        shutil.copy(REQUIREMENTS, target)
        target.rename(folder)
    return folder


class OldClient:
    """Run snippets and commands with the old client against one server."""

    def __init__(self, folder: Path, address: str, key: str = "any"):
        self.folder = folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "OPENAI_API_BASE": f"{address}/v1",
            "OPENAI_API_KEY": key,
            "PYTHONWARNINGS": "ignore",
        }

    def run(self, code: str) -> Any:
        """Run a snippet with `openai` imported; return the value of its variable `answer`."""
        code = f"import json, openai\n{code}\nprint(json.dumps(answer))"
        return json.loads(self._run([sys.executable, "-c", code]))

    def command(self, *arguments: str) -> str:
        """Return the output of `openai ARGUMENTS...`."""
        return self._run([sys.executable, str(self.folder / "bin" / "openai"), *arguments])

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout
