"""The jobs of this machine, as the command line asks for them: without a server."""

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

NICENESS = 5  # of what is trained here: somebody waits for it, and nobody else
RESUME_HINT = "`pellucid finetune follow {0}` goes on, `pellucid finetune cancel {0}` ends it"
POLL_SECONDS = 0.25  # seconds between two looks


@contextlib.contextmanager
def open_local_backend() -> Iterator["LocalBackend"]:
    """The jobs of the data folder."""
    home = settings.data_folder()
    with (
        contextlib.closing(Store(home)) as store,
        contextlib.closing(LocalBackend(JobStore(store, home))) as d,
    ):
        yield d


class LocalBackend:
    """The jobs of this machine's data folder, with the files and the models that are here.

    Args:
        jobs: of that folder.
    """

    location = "on this machine"

    def __init__(self, jobs: JobStore):
        self._jobs, self._runner = jobs, JobRunner(jobs, NICENESS)

    def close(self) -> None:
        """Stops what this process trains."""
        self._runner.close()

    def create(self, model: str | None, data: Path, valid: Path | None, **fields: Any) -> dict:
        place = local.locate_trainable(model)
        if place.adapter is not None:
            raise WrongUsage(f"{place.id} was fine-tuned already: begin with its base")
        try:
            check_name(place.id)
            if fields["suffix"] is not None:
                check_suffix(place.id, fields["suffix"])
        except ValueError as error:
            raise WrongUsage(str(error)) from None
        warnings = self._validate(place, data, valid)
        files = [None if path is None else self._store_file(path) for path in (data, valid)]
        job = self._jobs.create(
            model=place.id,
            model_path=place.path,
            training_file=str(files[0]),
            validation_file=files[1],
            is_validated=True,
            warnings=warnings,
            **fields,
        )
        return to_api(job)

    def _validate(self, place: ModelFiles, data: Path, valid: Path | None) -> list[str]:
        """Check the files; return warnings.

        Raises:
            CheckFailed: training on one of them is impossible.
        """
        from serve.jobs import validate  # brings JAX along

        with local.report_load_errors(place):
            reports = validate.validate_files(place.path, data, valid)
        for report in reports.values():
            if report.ok:
                continue
            first, more = report.problems[0], report.counts.total() - 1
            place_of = f"{report.path}:{first.line}" if first.line else report.path
            rest = f" ({more} more: `pellucid finetune check {report.path}` lists them)"
            raise CheckFailed(f"{place_of}: {first.message}{rest if more else ''}")
        return validate.warning_messages(reports)

    def _store_file(self, path: Path) -> str:
        """Uploads a file, so to speak; gives its id."""
        id = new_id("file-")
        with self._jobs.store.open_blob(id) as incoming, path.open("rb") as file:
            while data := file.read(2**20):
                incoming.write(data)
            incoming.commit(file_record(id, path.name, incoming.size, "fine-tune"))
        return id

    def jobs(self) -> list[dict]:
        found, _ = self._jobs.store.page("job", newest_first=True)
        for job in found:
            if job["status"] not in UNFINISHED or has_active_runner(self._jobs):
                continue
            if JobProcess.find_running(job["id"], self._jobs.folder(job["id"])) is None:
                job["status"] = "stopped"  # nobody works on it; whoever follows it will
        return [to_api(job) for job in found]

    def models(self) -> frozenset[str]:
        return frozenset(map(unquote, adapters.folder_names(self._jobs.home)))

    def job(self, id: str) -> dict:
        if (job := self._jobs.get(id)) is None:
            raise NotFound(f"there is no job {id}: `pellucid finetune list` shows those there are")
        return to_api(job)

    def cancel(self, id: str) -> dict:
        status = self.job(id)["status"]
        try:
            job = self._jobs.cancel(id)
        except JobFinished:
            raise Failure(f"{id} is over: it {status}") from None
        # Whoever keeps it stops its process; but that may be one which a killed server left.
        if (left := JobProcess.find_running(id, self._jobs.folder(id))) is not None:
            left.stop()
        self._jobs.clean_up(id)
        return to_api(job)

    def delete(self, name: str) -> list[str]:
        model, job = name, self._jobs.get(name)
        if job is not None:
            check_finished(job)
            model = job["name"]
        if deleted := self._jobs.delete_model(model):
            return deleted
        if job is not None:
            raise NotFound(f"there is no model of {name}: it {job['status']}, or was deleted")
        raise NotFound(f"no model {name} was made here: `pellucid finetune list` shows them")

    def detached_hint(self, id: str) -> str:
        return f"it learns until it is done; --follow shows how. Ctrl-C stops it ({RESUME_HINT.format(id)})"

    def detach(self, id: str) -> None:
        console.info(f"\nstopping {id} ...")
        self._runner.close()
        others = (
            has_active_runner(self._jobs)
            or JobProcess.find_running(id, self._jobs.folder(id)) is not None
        )
        state = "goes on: another process here works on it" if others else "is stopped and saved"
        console.info(f"{id} {state} ({RESUME_HINT.format(id)})")

    def usage_hint(self, model: str) -> str:
        return f"ask it: pellucid chat -m {model} (any server here offers it, too)"

    def events(self, id: str) -> Iterator[dict]:
        self._runner.wake()
        after = None
        while True:
            status = self.job(id)["status"]  # before its events: the last ones come before its end
            found, _ = self._jobs.store.page("event", parent=id, after=after)
            yield from found
            after = found[-1]["id"] if found else after
            if status in FINISHED:
                return
            time.sleep(POLL_SECONDS)
