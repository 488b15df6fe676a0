"""A niced process of a job, which holds a lock while it runs, so that another server can find it.

The process has four files in the folder of the job: NAME.lock, NAME.pid, NAME.out and NAME.log.
POSIX only: a lock belongs to the open file, which the process inherits.
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

STOP_SECONDS = 20.0  # maximum time for a process to save its state and exit


class JobProcess:
    """A niced process of a job, started by this server or by an earlier one.

    Args:
        job_id: the id of the job.
        folder: the folder of the job.
        name: the name of the process's files in that folder.
        child: the process if this server started it, else None.
    """

    def __init__(self, job_id: str, folder: Path, name: str, child: subprocess.Popen[bytes] | None):
        self.job_id, self._folder, self._name, self._child = job_id, folder, name, child

    @classmethod
    def start(
        cls, job_id: str, folder: Path, name: str, module: Iterable[str], niceness: int = 0
    ) -> "JobProcess":
        """Start a Python module as a niced process.

        Args:
            job_id: the id of the job.
            folder: the folder of the job.
            name: the name of the process's files in that folder.
            module: the module and its arguments.
            niceness: the niceness of the process, from 0 to 19.

        Raises:
            BlockingIOError: a process of this name runs already.
            OSError: the process could not be started.
        """
        lock = disk.try_lock(folder / f"{name}.lock")
        if lock is None:
            raise BlockingIOError(f"{folder / name}.lock is locked by another process")
        pid = folder / f"{name}.pid"
        pid.unlink(missing_ok=True)  # its old id may belong to another program by now
        # The process writes its id itself, because this server may be killed at any point.
        write = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(pid)]
        try:
            with (
                open(folder / f"{name}.out", "wb") as out,
                open(folder / f"{name}.log", "ab") as errors,
            ):
                child = subprocess.Popen(
                    [*write, *_program(module, niceness)],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=errors,
                    env=_environment(),
                    pass_fds=[lock],  # the process keeps the lock
                    # Ctrl-C in the terminal must not reach the process. (A new session would do
                    # that too, but some systems share CPU time between sessions before niceness.)
                    process_group=0,
                )
        finally:
            os.close(lock)
        return cls(job_id, folder, name, child)

    @classmethod
    def find_running(cls, job_id: str, folder: Path, name: str = "train") -> "JobProcess | None":
        """Return the running process that an earlier server started; None if there is none."""
        process = cls(job_id, folder, name, None)
        return None if process.has_exited else process

    @property
    def has_exited(self) -> bool:
        """Whether the process has ended."""
        if self._child is not None:
            return self._child.poll() is not None
        lock = disk.try_lock(self._folder / f"{self._name}.lock")
        if lock is None:
            return False
        os.close(lock)
        return True

    @property
    def exit_code(self) -> int | None:
        """The exit code, or minus the signal number.

        None while the process runs, and always for a process that another server started.
        """
        return None if self._child is None else self._child.poll()

    def stop(self) -> None:
        """Stop the process and wait: SIGTERM first, and SIGKILL after `STOP_SECONDS`."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.has_exited:
                return
            self._send(number)
            deadline = time.monotonic() + STOP_SECONDS
            while time.monotonic() < deadline and not self.has_exited:
                time.sleep(0.02)

    def _send(self, number: int) -> None:
        if self._child is not None:
            self._child.send_signal(number)
            return
        # The lock shows that the process runs, so the id is not that of another program.
        with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
            os.kill(int((self._folder / f"{self._name}.pid").read_text("utf-8")), number)

    def output(self) -> str:
        """Return the standard output of the process."""
        return (self._folder / f"{self._name}.out").read_text("utf-8")

    def failure_message(self) -> str:
        """Return the error message for a failed process, with the last line of its log."""
        text = (self._folder / f"{self._name}.log").read_text("utf-8", "replace")
        lines = [line for line in text.splitlines() if line.strip()]
        reason = lines[-1].removeprefix("python -m training: ") if lines else "the log is empty"
        return f"The job failed: {reason[:1000]}"


def _program(module: Iterable[str], niceness: int) -> list[str]:
    return ["nice", "-n", str(niceness), sys.executable, "-m", *module]


def _environment() -> dict[str, str]:
    """Return the environment variables of a job process.

    They are those of this process, with Pellucid on PYTHONPATH and with JAX's persistent
    compilation cache enabled.
    """
    spec = find_spec("training")
    assert spec is not None and spec.origin is not None
    root = str(Path(spec.origin).parents[1])
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(settings.data_folder() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return {**cache, **os.environ, "PYTHONPATH": path}
