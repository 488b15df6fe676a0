"""A server with a scripted engine in its own process, which a test can kill.

`python -m tests.serve.scripted_server HOME` serves the model `scripted` with the data folder HOME
on a free port, prints its address, and runs until it is killed. For each request of the engine it
appends its process id to a file in HOME.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tests.serve.processes import environment

REQUESTS = "requests.txt"


@contextmanager
def killable_server(home: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run a server in its own process; yield its address and its process; kill it at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.scripted_server", str(home)],
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process
    finally:
        process.kill()
        process.communicate()


def main(home: Path) -> None:
    from tests.serve import scripted

    class LoggedEngine(scripted.ScriptedEngine):
        async def stream(self, request):
            with (home / REQUESTS).open("a") as file:
                print(os.getpid(), file=file)
            async for event in super().stream(request):
                yield event

    model = replace(scripted.model(), context=20_000, engine=LoggedEngine())
    with scripted.serve_models(model, home=home) as address:
        print(address, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
