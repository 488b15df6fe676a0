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
    OVER,
    UNFINISHED,
    JobIsOver,
    Jobs,
    check_is_over,
    check_name,
    check_suffix,
    shown,
)
from serve.jobs.process import Process
from serve.jobs.runner import Keeper, is_kept
from serve.jobs.store import Store, file_record, new_id
from serve.models import adapters
from serve.models.spec import ModelFiles

NICENESS = 5  # of what is trained here: somebody waits for it, and nobody else
LATER = "`pellucid finetune follow {0}` goes on, `pellucid finetune cancel {0}` ends it"
UNTIL_TOLD = 0.25  # seconds between two looks


@contextlib.contextmanager
def here() -> Iterator["Here"]:
    """The jobs of the data folder."""
    home = settings.data_folder()
    with contextlib.closing(Store(home)) as store, contextlib.closing(Here(Jobs(store, home))) as d:
        yield d


class Here:
    """The jobs of this machine's data folder, with the files and the models that are here.

    Args:
        jobs: of that folder.
    """

    where = "on this machine"

    def __init__(self, jobs: Jobs):
        self._jobs, self._keeper = jobs, Keeper(jobs, NICENESS)

    def close(self) -> None:
        """Stops what this process trains."""
        self._keeper.close()

    def create(self, model: str | None, data: Path, valid: Path | None, **fields: Any) -> dict:
        place = local.trainable(model)
        if place.adapter is not None:
            raise WrongUsage(f"{place.id} was fine-tuned already: begin with its base")
        try:
            check_name(place.id)
            if fields["suffix"] is not None:
                check_suffix(place.id, fields["suffix"])
        except ValueError as error:
            raise WrongUsage(str(error)) from None
        warnings = self._look(place, data, valid)
        files = [None if path is None else self._kept(path) for path in (data, valid)]
        job = self._jobs.create(
            model=place.id,
            path=place.path,
            training_file=str(files[0]),
            validation_file=files[1],
            is_checked=True,
            warnings=warnings,
            **fields,
        )
        return shown(job)

    def _look(self, place: ModelFiles, data: Path, valid: Path | None) -> list[str]:
        """Check the files; return warnings.

        Raises:
            CheckFailed: training on one of them is impossible.
        """
        from serve.jobs import validate  # brings JAX along

        with local.loading(place):
            reports = validate.reports(place.path, data, valid)
        for report in reports.values():
            if report.ok:
                continue
            first, more = report.problems[0], report.counts.total() - 1
            place_of = f"{report.path}:{first.line}" if first.line else report.path
            rest = f" ({more} more: `pellucid finetune check {report.path}` lists them)"
            raise CheckFailed(f"{place_of}: {first.message}{rest if more else ''}")
        return validate.warnings(reports)

    def _kept(self, path: Path) -> str:
        """Uploads a file, so to speak; gives its id."""
        id = new_id("file-")
        with self._jobs.store.receiving(id) as incoming, path.open("rb") as file:
            while data := file.read(2**20):
                incoming.write(data)
            incoming.keep(file_record(id, path.name, incoming.size, "fine-tune"))
        return id

    def jobs(self) -> list[dict]:
        found, _ = self._jobs.store.page("job", newest_first=True)
        for job in found:
            if job["status"] not in UNFINISHED or is_kept(self._jobs):
                continue
            if Process.left_behind(job["id"], self._jobs.folder(job["id"])) is None:
                job["status"] = "stopped"  # nobody works on it; whoever follows it will
        return [shown(job) for job in found]

    def models(self) -> frozenset[str]:
        return frozenset(map(unquote, adapters.names(self._jobs.home)))

    def job(self, id: str) -> dict:
        if (job := self._jobs.get(id)) is None:
            raise NotFound(f"there is no job {id}: `pellucid finetune list` shows those there are")
        return shown(job)

    def cancel(self, id: str) -> dict:
        status = self.job(id)["status"]
        try:
            job = self._jobs.cancel(id)
        except JobIsOver:
            raise Failure(f"{id} is over: it {status}") from None
        # Whoever keeps it stops its process; but that may be one which a killed server left.
        if (left := Process.left_behind(id, self._jobs.folder(id))) is not None:
            left.stop()
        self._jobs.clear(id)
        return shown(job)

    def delete(self, name: str) -> list[str]:
        model, job = name, self._jobs.get(name)
        if job is not None:
            check_is_over(job)
            model = job["name"]
        if deleted := self._jobs.delete_model(model):
            return deleted
        if job is not None:
            raise NotFound(f"there is no model of {name}: it {job['status']}, or was deleted")
        raise NotFound(f"no model {name} was made here: `pellucid finetune list` shows them")

    def without_follow(self, id: str) -> str:
        return (
            f"it learns until it is done; --follow shows how. Ctrl-C stops it ({LATER.format(id)})"
        )

    def leave(self, id: str) -> None:
        console.say(f"\nstopping {id} ...")
        self._keeper.close()
        others = is_kept(self._jobs) or Process.left_behind(id, self._jobs.folder(id)) is not None
        state = "goes on: another process here works on it" if others else "is stopped and saved"
        console.say(f"{id} {state} ({LATER.format(id)})")

    def hint(self, model: str) -> str:
        return f"ask it: pellucid chat -m {model} (any server here offers it, too)"

    def events(self, id: str) -> Iterator[dict]:
        self._keeper.wake()
        after = None
        while True:
            status = self.job(id)["status"]  # before its events: the last ones come before its end
            found, _ = self._jobs.store.page("event", parent=id, after=after)
            yield from found
            after = found[-1]["id"] if found else after
            if status in OVER:
                return
            time.sleep(UNTIL_TOLD)
