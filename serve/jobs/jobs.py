"""The state of fine-tuning jobs, and the operations on them.

The status of a job is validating_files, queued, running, and finally succeeded, failed or
cancelled. The state is in the store (`store.py`), so that any process can read it and it survives a
crash; `runner.py` runs the jobs. Each job also has a folder with its data (a hard link, so that
deleting the uploaded file does not affect the job), the trainer's output, and the trainer's log.
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
# Subfolders of `OUTPUT_FOLDER` that are removed when the job is finished.
_TEMPORARY_OUTPUTS = ("checkpoints", "adapters", "adapter")


class JobFinished(Exception):
    """The job to cancel is already finished."""


class JobStore:
    """Create, read and change the fine-tuning jobs of a data folder.

    Args:
        store: the database.
        home: the data folder.
    """

    def __init__(self, store: Store, home: Path):
        self.store, self.home = store, home

    def folder(self, id: str) -> Path:
        """Return the folder of a job."""
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
        """Create a job, which runs after all jobs that were created earlier.

        Args:
            model: the id of the model to fine-tune.
            model_path: the file or folder of that model.
            training_file: the id of a file in the store.
            validation_file: the id of a file in the store; None for no validation.
            n_epochs: the number of epochs; None for "auto".
            batch_size: the number of examples per training step; None for "auto".
            learning_rate_multiplier: the factor of the learning rate; None for "auto".
            suffix: a part of the new model's name.
            seed: the seed of the training; None for a random one.
            metadata: key-value pairs that the client stores with the job.
            is_validated: whether the files were validated already, so that the job can be queued.
            warnings: the warnings of that validation.
            id_prefix: the prefix of the job's id.

        Returns:
            The job.

        Raises:
            OSError: the training or validation file was deleted, or the disk is full.
        """
        id = new_id(id_prefix)
        folder = self.folder(id)
        folder.mkdir(parents=True, mode=0o700)
        try:
            for file, name in ((training_file, TRAIN_FILE), (validation_file, VALID_FILE)):
                if file is not None:
                    _link_or_copy(self.store.blob_path(file), folder / name)
        except OSError:  # the file was just deleted, or the disk is full
            shutil.rmtree(folder, ignore_errors=True)
            raise
        requested = {
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
            "asked": requested,
            "hyperparameters": requested,  # "auto" is replaced by the value once it is known
            "seed": new_seed() if seed is None else seed,
            "training_file": training_file,
            "validation_file": validation_file,
            "result_file": new_id("file-"),  # exists once the job has succeeded
            "result_files": [],
            "trained_tokens": None,
            "estimated_finish": None,
            "metadata": metadata,
            "steps": None,  # total number of training steps, once it is known
            "step": 0,  # the last step with an event
            "validated": 0,  # the last step with a validation event
            "published": 0,  # the last step with a checkpoint event
            "died": 0,  # how many times in a row a signal has ended the process ...
            "died_at": -1,  # ... at this training step
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
        """Return a job; None if it does not exist."""
        return self.store.get("job", id)

    def unfinished(self) -> list[Job]:
        """Return the unfinished jobs, oldest first."""
        return self.store.page("job", predicate=lambda job: job["status"] in UNFINISHED)[0]

    def set_status(
        self, id: str, status: str, *messages: str, level: str = "info", **fields: Any
    ) -> bool:
        """Set the status of an unfinished job, and add events.

        Args:
            id: the id of the job.
            status: the new status.
            messages: the messages of the events.
            level: the level of the events.
            fields: further fields of the job to set.

        Returns:
            Whether the job was unfinished.
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
        """Set an unfinished job to "queued" after the validation of its files."""
        with self.store.transaction():
            if self.set_status(id, "queued"):
                self._add_validation_events(id, warnings)

    def _add_validation_events(self, id: str, warnings: Iterable[str]) -> None:
        for warning in warnings:
            self.add_event(id, warning, level="warn")
        self.add_event(id, VALIDATED_MESSAGE)

    def cancel(self, id: str) -> Job:
        """Cancel an unfinished job and return it; its process stops within a second.

        Raises:
            KeyError: the job does not exist.
            JobFinished: the job is finished.
        """
        with self.store.transaction():
            if (job := self.get(id)) is None:
                raise KeyError(id)
            if not self.set_status(id, "cancelled", "The job was cancelled"):
                raise JobFinished(id)
        if job["status"] in PENDING:  # else the runner cleans up after the process has ended
            self.clean_up(id)
        return {**job, **(self.get(id) or {})}

    def fail(self, id: str, code: str, message: str, param: str | None = None) -> None:
        """Set the status of an unfinished job to "failed", with an error in OpenAI's format."""
        error = {"code": code, "message": message, "param": param}
        self.set_status(id, "failed", message, level="error", error=error)
        self.clean_up(id)

    def delete_model(self, id: str) -> list[str]:
        """Delete a fine-tuned model with its checkpoints, or one checkpoint.

        Returns:
            The deleted ids; empty if the model does not exist.
        """
        ids = adapters.ids_with_checkpoints(self.home, id)
        for adapter_id in ids:
            adapters.delete(self.home, adapter_id)
        key = "fine_tuned_model_checkpoint"
        model_name = id.partition(adapters.CHECKPOINT_INFIX)[0]
        with self.store.transaction():
            for job in self.store.page("job", predicate=lambda job: job["name"] == model_name)[0]:
                for checkpoint in self.store.page("checkpoint", parent=job["id"])[0]:
                    if checkpoint[key] in ids:
                        self.store.remove("checkpoint", checkpoint["id"])
        return ids

    def add_event(
        self, id: str, message: str, *, level: str = "info", data: dict[str, Any] | None = None
    ) -> None:
        """Add an event to a job.

        Args:
            id: the id of the job.
            message: the text of the event.
            level: "info", "warn" or "error".
            data: the metrics of the event, if it reports any.
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
        """Remove the files that a job needs only until it is finished; keep metrics and log."""
        folder = self.folder(id)
        for name in (TRAIN_FILE, VALID_FILE):
            (folder / name).unlink(missing_ok=True)
        for name in _TEMPORARY_OUTPUTS:
            shutil.rmtree(folder / OUTPUT_FOLDER / name, ignore_errors=True)

    def is_cleaned_up(self, id: str) -> bool:
        """Whether the files that `clean_up` removes are gone."""
        folder = self.folder(id)
        outputs = (folder / OUTPUT_FOLDER / name for name in _TEMPORARY_OUTPUTS)
        return not any(
            os.path.lexists(path) for path in (folder / TRAIN_FILE, folder / VALID_FILE, *outputs)
        )


def to_api(job: Job) -> dict[str, Any]:
    """Return a job in the format of OpenAI's API."""
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
    """Check that a job is finished, so that its model can be deleted.

    Raises:
        Failure: the job is unfinished.
    """
    if job["status"] not in FINISHED:
        raise Failure(
            f"the job {job['id']} is not finished: cancel it with "
            f"`pellucid finetune cancel {job['id']}`"
        )


def check_name(model: str) -> None:
    """Check that the name of a fine-tuned model of `model` fits the file system.

    Raises:
        ValueError: the name would be too long.
    """
    if not adapters.is_valid_id(_name(model, None)):
        raise ValueError(
            f"Invalid 'model': the name of a fine-tuned model of '{model[:80]}' would be too long "
            "for the file system. Serve the model under a shorter id."
        )


def check_suffix(model: str, suffix: str) -> None:
    """Check that a suffix can be part of the name of a fine-tuned model of `model`.

    Raises:
        ValueError: it has invalid characters, or the name would be too long.
    """
    if len(suffix) > 64 or not _SUFFIX.fullmatch(suffix):
        raise ValueError(
            f"Invalid 'suffix': '{suffix[:80]}' cannot be part of a model's name. Use at most 64 "
            "letters, digits, '.', '_' and '-', with a letter or digit at both ends."
        )
    if not adapters.is_valid_id(_name(model, suffix)):
        raise ValueError(
            f"Invalid 'suffix': with '{suffix}' the new model's name would be too long for the "
            "file system, where each '.' takes three characters. Use a shorter suffix."
        )


def _name(model: str, suffix: str | None) -> str:
    """Return a new name for a fine-tuned model of `model`."""
    return f"ft:{model}:pellucid:{suffix or ''}:{new_id('', 8)}"


def new_seed() -> int:
    """Return a random seed of 31 bits."""
    return int.from_bytes(os.urandom(4), "big") >> 1


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # the file system has no hard links
        shutil.copyfile(source, target)
