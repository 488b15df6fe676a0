"""The job runner: one job at a time, in a niced process, watched by one thread.

The process is `python -m training finetune`. It writes files (a line per training step, an adapter
after each epoch, checkpoints), and the thread turns them into events, models and a results file.
Process and thread communicate by files only, so that either can be killed at any time:

- If the process is killed, it is started again and resumes from its last checkpoint.
- If the server is killed, the process continues. The next server tests the lock of the process: if
  it is locked, the server watches the running process; if it is free, the server starts the process
  again, which exits at once if the training was complete.
- If the server is stopped, the process saves a checkpoint and exits; the next server resumes it.

If several servers use one data folder, a lock selects one of them as job runner; when it exits,
another takes over.
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
POLL_SECONDS = 0.5  # time between two polls of a running job
IDLE_POLL_SECONDS = 15.0  # time between two polls of an idle server, for jobs of a killed server
MAX_CRASHES = 3  # number of crashes in a row without a new training step, after which a job fails
MAX_POLL_ERRORS = 120  # number of failed polls in a row (a minute), after which a job fails
NICENESS = 19  # the highest: requests to the server have precedence
EXIT_INVALID_DATA = 6  # the trainer's exit code for an invalid training file
TRAINER_OPTIONS = {  # names of hyperparameters in the API, by option of the trainer
    "--epochs": "n_epochs",
    "--batch-size": "batch_size",
    "--learning-rate-multiplier": "learning_rate_multiplier",
}
SIGNAL_EXIT_CODES = (128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGKILL)


class JobRunner:
    """Runs unfinished jobs on a thread, from `wake` or `watch` until `close`.

    Args:
        jobs: the jobs of a data folder.
        niceness: the niceness of the processes; None for `NICENESS`.
    """

    def __init__(self, jobs: JobStore, niceness: int | None = None):
        self._jobs = jobs
        self._niceness = NICENESS if niceness is None else niceness
        self._folder = jobs.home / "jobs"
        self._thread_lock = threading.Lock()  # guards _thread
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._validation: JobProcess | None = None
        self._training: TrainingRun | None = None
        self._current_job_id: str | None = None  # the job of the current poll
        self._error_counts: Counter[str | None] = Counter()  # failed polls in a row, by job

    def watch(self) -> None:
        """Run jobs until `close`, including those that other processes add to the store."""
        if self._folder.exists():
            self._start()  # even without unfinished jobs, to clean up after a killed server
        threading.Thread(target=self._watch, name="watch jobs", daemon=True).start()

    def _watch(self) -> None:
        while not self._closing.wait(IDLE_POLL_SECONDS):
            try:
                self.wake()
            except Exception:  # a busy disk, for example
                log.exception("polling for fine-tuning jobs failed; it will be tried again")

    def wake(self) -> None:
        """Start the thread if there are unfinished jobs and it does not run."""
        if self._jobs.unfinished():
            self._start()

    def _start(self) -> None:
        with self._thread_lock:
            is_running = self._thread is not None and self._thread.is_alive()
            if not is_running and not self._closing.is_set():
                self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Stop the thread and its processes, which save their state, and wait for them."""
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
        """Whether there are jobs to run; if not, clear `_thread`, for `wake` to start a new one."""
        with self._thread_lock:
            is_busy = self._training is not None or self._validation is not None
            if not self._closing.is_set() and (is_busy or self._jobs.unfinished()):
                return True
            self._thread = None
            return False

    def _poll(self) -> None:
        for poll in (self._poll_validation, self._poll_training):
            self._current_job_id = None
            try:
                poll()
            except Exception:  # a full disk, for example: the next poll tries again
                self._error_counts[self._current_job_id] += 1
                if self._error_counts[self._current_job_id] == 1:
                    log.exception(
                        "polling the fine-tuning job %s failed; it will be tried again",
                        self._current_job_id,
                    )
                if (
                    self._current_job_id is not None
                    and self._error_counts[self._current_job_id] >= MAX_POLL_ERRORS
                ):  # give up on this job, so that the next one can run
                    log.exception("the fine-tuning job %s failed", self._current_job_id)
                    with contextlib.suppress(Exception):
                        self._jobs.fail(
                            self._current_job_id,
                            "server_error",
                            "The server could not run the job: see the server's log.",
                        )
            else:
                self._error_counts.pop(self._current_job_id, None)

    def _clean_up(self) -> None:
        """Stop processes and remove files of finished jobs that a killed server left behind."""
        try:
            adapters.clean_up(self._jobs.home)
            finished, _ = self._jobs.store.page(
                "job", predicate=lambda job: job["status"] in FINISHED
            )
            for job in finished:
                id, folder = job["id"], self._jobs.folder(job["id"])
                if self._jobs.is_cleaned_up(id):
                    continue
                for name in ("check", "train"):
                    if (process := JobProcess.find_running(id, folder, name)) is not None:
                        process.stop()
                if job["status"] != "succeeded":  # its model may have been saved before it failed
                    adapters.delete(self._jobs.home, job["name"])
                    self._jobs.store.delete_file(job["result_file"])
                self._jobs.clean_up(id)
        except Exception:  # unfinished jobs do not depend on it
            log.exception("files of finished fine-tuning jobs cannot be removed")

    # -- validation ----------------------------------------------------------------------------

    def _poll_validation(self) -> None:
        """Poll the running validation process, or start one for the oldest job that needs it."""
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
                result = json.loads(process.output())
                if (error := result["error"]) is None:
                    self._jobs.queue(id, result["warnings"])
                else:
                    self._jobs.fail(id, error["code"], error["message"], error["param"])
            elif process.exit_code is not None and process.exit_code > 0:
                self._jobs.fail(id, "server_error", process.failure_message())
            elif process.exit_code is not None:  # killed by a signal: try again
                self._restart(id, -process.exit_code)

    def _start_validation(self) -> JobProcess | None:
        new = [job for job in self._jobs.unfinished() if job["status"] == "validating_files"]
        if not new:
            return None
        self._current_job_id = id = new[0]["id"]
        folder = self._jobs.folder(id)
        if (process := JobProcess.find_running(id, folder, "check")) is not None:
            return process
        files = [folder / TRAIN_FILE, *([folder / VALID_FILE] if new[0]["validation_file"] else [])]
        command = ["serve.jobs.validate", new[0]["path"], *map(str, files)]
        return JobProcess.start(id, folder, "check", command, self._niceness)

    # -- training ------------------------------------------------------------------------------

    def _poll_training(self) -> None:
        """Poll the running job, or start the next queued one."""
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
        is_over = training.process.has_exited  # before the last read of its output
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
        if (process := JobProcess.find_running(id, folder)) is not None:
            return TrainingRun(self._jobs, id, process)
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
        if code is None:  # exit code unknown: the process of another server
            return  # the next poll starts it again; it exits at once if the training was complete
        if code == 0:
            training.publish()
            self._jobs.clean_up(id)
        elif code == EXIT_INVALID_DATA:
            report = json.loads(process.output().splitlines()[0])
            message = f"The job failed due to an invalid training file. {report['message']}"
            self._jobs.fail(id, "invalid_training_file", message, "training_file")
        elif code < 0 or code in SIGNAL_EXIT_CODES:
            self._restart(id, -code if code < 0 else code - 128)
        else:
            self._jobs.fail(id, "server_error", process.failure_message())

    def _restart(self, id: str, signal_number: int) -> None:
        """Let the next poll restart a killed process, or fail the job after `MAX_CRASHES`."""
        job = self._jobs.get(id)
        assert job is not None, "jobs are not deleted"
        num_crashes = 1 if job["step"] > job["died_at"] else job["died"] + 1
        if num_crashes == MAX_CRASHES:
            self._jobs.fail(
                id,
                "server_error",
                f"The job's process was ended {num_crashes} times by a signal, last by signal "
                f"{signal_number}, without progress after step {job['step']}. Check that enough "
                "memory is available.",
            )
            return
        with self._jobs.store.transaction():
            self._jobs.store.update("job", id, died=num_crashes, died_at=job["step"])
            self._jobs.add_event(
                id,
                f"The job's process was ended by signal {signal_number}; it resumes from its last "
                "checkpoint",
                level="warn",
            )

    def _status(self, id: str) -> str:
        job = self._jobs.get(id)
        return "" if job is None else job["status"]


def has_active_runner(jobs: JobStore) -> bool:
    """Return whether this or another process runs the jobs of a data folder."""
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
