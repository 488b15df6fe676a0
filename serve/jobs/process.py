"""A niced process that holds a lock as long as it lives, so that the next server can find it.

Its files share a folder: NAME.lock, NAME.pid, NAME.out and NAME.log. POSIX only: a lock is of the
open file, which the process inherits.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from serve import settings
from serve.models import disk

STOP_SECONDS = 20.0  # for a process to save and end


class JobProcess:
    """A niced process of a job's. It holds a lock for as long as it lives, whoever started it."""

    def __init__(self, job: str, folder: Path, name: str, child: subprocess.Popen[bytes] | None):
        self.job_id, self._folder, self._name, self._child = job, folder, name, child

    @classmethod
    def start(
        cls, job_id: str, folder: Path, name: str, module: Iterable[str], niceness: int = 0
    ) -> "JobProcess":
        """Starts a module as a program.

        Args:
            job: whose it is; `folder` is its folder.
            name: of the process's files there.
            module: the module and its arguments.

        Raises:
            BlockingIOError: there is one of this name already.
        """
        lock = disk.try_lock(folder / f"{name}.lock")
        if lock is None:
            raise BlockingIOError(f"a process holds {folder / name}.lock")
        pid = folder / f"{name}.pid"
        pid.unlink(missing_ok=True)  # its predecessor's number may be a stranger's by now
        # It writes its number itself, before it is the program: we may be killed at any point.
        write = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(pid)]
        try:
            with (
                open(folder / f"{name}.out", "wb") as out,
                open(folder / f"{name}.log", "ab") as errors,
            ):
                ours = subprocess.Popen(
                    [*write, *_program(module, niceness)],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=errors,
                    env=_environment(),
                    pass_fds=[lock],  # the lock is the process's from here on
                    # Ctrl-C on the terminal is for us. (Not a session of its own: on systems that
                    # share time between sessions first, niceness would then mean nothing.)
                    process_group=0,
                )
        finally:
            os.close(lock)
        return cls(job_id, folder, name, ours)

    @classmethod
    def find_running(cls, job_id: str, folder: Path, name: str = "train") -> "JobProcess | None":
        """The process that a server before us started and that still lives, if there is one."""
        found = cls(job_id, folder, name, None)
        return None if found.has_exited else found

    @property
    def has_exited(self) -> bool:
        """Whether it has ended."""
        if self._child is not None:
            return self._child.poll() is not None
        lock = disk.try_lock(self._folder / f"{self._name}.lock")
        if lock is None:
            return False
        os.close(lock)
        return True

    @property
    def exit_code(self) -> int | None:
        """With what code it ended, or minus the signal that ended it; None if it is not ours."""
        return None if self._child is None else self._child.poll()

    def stop(self) -> None:
        """Has it save and end; ends it, if that takes too long. Waits."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.has_exited:
                return
            self._send(number)
            end = time.monotonic() + STOP_SECONDS
            while time.monotonic() < end and not self.has_exited:
                time.sleep(0.02)

    def _send(self, number: int) -> None:
        if self._child is not None:
            self._child.send_signal(number)
            return
        # It lives, as its lock says, so that this number is its own and nobody else's.
        with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
            os.kill(int((self._folder / f"{self._name}.pid").read_text("utf-8")), number)

    def output(self) -> str:
        """What it answered."""
        return (self._folder / f"{self._name}.out").read_text("utf-8")

    def failure_message(self) -> str:
        """The last line it wrote about what went wrong."""
        text = (self._folder / f"{self._name}.log").read_text("utf-8", "replace")
        lines = [line for line in text.splitlines() if line.strip()]
        reason = lines[-1].removeprefix("python -m training: ") if lines else "it did not say why"
        return f"The job failed: {reason[:1000]}"


def _program(module: Iterable[str], niceness: int) -> list[str]:
    return ["nice", "-n", str(niceness), sys.executable, "-m", *module]


def _environment() -> dict[str, str]:
    """Ours, where our own packages are found and compiled programs are kept."""
    spec = find_spec("training")
    assert spec is not None and spec.origin is not None
    root = str(Path(spec.origin).parents[1])
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(settings.data_folder() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return {**kept, **os.environ, "PYTHONPATH": path}
