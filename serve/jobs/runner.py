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
"""

import contextlib
import json
import logging
import os
import signal
import threading
from collections import Counter
from pathlib import Path

from serve.jobs.jobs import DATA, OUT, OVER, VALID, Job, Jobs
from serve.jobs.process import Process
from serve.jobs.progress import Training
from serve.models import adapters, disk

log = logging.getLogger(__name__)

LOCK = "keeper.lock"
TICK = 0.5  # seconds between two looks
WATCH = 15.0  # seconds between two looks of an idle server: for jobs that a dead one left
PATIENCE = 3  # processes that may die in a row without a new step
TRIES = 120  # looks that may fail in a row, of one job: a minute of a full disk, say
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

    def _begin_check(self) -> Process | None:
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

    def _begin(self) -> Training | None:
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

    def _end(self, training: Training) -> None:
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


def is_kept(jobs: Jobs) -> bool:
    """Whether a process, this one or another, works on the jobs of a data folder."""
    if (lock := disk.try_lock(jobs.home / "jobs" / LOCK)) is None:
        return True
    os.close(lock)
    return False


def _command(job: Job, folder: Path) -> list[str]:
    command = ["training", "finetune", "--json", "--model", job["path"], "--seed", str(job["seed"])]
    command += ["--data", str(folder / DATA), "--out", str(folder / OUT)]
    if job["validation_file"]:
        command += ["--valid", str(folder / VALID)]
    for option, name in OPTIONS.items():
        command += [option, str(job["asked"][name])]
    return command
