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

from serve.jobs.jobs import FINISHED, OUTPUT_FOLDER, TRAIN_FILE, VALID_FILE, Job, JobStore
from serve.jobs.process import JobProcess
from serve.jobs.progress import TrainingRun
from serve.models import adapters, disk

log = logging.getLogger(__name__)

LOCK_FILE = "keeper.lock"
POLL_SECONDS = 0.5  # seconds between two looks
IDLE_POLL_SECONDS = (
    15.0  # seconds between two looks of an idle server: for jobs that a dead one left
)
MAX_CRASHES = 3  # processes that may die in a row without a new step
MAX_POLL_ERRORS = 120  # looks that may fail in a row, of one job: a minute of a full disk, say
NICENESS = 19  # as nice as can be: whoever is answered by this server comes first
EXIT_INVALID_DATA = 6  # exit code: the data cannot be learned from
TRAINER_OPTIONS = {  # of the trainer, by what the API calls them
    "--epochs": "n_epochs",
    "--batch-size": "batch_size",
    "--learning-rate-multiplier": "learning_rate_multiplier",
}
SIGNAL_EXIT_CODES = (128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGKILL)


class JobRunner:
    """Does what jobs there are, from `wake` until none is left or `close`; or always, by `watch`.

    Args:
        jobs: whose they are.
        niceness: of its processes; None for `NICENESS`.
    """

    def __init__(self, jobs: JobStore, niceness: int | None = None):
        self._jobs = jobs
        self._niceness = NICENESS if niceness is None else niceness
        self._folder = jobs.home / "jobs"
        self._thread_lock = threading.Lock()  # of the next
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._validation: JobProcess | None = None
        self._training: TrainingRun | None = None
        self._current_job_id: str | None = None  # the job that is being seen to
        self._error_counts: Counter[str | None] = Counter()  # looks in a row, by job

    def watch(self) -> None:
        """Starts work now and whenever there is any, whoever made it, until `close`."""
        if self._folder.exists():
            self._start()  # even if no job is to be done: what one left behind may be
        threading.Thread(target=self._watch, name="watch jobs", daemon=True).start()

    def _watch(self) -> None:
        while not self._closing.wait(IDLE_POLL_SECONDS):
            try:
                self.wake()
            except Exception:  # a busy disk, say
                log.exception("fine-tuning jobs cannot be looked for")

    def wake(self) -> None:
        """Starts work, if there is any and nobody in this process works."""
        if self._jobs.unfinished():
            self._start()

    def _start(self) -> None:
        with self._thread_lock:
            works = self._thread is not None and self._thread.is_alive()
            if not works and not self._closing.is_set():
                self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Stops work; what runs is told to save and to end. Waits for it."""
        with self._thread_lock:
            thread = self._thread
            self._closing.set()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        self._folder.mkdir(exist_ok=True, mode=0o700)
        lock = None
        try:
            while True:
                if lock is None and (lock := disk.try_lock(self._folder / LOCK_FILE)) is not None:
                    self._clean_up()
                if not self._is_needed():
                    break
                if lock is not None:
                    self._poll()
                self._closing.wait(POLL_SECONDS)
        finally:
            for process in (self._validation, self._training and self._training.process):
                if process is not None:
                    process.stop()
            self._validation = self._training = None
            if lock is not None:
                os.close(lock)

    def _is_needed(self) -> bool:
        """Whether to go on; from then on, `wake` knows that nobody works."""
        with self._thread_lock:
            busy = self._training is not None or self._validation is not None
            if not self._closing.is_set() and (busy or self._jobs.unfinished()):
                return True
            self._thread = None
            return False

    def _poll(self) -> None:
        for work in (self._poll_validation, self._poll_training):
            self._current_job_id = None
            try:
                work()
            except Exception:  # a full disk, say: all of it can be done again at the next look
                self._error_counts[self._current_job_id] += 1
                if self._error_counts[self._current_job_id] == 1:
                    log.exception("the fine-tuning job %s is stuck", self._current_job_id)
                if (
                    self._current_job_id is not None
                    and self._error_counts[self._current_job_id] >= MAX_POLL_ERRORS
                ):  # the next has its turn
                    log.exception("the fine-tuning job %s failed", self._current_job_id)
                    with contextlib.suppress(Exception):
                        self._jobs.fail(
                            self._current_job_id,
                            "server_error",
                            "The server failed; its log says why.",
                        )
            else:
                self._error_counts.pop(self._current_job_id, None)

    def _clean_up(self) -> None:
        """Ends and removes what is left of jobs that are over: a server was killed meanwhile."""
        try:
            adapters.clean_up(self._jobs.home)
            over, _ = self._jobs.store.page("job", predicate=lambda job: job["status"] in FINISHED)
            for job in over:
                id, folder = job["id"], self._jobs.folder(job["id"])
                if self._jobs.is_cleaned_up(id):
                    continue
                for name in ("check", "train"):
                    if (left := JobProcess.find_running(id, folder, name)) is not None:
                        left.stop()
                if job["status"] != "succeeded":  # its model was made, and never told of
                    adapters.delete(self._jobs.home, job["name"])
                    self._jobs.store.delete_file(job["result_file"])
                self._jobs.clean_up(id)
        except Exception:  # the jobs that are to be done do not depend on it
            log.exception("what is left of fine-tuning jobs cannot be removed")

    # -- looking at files ----------------------------------------------------------------------

    def _poll_validation(self) -> None:
        """Has the files of the oldest new job looked at."""
        process = self._validation
        if process is None:
            self._validation = self._start_validation()
            return
        self._current_job_id = id = process.job_id
        if self._status(id) != "validating_files":  # cancelled
            process.stop()
            self._validation = None
        elif process.has_exited:
            self._validation = None
            if process.exit_code == 0:
                found = json.loads(process.output())
                if (error := found["error"]) is None:
                    self._jobs.queue(id, found["warnings"])
                else:
                    self._jobs.fail(id, error["code"], error["message"], error["param"])
            elif process.exit_code is not None and process.exit_code > 0:
                self._jobs.fail(id, "server_error", process.failure_message())
            elif process.exit_code is not None:  # it was killed: once more
                self._restart(id, -process.exit_code)

    def _start_validation(self) -> JobProcess | None:
        new = [job for job in self._jobs.unfinished() if job["status"] == "validating_files"]
        if not new:
            return None
        self._current_job_id = id = new[0]["id"]
        folder = self._jobs.folder(id)
        if (left := JobProcess.find_running(id, folder, "check")) is not None:
            return left
        files = [folder / TRAIN_FILE, *([folder / VALID_FILE] if new[0]["validation_file"] else [])]
        command = ["serve.jobs.validate", new[0]["path"], *map(str, files)]
        return JobProcess.start(id, folder, "check", command, self._niceness)

    # -- training ------------------------------------------------------------------------------

    def _poll_training(self) -> None:
        """Sees to the one job that is trained, or starts the next."""
        training = self._training
        if training is None:
            self._training = self._start_training()
            return
        self._current_job_id = training.job_id
        if self._status(training.job_id) != "running":  # cancelled
            training.process.stop()
            self._training = None
            self._jobs.clean_up(training.job_id)
            return
        is_over = training.process.has_exited  # before the last look at what it wrote
        training.update(is_over)
        if is_over:
            self._training = None
            self._finish_training(training)

    def _start_training(self) -> TrainingRun | None:
        jobs = self._jobs.unfinished()
        running = [job for job in jobs if job["status"] == "running"]
        queued = [job for job in jobs if job["status"] == "queued"]
        if not (running or queued):
            return None
        job = (running or queued)[0]
        self._current_job_id = id = job["id"]
        folder = self._jobs.folder(id)
        if (left := JobProcess.find_running(id, folder)) is not None:
            return TrainingRun(self._jobs, id, left)
        if job["status"] == "queued":
            from serve.models import fingerprint

            weights = fingerprint.hash_weights(Path(job["path"]))
            if not self._jobs.set_status(id, "running", "Fine-tuning job started", weights=weights):
                return None
        process = JobProcess.start(id, folder, "train", _command(job, folder), self._niceness)
        return TrainingRun(self._jobs, id, process)

    def _finish_training(self, training: TrainingRun) -> None:
        id, process = training.job_id, training.process
        code = process.exit_code
        if code is None:  # we are not its parent: started again, it says at once if it was done
            return
        if code == 0:
            training.publish()
            self._jobs.clean_up(id)
        elif code == EXIT_INVALID_DATA:
            first = json.loads(process.output().splitlines()[0])
            message = f"The job failed due to an invalid training file. {first['message']}"
            self._jobs.fail(id, "invalid_training_file", message, "training_file")
        elif code < 0 or code in SIGNAL_EXIT_CODES:
            self._restart(id, -code if code < 0 else code - 128)
        else:
            self._jobs.fail(id, "server_error", process.failure_message())

    def _restart(self, id: str, number: int) -> None:
        """After its process was ended by a signal: at the next look, unless it gets nowhere."""
        job = self._jobs.get(id)
        assert job is not None, "jobs are not deleted"
        died = 1 if job["step"] > job["died_at"] else job["died"] + 1
        if died == MAX_CRASHES:
            self._jobs.fail(
                id,
                "server_error",
                f"The job's process was ended {died} times by a signal, the last time {number}, "
                f"without getting past step {job['step']}. Memory may be short.",
            )
            return
        with self._jobs.store.transaction():
            self._jobs.store.update("job", id, died=died, died_at=job["step"])
            self._jobs.add_event(
                id,
                f"The job's process was ended by signal {number}; it goes on from its last "
                "checkpoint",
                level="warn",
            )

    def _status(self, id: str) -> str:
        job = self._jobs.get(id)
        return "" if job is None else job["status"]


def has_active_runner(jobs: JobStore) -> bool:
    """Whether a process, this one or another, works on the jobs of a data folder."""
    if (lock := disk.try_lock(jobs.home / "jobs" / LOCK_FILE)) is None:
        return True
    os.close(lock)
    return False


def _command(job: Job, folder: Path) -> list[str]:
    command = ["training", "finetune", "--json", "--model", job["path"], "--seed", str(job["seed"])]
    command += ["--data", str(folder / TRAIN_FILE), "--out", str(folder / OUTPUT_FOLDER)]
    if job["validation_file"]:
        command += ["--valid", str(folder / VALID_FILE)]
    for option, name in TRAINER_OPTIONS.items():
        command += [option, str(job["asked"][name])]
    return command
