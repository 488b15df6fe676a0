"""Fine-tuning jobs: what is kept of them, and what can be asked for.

A job is validating_files, queued, running, and then succeeded, failed or cancelled. All of that is
in the store (`store.py`), so that any process can look at it and a crash forgets nothing; who does
the work is `runner.py`. Beside it each job has a folder: its data (a second name of the
uploaded file, which may be deleted), what the trainer writes, and what it had to say.
"""

import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from serve.exceptions import Failure
from serve.jobs.store import Store, new_id
from serve.models import adapters

Job = dict[str, Any]

PENDING = ("validating_files", "queued")
UNFINISHED = (*PENDING, "running")
FINISHED = ("succeeded", "failed", "cancelled")
_SUFFIX = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
VALIDATED_MESSAGE = "Files validated, moving job to queued state"
TRAIN_FILE, VALID_FILE, OUTPUT_FOLDER = "data.jsonl", "valid.jsonl", "out"  # in a job's folder
_TEMPORARY_OUTPUTS = (
    "checkpoints",
    "adapters",
    "adapter",
)  # in `OUT`, for as long as the job is not over


class JobFinished(Exception):
    """A job that is over cannot be cancelled."""


class JobStore:
    """The jobs of a data folder.

    Args:
        store: holds them.
        home: the data folder.
    """

    def __init__(self, store: Store, home: Path):
        self.store, self.home = store, home

    def folder(self, id: str) -> Path:
        """Where a job's files are."""
        return self.home / "jobs" / id

    def create(
        self,
        *,
        model: str,
        model_path: Path,
        training_file: str,
        validation_file: str | None = None,
        n_epochs: int | None = None,
        batch_size: int | None = None,
        learning_rate_multiplier: float | None = None,
        suffix: str | None = None,
        seed: int | None = None,
        metadata: dict[str, str] | None = None,
        is_validated: bool = False,
        warnings: Iterable[str] = (),
        id_prefix: str = "ftjob-",
    ) -> Job:
        """Makes a job, to be done when its turn comes.

        Args:
            model: the id of the model to begin with; `path` are its files.
            training_file, validation_file: ids of files in the store.
            n_epochs, batch_size, learning_rate_multiplier: None for "auto".
            suffix: becomes part of the new model's name.
            seed: None for any.
            is_checked: whether the files are known to be such as can be learned from.
            warnings: of files that were checked.
            prefix: of its id.
        """
        id = new_id(id_prefix)
        folder = self.folder(id)
        folder.mkdir(parents=True, mode=0o700)
        try:
            for file, name in ((training_file, TRAIN_FILE), (validation_file, VALID_FILE)):
                if file is not None:
                    _link_or_copy(self.store.blob_path(file), folder / name)
        except OSError:  # it was deleted this moment, or the disk is full
            shutil.rmtree(folder, ignore_errors=True)
            raise
        asked = {
            "n_epochs": n_epochs or "auto",
            "batch_size": batch_size or "auto",
            "learning_rate_multiplier": learning_rate_multiplier or "auto",
        }
        job: Job = {
            "id": id,
            "created_at": int(time.time()),
            "finished_at": None,
            "status": "queued" if is_validated else "validating_files",
            "error": None,
            "model": model,
            "path": str(model_path),
            "name": _name(model, suffix),
            "fine_tuned_model": None,
            "asked": asked,
            "hyperparameters": asked,  # what "auto" became, once it is known
            "seed": new_seed() if seed is None else seed,
            "training_file": training_file,
            "validation_file": validation_file,
            "result_file": new_id("file-"),  # once it is there
            "result_files": [],
            "trained_tokens": None,
            "estimated_finish": None,
            "metadata": metadata,
            "steps": None,  # in all
            "step": 0,  # the last one told of
            "validated": 0,  # the last step whose validation was told of
            "published": 0,  # the last step whose checkpoint was
            "died": 0,  # processes ended by a signal, one after the other ...
            "died_at": -1,  # ... with this step reached
        }
        with self.store.transaction():
            self.store.add("job", id, job)
            self.add_event(id, f"Created fine-tuning job: {id}")
            self.add_event(id, f"Validating training file: {training_file}")
            if validation_file is not None:
                self.add_event(id, f"Validating validation file: {validation_file}")
            if is_validated:
                self._add_validation_events(id, warnings)
        return job

    def get(self, id: str) -> Job | None:
        """A job; None if there is none."""
        return self.store.get("job", id)

    def unfinished(self) -> list[Job]:
        """Jobs that are not over, oldest first."""
        return self.store.page("job", predicate=lambda job: job["status"] in UNFINISHED)[0]

    def set_status(
        self, id: str, status: str, *messages: str, level: str = "info", **fields: Any
    ) -> bool:
        """Gives a job another status, and says so; unless it is over.

        Returns:
            Whether it was not over.
        """
        with self.store.transaction():
            job = self.store.get("job", id)
            if job is None or job["status"] not in UNFINISHED:
                return False
            if status not in UNFINISHED:
                fields |= {"finished_at": int(time.time()), "estimated_finish": None}
            self.store.update("job", id, status=status, **fields)
            for message in messages:
                self.add_event(id, message, level=level)
        return True

    def queue(self, id: str, warnings: Iterable[str]) -> None:
        """Queue a job whose files were checked; unless it is over."""
        with self.store.transaction():
            if self.set_status(id, "queued"):
                self._add_validation_events(id, warnings)

    def _add_validation_events(self, id: str, warnings: Iterable[str]) -> None:
        for warning in warnings:
            self.add_event(id, warning, level="warn")
        self.add_event(id, VALIDATED_MESSAGE)

    def cancel(self, id: str) -> Job:
        """Ends a job that is not over; its process is stopped within a second.

        Raises:
            KeyError: there is none.
            JobIsOver: it is over.
        """
        with self.store.transaction():
            if (job := self.get(id)) is None:
                raise KeyError(id)
            if not self.set_status(id, "cancelled", "The job was cancelled"):
                raise JobFinished(id)
        if job["status"] in PENDING:  # else who trains it clears up when its process has ended
            self.clean_up(id)
        return {**job, **(self.get(id) or {})}

    def fail(self, id: str, code: str, message: str, param: str | None = None) -> None:
        """Ends a job with an error."""
        error = {"code": code, "message": message, "param": param}
        self.set_status(id, "failed", message, level="error", error=error)
        self.clean_up(id)

    def delete_model(self, id: str) -> list[str]:
        """Deletes a model that a job made, with its checkpoints; or one of the checkpoints.

        Returns:
            The ids of what is gone: empty if there was no such model.
        """
        ids = adapters.ids_with_checkpoints(self.home, id)
        for one in ids:
            adapters.delete(self.home, one)
        key = "fine_tuned_model_checkpoint"
        whose = id.partition(adapters.CHECKPOINT_INFIX)[0]
        with self.store.transaction():
            for job in self.store.page("job", predicate=lambda job: job["name"] == whose)[0]:
                for checkpoint in self.store.page("checkpoint", parent=job["id"])[0]:
                    if checkpoint[key] in ids:
                        self.store.remove("checkpoint", checkpoint["id"])
        return ids

    def add_event(
        self, id: str, message: str, *, level: str = "info", data: dict[str, Any] | None = None
    ) -> None:
        """Adds an event to a job.

        Args:
            level: "info", "warn" or "error".
            data: the numbers that it is about.
        """
        event = {
            "id": new_id("ftevent-"),
            "created_at": int(time.time()),
            "level": level,
            "message": message,
            "type": "message" if data is None else "metrics",
            "data": data or {},
        }
        self.store.add("event", event["id"], event, parent=id)

    def clean_up(self, id: str) -> None:
        """Removes what only a job that is not over needs; its numbers and its log stay."""
        folder = self.folder(id)
        for name in (TRAIN_FILE, VALID_FILE):
            (folder / name).unlink(missing_ok=True)
        for name in _TEMPORARY_OUTPUTS:
            shutil.rmtree(folder / OUTPUT_FOLDER / name, ignore_errors=True)

    def is_cleaned_up(self, id: str) -> bool:
        """Whether nothing is left of what `clear` removes."""
        folder = self.folder(id)
        parts = (folder / OUTPUT_FOLDER / name for name in _TEMPORARY_OUTPUTS)
        return not any(
            os.path.lexists(path) for path in (folder / TRAIN_FILE, folder / VALID_FILE, *parts)
        )


def to_api(job: Job) -> dict[str, Any]:
    """A job in OpenAI's shape."""
    names = (
        *("id", "created_at", "finished_at", "status", "error", "model", "fine_tuned_model"),
        *("hyperparameters", "seed", "training_file", "validation_file", "result_files"),
        *("trained_tokens", "estimated_finish", "metadata"),
    )
    method = {"type": "supervised", "supervised": {"hyperparameters": job["hyperparameters"]}}
    return {
        "object": "fine_tuning.job",
        **{name: job[name] for name in names},
        "organization_id": "pellucid",
        "integrations": [],
        "method": method,
    }


def check_finished(job: Job) -> None:
    """Whether what a job made can be deleted.

    Raises:
        Failure: it works on it.
    """
    if job["status"] not in FINISHED:
        raise Failure(f"{job['id']} is not over: `pellucid finetune cancel {job['id']}` ends it")


def check_name(model: str) -> None:
    """Whether what is made of a model can have a name.

    Raises:
        ValueError: it cannot.
    """
    if not adapters.is_valid_id(_name(model, None)):
        raise ValueError(
            f"Invalid 'model': what is made of '{model[:80]}' would have too long a name for the "
            "file system. ModelSpec it under a shorter name."
        )


def check_suffix(model: str, suffix: str) -> None:
    """Whether a suffix can be part of the name of what is made of a model.

    Raises:
        ValueError: it cannot.
    """
    if len(suffix) > 64 or not _SUFFIX.fullmatch(suffix):
        raise ValueError(
            f"Invalid 'suffix': '{suffix[:80]}' cannot be part of a model's name. Use at most 64 "
            "letters, digits, '.', '_' and '-', with a letter or digit at both ends."
        )
    if not adapters.is_valid_id(_name(model, suffix)):
        raise ValueError(
            f"Invalid 'suffix': with '{suffix}' the new model's name would be too long for the "
            "file system, where '.' counts three times. Use a shorter one."
        )


def _name(model: str, suffix: str | None) -> str:
    """A new name for what is made of a model."""
    return f"ft:{model}:pellucid:{suffix or ''}:{new_id('', 8)}"


def new_seed() -> int:
    """A seed that nobody chose."""
    return int.from_bytes(os.urandom(4), "big") >> 1


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system that has no such thing
        shutil.copyfile(source, target)
