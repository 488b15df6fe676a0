"""The progress of a training run: events, checkpoints, the model and the results file.

The trainer writes a JSON line per training step, and an adapter after each epoch. This module turns
them into objects of the store. Each action is idempotent: names are chosen in advance, and files
are written before the store refers to them, so that an action can be repeated after a crash.
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

MAX_CHECKPOINTS = 3  # number of checkpoints to keep per job; older ones are deleted


class TrainingRun:
    """The training process of a job, and the part of its output that was read.

    Args:
        jobs: the jobs of the data folder.
        job_id: the id of the job.
        process: the training process, started by this server or by an earlier one.
    """

    def __init__(self, jobs: JobStore, job_id: str, process: JobProcess):
        self._jobs, self.job_id, self.process = jobs, job_id, process
        self._output_folder = jobs.folder(job_id) / OUTPUT_FOLDER
        self._lines = JsonlTail(self._output_folder / "metrics.jsonl")

    def update(self, is_over: bool) -> None:
        """Add events and checkpoints for new output of the trainer.

        Args:
            is_over: whether the process has ended, so that the output is complete.
        """
        self._record_hyperparameters()
        if is_over:  # read all lines again, in case some were missed when the file was rewritten
            self._lines = JsonlTail(self._lines.path)
        self._add_metric_events(self._lines.read_new())
        self._publish_checkpoints()

    def _record_hyperparameters(self) -> None:
        """Store the hyperparameters that the trainer chose for "auto"."""
        job = self._get()
        path = self._output_folder / "job.json"
        if job["steps"] is not None or not path.exists():
            return
        plan = json.loads(path.read_text("utf-8"))
        if "steps" not in plan:
            return
        hyperparameters = {
            "n_epochs": plan["epochs"],
            "batch_size": plan["batch_size"],
            "learning_rate_multiplier": plan["learning_rate_multiplier"],
        }
        with self._jobs.store.transaction():
            self._jobs.store.update(
                "job",
                self.job_id,
                hyperparameters=hyperparameters,
                steps=plan["steps"],
                tokens=plan["trained_tokens"],
            )
            if job["status"] == "running":
                self._jobs.add_event(
                    self.job_id, f"Compiling the training step, then training {plan['steps']} steps"
                )

    def _add_metric_events(self, lines: list[dict[str, Any]]) -> None:
        if not lines:
            return
        with self._jobs.store.transaction():
            job = self._get()
            if job["status"] != "running":  # just cancelled: no event follows
                return
            step, validated, seconds = job["step"], job["validated"], 0.0
            for line in lines:
                line_step = line["step"]
                if "valid_loss" in line and line_step > validated:
                    validated = line_step
                    self._add_metric_event(job, line_step, "validation", line["valid_loss"], line)
                elif "loss" in line and line_step > step:
                    step, seconds = line_step, line.get("seconds", 0.0)
                    self._add_metric_event(job, line_step, "training", line["loss"], line)
            finish = job["estimated_finish"]
            if job["steps"] and seconds:
                finish = int(time.time() + (job["steps"] - step) * seconds)
            self._jobs.store.update(
                "job", self.job_id, step=step, validated=validated, estimated_finish=finish
            )

    def _add_metric_event(
        self, job: Job, step: int, split: str, loss: float, line: dict[str, Any]
    ) -> None:
        self._jobs.add_event(
            self.job_id,
            f"Step {step}/{job['steps'] or '?'}: {split} loss={loss:.4f}",
            data=openai_metrics([line]) | ({"total_steps": job["steps"]} if job["steps"] else {}),
        )

    def _publish_checkpoints(self) -> None:
        """Save the adapter of each epoch as a model, and delete the oldest checkpoints."""
        checkpoints, _ = self._jobs.store.page("checkpoint", parent=self.job_id)
        for step in sorted(_steps(self._output_folder / "adapters")):
            job = self._get()
            if step <= job["published"] or job["status"] != "running":
                continue
            name = f"{job['name']}{adapters.CHECKPOINT_INFIX}{step}"
            try:
                self._save_adapter(
                    job, name, step, self._output_folder / "adapters" / f"step-{step}"
                )
            except FileNotFoundError:  # the trainer, which keeps the last adapters, has deleted it
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
            checkpoints.append(checkpoint)
        for checkpoint in checkpoints[:-MAX_CHECKPOINTS]:
            adapters.delete(self._jobs.home, checkpoint["fine_tuned_model_checkpoint"])
            self._jobs.store.remove("checkpoint", checkpoint["id"])

    def publish(self) -> None:
        """Save the model, write the results file, and set the job's status to "succeeded"."""
        job = self._get()
        name, file_id = job["name"], job["result_file"]
        self._save_adapter(job, name, job["steps"], self._output_folder / "adapter")
        if self._jobs.store.get("file", file_id) is None:
            data = results_csv(JsonlTail(self._lines.path).read_new()).encode()
            with self._jobs.store.open_blob(file_id) as blob:
                blob.write(data)
                record = file_record(file_id, "step_metrics.csv", len(data), "fine-tune-results")
                blob.commit(record)
        succeeded = self._jobs.set_status(
            self.job_id,
            "succeeded",
            f"New fine-tuned model created: {name}",
            "The job has successfully completed",
            fine_tuned_model=name,
            result_files=[file_id],
            trained_tokens=job["tokens"],
        )
        if not succeeded:  # just cancelled
            adapters.delete(self._jobs.home, name)
            self._jobs.store.delete_file(file_id)

    def _save_adapter(self, job: Job, name: str, step: int, adapter: Path) -> None:
        metadata = adapters.AdapterMetadata(
            id=name,
            base=job["model"],
            path=job["path"],
            weights=job["weights"],
            created=int(time.time()),
            job=self.job_id,
            step=step,
        )
        adapters.save(self._jobs.home, metadata, adapter)

    def _get(self) -> Job:
        job = self._jobs.get(self.job_id)
        assert job is not None, "jobs are not deleted"
        return job


class JsonlTail:
    """Reads the new lines of a JSONL file that grows or is replaced.

    Args:
        path: the file, which may not exist yet.
    """

    def __init__(self, path: Path):
        self.path, self._offset, self._inode = path, 0, 0

    def read_new(self) -> list[dict[str, Any]]:
        """Return the lines added since the last call; all lines if the file was replaced."""
        try:
            with self.path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._offset, self._inode = 0, inode
                file.seek(self._offset)
                complete, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._offset += len(complete) + len(newline)
        return [json.loads(line) for line in complete.splitlines()]


def openai_metrics(lines: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics in the trainer's lines for one training step, with OpenAI's names."""
    names = {
        "step": ("step",),
        "loss": ("train_loss",),
        "accuracy": ("train_mean_token_accuracy",),
        "valid_loss": ("valid_loss", "full_valid_loss"),  # always over the whole validation file
        "valid_accuracy": ("valid_mean_token_accuracy", "full_valid_mean_token_accuracy"),
    }
    return {
        name: line[key]
        for line in lines
        for key, openai_names in names.items()
        if key in line
        for name in openai_names
    }


def results_csv(lines: Iterable[dict[str, Any]]) -> str:
    """Return the results file of a job, as in OpenAI's API: CSV with one row per training step."""
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
    for step_lines in steps.values():
        metrics = openai_metrics(step_lines)
        writer.writerow([_rounded(metrics.get(name, "")) for name in columns.values()])
    return text.getvalue()


def _rounded(value: float | str) -> float | str:
    return round(value, 5) if isinstance(value, float) else value


def _steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdecimal()]
