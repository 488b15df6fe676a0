"""Who does the jobs: one at a time, each in a niced process of its own, watched by one thread.

The process is `python -m training finetune`. It writes down what it does (a line a step, an adapter
after each epoch, checkpoints), and the thread here turns that into events, models and a file of
results. Nothing passes between the two but files, so that either may be killed at any time:

- The process is killed: it is started again, and goes on from its last checkpoint.
- The server is killed: the process goes on. The next server finds the lock that the process holds
  as long as it lives, and watches it; or finds it free, and starts the process again. A run that
  was done by then says so at once.
- The server is stopped: the process is told to save and to end; the next server goes on.

Of several servers on one data folder one is the keeper, by a lock too; when it ends, another is.
What is done is always written down before it is told, under names that were chosen before: doing it
again does nothing.
"""

import contextlib
import csv
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from serve import settings
from serve.jobs.jobs import DATA, OUT, OVER, VALID, Job, Jobs
from serve.jobs.store import file_record, new_id
from serve.models import adapters, disk

log = logging.getLogger(__name__)

LOCK = "keeper.lock"
TICK = 0.5  # seconds between two looks
WATCH = 15.0  # seconds between two looks of an idle server: for jobs that a dead one left
PATIENCE = 3  # processes that may die in a row without a new step
TRIES = 120  # looks that may fail in a row, of one job: a minute of a full disk, say
STOP_SECONDS = 20.0  # for a process to save and end
KEPT = 3  # checkpoints of a job that are served
NICENESS = 19  # as nice as can be: whoever is answered by this server comes first
REFUSED = 6  # exit code: the data cannot be learned from
OPTIONS = {  # of the trainer, by what the API calls them
    "--epochs": "n_epochs",
    "--batch-size": "batch_size",
    "--learning-rate-multiplier": "learning_rate_multiplier",
}
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGKILL)


class Keeper:
    """Does what jobs there are, from `wake` until none is left or `close`; or always, by `watch`.

    Args:
        jobs: whose they are.
        niceness: of its processes; None for `NICENESS`.
    """

    def __init__(self, jobs: Jobs, niceness: int | None = None):
        self._jobs = jobs
        self._niceness = NICENESS if niceness is None else niceness
        self._folder = jobs.home / "jobs"
        self._guard = threading.Lock()  # of the next
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._checking: Process | None = None
        self._training: Training | None = None
        self._at: str | None = None  # the job that is being seen to
        self._failed: Counter[str | None] = Counter()  # looks in a row, by job

    def watch(self) -> None:
        """Starts work now and whenever there is any, whoever made it, until `close`."""
        if self._folder.exists():
            self._start()  # even if no job is to be done: what one left behind may be
        threading.Thread(target=self._watch, name="watch jobs", daemon=True).start()

    def _watch(self) -> None:
        while not self._closing.wait(WATCH):
            try:
                self.wake()
            except Exception:  # a busy disk, say
                log.exception("fine-tuning jobs cannot be looked for")

    def wake(self) -> None:
        """Starts work, if there is any and nobody in this process works."""
        if self._jobs.unfinished():
            self._start()

    def _start(self) -> None:
        with self._guard:
            works = self._thread is not None and self._thread.is_alive()
            if not works and not self._closing.is_set():
                self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Stops work; what runs is told to save and to end. Waits for it."""
        with self._guard:
            thread = self._thread
            self._closing.set()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        self._folder.mkdir(exist_ok=True, mode=0o700)
        lock = None
        try:
            while True:
                if lock is None and (lock := disk.try_lock(self._folder / LOCK)) is not None:
                    self._tidy()
                if not self._is_needed():
                    break
                if lock is not None:
                    self._look()
                self._closing.wait(TICK)
        finally:
            for process in (self._checking, self._training and self._training.process):
                if process is not None:
                    process.stop()
            self._checking = self._training = None
            if lock is not None:
                os.close(lock)

    def _is_needed(self) -> bool:
        """Whether to go on; from then on, `wake` knows that nobody works."""
        with self._guard:
            busy = self._training is not None or self._checking is not None
            if not self._closing.is_set() and (busy or self._jobs.unfinished()):
                return True
            self._thread = None
            return False

    def _look(self) -> None:
        for work in (self._check, self._train):
            self._at = None
            try:
                work()
            except Exception:  # a full disk, say: all of it can be done again at the next look
                self._failed[self._at] += 1
                if self._failed[self._at] == 1:
                    log.exception("the fine-tuning job %s is stuck", self._at)
                if (
                    self._at is not None and self._failed[self._at] >= TRIES
                ):  # the next has its turn
                    log.exception("the fine-tuning job %s failed", self._at)
                    with contextlib.suppress(Exception):
                        self._jobs.fail(
                            self._at, "server_error", "The server failed; its log says why."
                        )
            else:
                self._failed.pop(self._at, None)

    def _tidy(self) -> None:
        """Ends and removes what is left of jobs that are over: a server was killed meanwhile."""
        try:
            adapters.sweep(self._jobs.home)
            over, _ = self._jobs.store.page("job", keep=lambda job: job["status"] in OVER)
            for job in over:
                id, folder = job["id"], self._jobs.folder(job["id"])
                if self._jobs.is_cleared(id):
                    continue
                for name in ("check", "train"):
                    if (left := Process.left_behind(id, folder, name)) is not None:
                        left.stop()
                if job["status"] != "succeeded":  # its model was made, and never told of
                    adapters.delete(self._jobs.home, job["name"])
                    self._jobs.store.drop(job["result_file"])
                self._jobs.clear(id)
        except Exception:  # the jobs that are to be done do not depend on it
            log.exception("what is left of fine-tuning jobs cannot be removed")

    # -- looking at files ----------------------------------------------------------------------

    def _check(self) -> None:
        """Has the files of the oldest new job looked at."""
        process = self._checking
        if process is None:
            self._checking = self._begin_check()
            return
        self._at = id = process.job
        if self._status(id) != "validating_files":  # cancelled
            process.stop()
            self._checking = None
        elif process.is_over:
            self._checking = None
            if process.code == 0:
                found = json.loads(process.output())
                if (error := found["error"]) is None:
                    self._jobs.queue(id, found["warnings"])
                else:
                    self._jobs.fail(id, error["code"], error["message"], error["param"])
            elif process.code is not None and process.code > 0:
                self._jobs.fail(id, "server_error", process.last_words())
            elif process.code is not None:  # it was killed: once more
                self._begin_again(id, -process.code)

    def _begin_check(self) -> "Process | None":
        new = [job for job in self._jobs.unfinished() if job["status"] == "validating_files"]
        if not new:
            return None
        self._at = id = new[0]["id"]
        folder = self._jobs.folder(id)
        if (left := Process.left_behind(id, folder, "check")) is not None:
            return left
        files = [folder / DATA, *([folder / VALID] if new[0]["validation_file"] else [])]
        command = ["serve.jobs.validate", new[0]["path"], *map(str, files)]
        return Process.start(id, folder, "check", command, self._niceness)

    # -- training ------------------------------------------------------------------------------

    def _train(self) -> None:
        """Sees to the one job that is trained, or starts the next."""
        training = self._training
        if training is None:
            self._training = self._begin()
            return
        self._at = training.job
        if self._status(training.job) != "running":  # cancelled
            training.process.stop()
            self._training = None
            self._jobs.clear(training.job)
            return
        is_over = training.process.is_over  # before the last look at what it wrote
        training.follow(is_over)
        if is_over:
            self._training = None
            self._end(training)

    def _begin(self) -> "Training | None":
        jobs = self._jobs.unfinished()
        running = [job for job in jobs if job["status"] == "running"]
        queued = [job for job in jobs if job["status"] == "queued"]
        if not (running or queued):
            return None
        job = (running or queued)[0]
        self._at = id = job["id"]
        folder = self._jobs.folder(id)
        if (left := Process.left_behind(id, folder)) is not None:
            return Training(self._jobs, id, left)
        if job["status"] == "queued":
            from serve.models import fingerprint

            weights = fingerprint.of_weights(Path(job["path"]))
            if not self._jobs.move(id, "running", "Fine-tuning job started", weights=weights):
                return None
        process = Process.start(id, folder, "train", _command(job, folder), self._niceness)
        return Training(self._jobs, id, process)

    def _end(self, training: "Training") -> None:
        id, process = training.job, training.process
        code = process.code
        if code is None:  # we are not its parent: started again, it says at once if it was done
            return
        if code == 0:
            training.publish()
            self._jobs.clear(id)
        elif code == REFUSED:
            first = json.loads(process.output().splitlines()[0])
            message = f"The job failed due to an invalid training file. {first['message']}"
            self._jobs.fail(id, "invalid_training_file", message, "training_file")
        elif code < 0 or code in STOPPED:
            self._begin_again(id, -code if code < 0 else code - 128)
        else:
            self._jobs.fail(id, "server_error", process.last_words())

    def _begin_again(self, id: str, number: int) -> None:
        """After its process was ended by a signal: at the next look, unless it gets nowhere."""
        job = self._jobs.get(id)
        assert job is not None, "jobs are not deleted"
        died = 1 if job["step"] > job["died_at"] else job["died"] + 1
        if died == PATIENCE:
            self._jobs.fail(
                id,
                "server_error",
                f"The job's process was ended {died} times by a signal, the last time {number}, "
                f"without getting past step {job['step']}. Memory may be short.",
            )
            return
        with self._jobs.store.writing():
            self._jobs.store.change("job", id, died=died, died_at=job["step"])
            self._jobs.tell(
                id,
                f"The job's process was ended by signal {number}; it goes on from its last "
                "checkpoint",
                level="warn",
            )

    def _status(self, id: str) -> str:
        job = self._jobs.get(id)
        return "" if job is None else job["status"]


def _command(job: Job, folder: Path) -> list[str]:
    command = ["training", "finetune", "--json", "--model", job["path"], "--seed", str(job["seed"])]
    command += ["--data", str(folder / DATA), "--out", str(folder / OUT)]
    if job["validation_file"]:
        command += ["--valid", str(folder / VALID)]
    for option, name in OPTIONS.items():
        command += [option, str(job["asked"][name])]
    return command


class Training:
    """A job that is trained: its process, and how much of what it wrote has been told.

    Args:
        jobs: where it is told.
        job: its id.
        process: ours, or one that an earlier server left.
    """

    def __init__(self, jobs: Jobs, job: str, process: "Process"):
        self._jobs, self.job, self.process = jobs, job, process
        self._out = jobs.folder(job) / OUT
        self._lines = Lines(self._out / "metrics.jsonl")

    def follow(self, is_over: bool) -> None:
        """Tells what is new.

        Args:
            is_over: whether nothing will be written any more.
        """
        self._resolve()
        if is_over:  # should a line have been missed in a file that was written anew, it is not now
            self._lines = Lines(self._lines.path)
        self._tell(self._lines.new())
        self._publish_checkpoints()

    def _resolve(self) -> None:
        """Notes what "auto" became, once it is known."""
        job = self._get()
        path = self._out / "job.json"
        if job["steps"] is not None or not path.exists():
            return
        found = json.loads(path.read_text("utf-8"))
        if "steps" not in found:
            return
        numbers = {
            "n_epochs": found["epochs"],
            "batch_size": found["batch_size"],
            "learning_rate_multiplier": found["learning_rate_multiplier"],
        }
        with self._jobs.store.writing():
            self._jobs.store.change(
                "job",
                self.job,
                hyperparameters=numbers,
                steps=found["steps"],
                tokens=found["trained_tokens"],
            )
            if job["status"] == "running":
                self._jobs.tell(
                    self.job, f"Compiling the training step; then {found['steps']} of them"
                )

    def _tell(self, lines: list[dict[str, Any]]) -> None:
        if not lines:
            return
        with self._jobs.store.writing():
            job = self._get()
            if job["status"] != "running":  # cancelled a moment ago: that was the last word
                return
            step, validated, seconds = job["step"], job["validated"], 0.0
            for line in lines:
                number = line["step"]
                if "valid_loss" in line and number > validated:
                    validated = number
                    self._tell_numbers(job, number, "validation", line["valid_loss"], line)
                elif "loss" in line and number > step:
                    step, seconds = number, line.get("seconds", 0.0)
                    self._tell_numbers(job, number, "training", line["loss"], line)
            finish = job["estimated_finish"]
            if job["steps"] and seconds:
                finish = int(time.time() + (job["steps"] - step) * seconds)
            self._jobs.store.change(
                "job", self.job, step=step, validated=validated, estimated_finish=finish
            )

    def _tell_numbers(
        self, job: Job, step: int, what: str, loss: float, line: dict[str, Any]
    ) -> None:
        self._jobs.tell(
            self.job,
            f"Step {step}/{job['steps'] or '?'}: {what} loss={loss:.4f}",
            data=numbers([line]),
        )

    def _publish_checkpoints(self) -> None:
        """Makes models of the adapters that are there after each epoch."""
        told, _ = self._jobs.store.page("checkpoint", parent=self.job)
        for step in sorted(_steps(self._out / "adapters")):
            job = self._get()
            if step <= job["published"] or job["status"] != "running":
                continue
            name = f"{job['name']}{adapters.CHECKPOINT}{step}"
            try:
                self._make(job, name, step, self._out / "adapters" / f"step-{step}")
            except FileNotFoundError:  # the trainer keeps the last few, and was faster
                continue
            lines = Lines(self._lines.path).new()
            checkpoint = {
                "id": new_id("ftckpt_"),
                "created_at": int(time.time()),
                "fine_tuned_model_checkpoint": name,
                "step_number": step,
                "metrics": numbers(line for line in lines if line["step"] == step),
                "fine_tuning_job_id": self.job,
            }
            with self._jobs.store.writing():
                self._jobs.store.add("checkpoint", checkpoint["id"], checkpoint, parent=self.job)
                self._jobs.store.change("job", self.job, published=step)
                self._jobs.tell(self.job, f"Checkpoint created at step {step}")
            told.append(checkpoint)
        for checkpoint in told[:-KEPT]:
            adapters.delete(self._jobs.home, checkpoint["fine_tuned_model_checkpoint"])
            self._jobs.store.remove("checkpoint", checkpoint["id"])

    def publish(self) -> None:
        """Makes the model, writes the results, and ends the job."""
        job = self._get()
        name, file = job["name"], job["result_file"]
        self._make(job, name, job["steps"], self._out / "adapter")
        if self._jobs.store.get("file", file) is None:
            data = results(Lines(self._lines.path).new()).encode()
            with self._jobs.store.receiving(file) as incoming:
                incoming.write(data)
                record = file_record(file, "step_metrics.csv", len(data), "fine-tune-results")
                incoming.keep(record)
        succeeded = self._jobs.move(
            self.job,
            "succeeded",
            f"New fine-tuned model created: {name}",
            "The job has successfully completed",
            fine_tuned_model=name,
            result_files=[file],
            trained_tokens=job["tokens"],
        )
        if not succeeded:  # it was cancelled a moment ago
            adapters.delete(self._jobs.home, name)
            self._jobs.store.drop(file)

    def _make(self, job: Job, name: str, step: int, adapter: Path) -> None:
        card = adapters.Card(
            id=name,
            base=job["model"],
            path=job["path"],
            weights=job["weights"],
            created=int(time.time()),
            job=self.job,
            step=step,
        )
        adapters.put(self._jobs.home, card, adapter)

    def _get(self) -> Job:
        job = self._jobs.get(self.job)
        assert job is not None, "jobs are not deleted"
        return job


class Process:
    """A niced process of a job's. It holds a lock for as long as it lives, whoever started it."""

    def __init__(self, job: str, folder: Path, name: str, ours: subprocess.Popen[bytes] | None):
        self.job, self._folder, self._name, self._ours = job, folder, name, ours

    @classmethod
    def start(
        cls, job: str, folder: Path, name: str, module: Iterable[str], niceness: int = 0
    ) -> "Process":
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
        return cls(job, folder, name, ours)

    @classmethod
    def left_behind(cls, job: str, folder: Path, name: str = "train") -> "Process | None":
        """The process that a server before us started and that still lives, if there is one."""
        found = cls(job, folder, name, None)
        return None if found.is_over else found

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        if self._ours is not None:
            return self._ours.poll() is not None
        lock = disk.try_lock(self._folder / f"{self._name}.lock")
        if lock is None:
            return False
        os.close(lock)
        return True

    @property
    def code(self) -> int | None:
        """With what code it ended, or minus the signal that ended it; None if it is not ours."""
        return None if self._ours is None else self._ours.poll()

    def stop(self) -> None:
        """Has it save and end; ends it, if that takes too long. Waits."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.is_over:
                return
            self._send(number)
            end = time.monotonic() + STOP_SECONDS
            while time.monotonic() < end and not self.is_over:
                time.sleep(0.02)

    def _send(self, number: int) -> None:
        if self._ours is not None:
            self._ours.send_signal(number)
            return
        # It lives, as its lock says, so that this number is its own and nobody else's.
        with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
            os.kill(int((self._folder / f"{self._name}.pid").read_text("utf-8")), number)

    def output(self) -> str:
        """What it answered."""
        return (self._folder / f"{self._name}.out").read_text("utf-8")

    def last_words(self) -> str:
        """The last line it wrote about what went wrong."""
        text = (self._folder / f"{self._name}.log").read_text("utf-8", "replace")
        lines = [line for line in text.splitlines() if line.strip()]
        reason = lines[-1].removeprefix("python -m training: ") if lines else "it did not say why"
        return f"The job failed: {reason[:1000]}"


class Lines:
    """The lines of a file that grows, or is written anew, as JSON: those not given before."""

    def __init__(self, path: Path):
        self.path, self._at, self._inode = path, 0, 0

    def new(self) -> list[dict[str, Any]]:
        """What was added; all of it, if the file is another one now."""
        try:
            with self.path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._at, self._inode = 0, inode
                file.seek(self._at)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._at += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]


def numbers(lines: Iterable[dict[str, Any]]) -> dict[str, float]:
    """What lines of one step say, under OpenAI's names."""
    names = {
        "step": ("step",),
        "loss": ("train_loss",),
        "accuracy": ("train_mean_token_accuracy",),
        "valid_loss": ("valid_loss", "full_valid_loss"),  # it is the whole file's
        "valid_accuracy": ("valid_mean_token_accuracy", "full_valid_mean_token_accuracy"),
    }
    return {
        name: line[key]
        for line in lines
        for key, own in names.items()
        if key in line
        for name in own
    }


def results(lines: Iterable[dict[str, Any]]) -> str:
    """The file of results: a row a step, as OpenAI's."""
    columns = {
        "step": "step",
        "train_loss": "train_loss",
        "train_accuracy": "train_mean_token_accuracy",
        "valid_loss": "valid_loss",
        "valid_mean_token_accuracy": "valid_mean_token_accuracy",
    }
    steps: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        steps.setdefault(line["step"], []).append(line)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for own in steps.values():
        found = numbers(own)
        writer.writerow([_rounded(found.get(name, "")) for name in columns.values()])
    return text.getvalue()


def _rounded(value: float | str) -> float | str:
    return round(value, 5) if isinstance(value, float) else value


def _steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdecimal()]


def is_kept(jobs: Jobs) -> bool:
    """Whether a process, this one or another, works on the jobs of a data folder."""
    if (lock := disk.try_lock(jobs.home / "jobs" / LOCK)) is None:
        return True
    os.close(lock)
    return False


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
