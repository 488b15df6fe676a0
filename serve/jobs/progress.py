"""How far a trainer is: what it wrote, as events, checkpoints, models and a file of results.

The trainer writes a line a step, and an adapter after each epoch. What is done here is written down
before it is told, under names that were chosen before: doing it again does nothing.
"""

import csv
import io
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from serve.jobs.jobs import OUTPUT_FOLDER, Job, JobStore
from serve.jobs.process import JobProcess
from serve.jobs.store import file_record, new_id
from serve.models import adapters

MAX_CHECKPOINTS = 3  # checkpoints of a job that are served


class TrainingRun:
    """A job that is trained: its process, and how much of what it wrote has been told.

    Args:
        jobs: where it is told.
        job: its id.
        process: ours, or one that an earlier server left.
    """

    def __init__(self, jobs: JobStore, job: str, process: JobProcess):
        self._jobs, self.job_id, self.process = jobs, job, process
        self._output_folder = jobs.folder(job) / OUTPUT_FOLDER
        self._lines = JsonlTail(self._output_folder / "metrics.jsonl")

    def update(self, is_over: bool) -> None:
        """Tells what is new.

        Args:
            is_over: whether nothing will be written any more.
        """
        self._record_hyperparameters()
        if is_over:  # should a line have been missed in a file that was written anew, it is not now
            self._lines = JsonlTail(self._lines.path)
        self._add_metric_events(self._lines.read_new())
        self._publish_checkpoints()

    def _record_hyperparameters(self) -> None:
        """Notes what "auto" became, once it is known."""
        job = self._get()
        path = self._output_folder / "job.json"
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
        with self._jobs.store.transaction():
            self._jobs.store.update(
                "job",
                self.job_id,
                hyperparameters=numbers,
                steps=found["steps"],
                tokens=found["trained_tokens"],
            )
            if job["status"] == "running":
                self._jobs.add_event(
                    self.job_id, f"Compiling the training step; then {found['steps']} of them"
                )

    def _add_metric_events(self, lines: list[dict[str, Any]]) -> None:
        if not lines:
            return
        with self._jobs.store.transaction():
            job = self._get()
            if job["status"] != "running":  # cancelled a moment ago: that was the last word
                return
            step, validated, seconds = job["step"], job["validated"], 0.0
            for line in lines:
                number = line["step"]
                if "valid_loss" in line and number > validated:
                    validated = number
                    self._add_metric_event(job, number, "validation", line["valid_loss"], line)
                elif "loss" in line and number > step:
                    step, seconds = number, line.get("seconds", 0.0)
                    self._add_metric_event(job, number, "training", line["loss"], line)
            finish = job["estimated_finish"]
            if job["steps"] and seconds:
                finish = int(time.time() + (job["steps"] - step) * seconds)
            self._jobs.store.update(
                "job", self.job_id, step=step, validated=validated, estimated_finish=finish
            )

    def _add_metric_event(
        self, job: Job, step: int, what: str, loss: float, line: dict[str, Any]
    ) -> None:
        self._jobs.add_event(
            self.job_id,
            f"Step {step}/{job['steps'] or '?'}: {what} loss={loss:.4f}",
            data=openai_metrics([line]) | ({"total_steps": job["steps"]} if job["steps"] else {}),
        )

    def _publish_checkpoints(self) -> None:
        """Makes models of the adapters that are there after each epoch."""
        told, _ = self._jobs.store.page("checkpoint", parent=self.job_id)
        for step in sorted(_steps(self._output_folder / "adapters")):
            job = self._get()
            if step <= job["published"] or job["status"] != "running":
                continue
            name = f"{job['name']}{adapters.CHECKPOINT_INFIX}{step}"
            try:
                self._save_adapter(
                    job, name, step, self._output_folder / "adapters" / f"step-{step}"
                )
            except FileNotFoundError:  # the trainer keeps the last few, and was faster
                continue
            lines = JsonlTail(self._lines.path).read_new()
            checkpoint = {
                "id": new_id("ftckpt_"),
                "created_at": int(time.time()),
                "fine_tuned_model_checkpoint": name,
                "step_number": step,
                "metrics": openai_metrics(line for line in lines if line["step"] == step),
                "fine_tuning_job_id": self.job_id,
            }
            with self._jobs.store.transaction():
                self._jobs.store.add("checkpoint", checkpoint["id"], checkpoint, parent=self.job_id)
                self._jobs.store.update("job", self.job_id, published=step)
                self._jobs.add_event(self.job_id, f"Checkpoint created at step {step}")
            told.append(checkpoint)
        for checkpoint in told[:-MAX_CHECKPOINTS]:
            adapters.delete(self._jobs.home, checkpoint["fine_tuned_model_checkpoint"])
            self._jobs.store.remove("checkpoint", checkpoint["id"])

    def publish(self) -> None:
        """Makes the model, writes the results, and ends the job."""
        job = self._get()
        name, file = job["name"], job["result_file"]
        self._save_adapter(job, name, job["steps"], self._output_folder / "adapter")
        if self._jobs.store.get("file", file) is None:
            data = results_csv(JsonlTail(self._lines.path).read_new()).encode()
            with self._jobs.store.open_blob(file) as incoming:
                incoming.write(data)
                record = file_record(file, "step_metrics.csv", len(data), "fine-tune-results")
                incoming.commit(record)
        succeeded = self._jobs.set_status(
            self.job_id,
            "succeeded",
            f"New fine-tuned model created: {name}",
            "The job has successfully completed",
            fine_tuned_model=name,
            result_files=[file],
            trained_tokens=job["tokens"],
        )
        if not succeeded:  # it was cancelled a moment ago
            adapters.delete(self._jobs.home, name)
            self._jobs.store.delete_file(file)

    def _save_adapter(self, job: Job, name: str, step: int, adapter: Path) -> None:
        card = adapters.AdapterMetadata(
            id=name,
            base=job["model"],
            path=job["path"],
            weights=job["weights"],
            created=int(time.time()),
            job=self.job_id,
            step=step,
        )
        adapters.save(self._jobs.home, card, adapter)

    def _get(self) -> Job:
        job = self._jobs.get(self.job_id)
        assert job is not None, "jobs are not deleted"
        return job


class JsonlTail:
    """The lines of a file that grows, or is written anew, as JSON: those not given before."""

    def __init__(self, path: Path):
        self.path, self._offset, self._inode = path, 0, 0

    def read_new(self) -> list[dict[str, Any]]:
        """What was added; all of it, if the file is another one now."""
        try:
            with self.path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._offset, self._inode = 0, inode
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._offset += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]


def openai_metrics(lines: Iterable[dict[str, Any]]) -> dict[str, float]:
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


def results_csv(lines: Iterable[dict[str, Any]]) -> str:
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
        found = openai_metrics(own)
        writer.writerow([_rounded(found.get(name, "")) for name in columns.values()])
    return text.getvalue()


def _rounded(value: float | str) -> float | str:
    return round(value, 5) if isinstance(value, float) else value


def _steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdecimal()]
