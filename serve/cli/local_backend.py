"""The job backend of this machine: `pellucid finetune` without a server."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from serve import settings
from serve.cli import console, local
from serve.exceptions import CheckFailed, Failure, NotFound, WrongUsage
from serve.jobs.jobs import (
    FINISHED,
    UNFINISHED,
    JobFinished,
    JobStore,
    check_finished,
    check_name,
    check_suffix,
    to_api,
)
from serve.jobs.process import JobProcess
from serve.jobs.runner import JobRunner, has_active_runner
from serve.jobs.store import Store, file_record, new_id
from serve.models import adapters
from serve.models.spec import ModelFiles

NICENESS = 5  # of the training process; 19 on a server, but here the user waits for the result
RESUME_HINT = "`pellucid finetune follow {0}` resumes it, `pellucid finetune cancel {0}` cancels it"
POLL_SECONDS = 0.25  # between two reads of the events of a job


@contextlib.contextmanager
def open_local_backend() -> Iterator["LocalBackend"]:
    """Open the backend of the data folder; at exit stop the training that this process started."""
    home = settings.data_folder()
    with (
        contextlib.closing(Store(home)) as store,
        contextlib.closing(LocalBackend(JobStore(store, home))) as backend,
    ):
        yield backend


class LocalBackend:
    """A `JobBackend` for the jobs, files and models in the data folder of this machine.

    Args:
        jobs: the jobs of the data folder.
    """

    location = "on this machine"

    def __init__(self, jobs: JobStore):
        self._jobs, self._runner = jobs, JobRunner(jobs, NICENESS)

    def close(self) -> None:
        """Stop the training that this process started."""
        self._runner.close()

    def create(self, model: str | None, data: Path, valid: Path | None, **fields: Any) -> dict:
        """Validate the files, copy them into the store, and create a job; see `JobBackend`.

        Raises:
            WrongUsage: the model cannot be the base of a job, or the suffix is invalid.
            CheckFailed: a file cannot be used for training.
            Failure: the model cannot be located or loaded.
        """
        base = local.locate_trainable(model)
        if base.adapter is not None:
            raise WrongUsage(f"{base.id} is already fine-tuned; start from its base model")
        try:
            check_name(base.id)
            if fields["suffix"] is not None:
                check_suffix(base.id, fields["suffix"])
        except ValueError as error:
            raise WrongUsage(str(error)) from None
        warnings = self._validate(base, data, valid)
        file_ids = [None if path is None else self._store_file(path) for path in (data, valid)]
        job = self._jobs.create(
            model=base.id,
            model_path=base.path,
            training_file=str(file_ids[0]),
            validation_file=file_ids[1],
            is_validated=True,
            warnings=warnings,
            **fields,
        )
        return to_api(job)

    def _validate(self, base: ModelFiles, data: Path, valid: Path | None) -> list[str]:
        """Check the files and return warnings.

        Raises:
            CheckFailed: a file cannot be used for training.
        """
        from serve.jobs import validate  # imports JAX

        with local.report_load_errors(base):
            reports = validate.validate_files(base.path, data, valid)
        for report in reports.values():
            if report.ok:
                continue
            first, more = report.problems[0], report.counts.total() - 1
            location = f"{report.path}:{first.line}" if first.line else report.path
            rest = f" ({more} more; `pellucid finetune check {report.path}` lists them)"
            raise CheckFailed(f"{location}: {first.message}{rest if more else ''}")
        return validate.warning_messages(reports)

    def _store_file(self, path: Path) -> str:
        """Copy a file into the store and return its id."""
        id = new_id("file-")
        with self._jobs.store.open_blob(id) as incoming, path.open("rb") as file:
            while data := file.read(2**20):
                incoming.write(data)
            incoming.commit(file_record(id, path.name, incoming.size, "fine-tune"))
        return id

    def jobs(self) -> list[dict]:
        """Return all jobs, newest first; an unfinished job that no process runs is "stopped"."""
        jobs, _ = self._jobs.store.page("job", newest_first=True)
        for job in jobs:
            if job["status"] not in UNFINISHED or has_active_runner(self._jobs):
                continue
            if JobProcess.find_running(job["id"], self._jobs.folder(job["id"])) is None:
                job["status"] = "stopped"  # `pellucid finetune follow` resumes it
        return [to_api(job) for job in jobs]

    def models(self) -> frozenset[str]:
        """Return the ids of the fine-tuned models in the data folder."""
        return frozenset(map(unquote, adapters.folder_names(self._jobs.home)))

    def job(self, id: str) -> dict:
        """Return a job; raise `NotFound` if there is none."""
        if (job := self._jobs.get(id)) is None:
            raise NotFound(f"there is no job {id}; `pellucid finetune list` shows the jobs")
        return to_api(job)

    def cancel(self, id: str) -> dict:
        """Cancel a job, stop its process, and return the job; see `JobBackend`."""
        status = self.job(id)["status"]
        try:
            job = self._jobs.cancel(id)
        except JobFinished:
            raise Failure(f"the job {id} is already finished: its status is {status}") from None
        # The runner of the job stops its process, unless the runner was killed.
        if (process := JobProcess.find_running(id, self._jobs.folder(id))) is not None:
            process.stop()
        self._jobs.clean_up(id)
        return to_api(job)

    def delete(self, name: str) -> list[str]:
        """Delete a fine-tuned model and its checkpoints; return their ids; see `JobBackend`."""
        model, job = name, self._jobs.get(name)
        if job is not None:
            check_finished(job)
            model = job["name"]
        if deleted := self._jobs.delete_model(model):
            return deleted
        if job is not None:
            raise NotFound(
                f"the job {name} has no model: its status is {job['status']}, or the model was "
                "deleted"
            )
        raise NotFound(f"there is no fine-tuned model {name}; `pellucid finetune list` shows them")

    def detached_hint(self, id: str) -> str:
        """Return the message for a job that was created without `--follow`."""
        return (
            "training until the job is finished; --follow shows its progress. "
            f"Ctrl-C stops it ({RESUME_HINT.format(id)})"
        )

    def detach(self, id: str) -> None:
        """Stop the training that this process started, and print the state of the job."""
        console.info(f"\nstopping {id} ...")
        self._runner.close()
        is_running = (
            has_active_runner(self._jobs)
            or JobProcess.find_running(id, self._jobs.folder(id)) is not None
        )
        state = "continues in another process" if is_running else "is stopped, with a checkpoint"
        console.info(f"{id} {state} ({RESUME_HINT.format(id)})")

    def usage_hint(self, model: str) -> str:
        """Return the message that tells how to use a fine-tuned model."""
        return f"try it: pellucid chat -m {model} (servers on this machine serve it, too)"

    def events(self, id: str) -> Iterator[dict]:
        """Yield the past and the new events of a job until it is finished; run it if needed."""
        self._runner.wake()
        after = None
        while True:
            # Read the status before the events: the last events precede the end of the job.
            status = self.job(id)["status"]
            events, _ = self._jobs.store.page("event", parent=id, after=after)
            yield from events
            after = events[-1]["id"] if events else after
            if status in FINISHED:
                return
            time.sleep(POLL_SECONDS)
