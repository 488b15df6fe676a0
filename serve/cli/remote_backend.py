"""The job backend of a server: its fine-tuning API through the official client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlsplit

import openai

from serve.cli import console
from serve.exceptions import Failure, NotFound, Unreachable, WrongUsage
from serve.jobs.jobs import FINISHED, check_finished
from serve.models.adapters import CHECKPOINT_INFIX

TIMEOUT = 600  # seconds without any byte from the server


@contextlib.contextmanager
def open_remote_backend(host: str, key: str) -> Iterator[RemoteBackend]:
    """Open the backend of a server, and convert client errors that the `with` block raises.

    Args:
        host: the address of the server, as "http://127.0.0.1:8000" or "127.0.0.1:8000".
        key: an API key of the server; empty for none.

    Raises:
        WrongUsage: `host` is not an address.
        NotFound: the server answered with status 404.
        Failure: the server answered with another error.
        Unreachable: the server did not answer.
    """
    base = _base_url(host)
    try:
        with openai.OpenAI(
            base_url=base,
            api_key=key or "none",
            default_headers=None if key else {"Authorization": ""},
            timeout=TIMEOUT,
            max_retries=0,  # a retry could create a second job
        ) as client:
            yield RemoteBackend(client, f"at {base.removesuffix('/v1/')}")
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        message = body.get("message", f"the server answered with status {error.status_code}")
        raise (NotFound if error.status_code == 404 else Failure)(message) from None
    except openai.APIConnectionError as error:
        raise Unreachable(
            f"no server answers at {base} ({error.__cause__ or error}); check --host, or start one "
            "with `pellucid serve`"
        ) from None
    except openai.APIError as error:
        raise Unreachable(error.message) from None
    except ValueError as error:  # an id that is not valid in a URL, or a response without JSON
        raise Failure(f"{base}: {error}") from None


class RemoteBackend:
    """A `JobBackend` for the jobs of a server.

    Args:
        client: a client of the server.
        location: the server, as a phrase: "at http://127.0.0.1:8000".
    """

    def __init__(self, client: openai.OpenAI, location: str):
        self.client, self.location = client, location

    def create(self, model: str | None, data: Path, valid: Path | None, **fields: Any) -> dict:
        """Upload the files and create a job; see `JobBackend`."""
        names = ("n_epochs", "batch_size", "learning_rate_multiplier")
        if model is None:
            if (first := next(iter(self.client.models.list()), None)) is None:
                raise NotFound(f"the server {self.location} has no model; give one with --model")
            model = first.id
        hyperparameters: Any = {name: fields[name] or "auto" for name in names}
        job = self.client.fine_tuning.jobs.create(
            model=model,
            training_file=self.upload(data, "fine-tune"),
            validation_file=None if valid is None else self.upload(valid, "fine-tune"),
            suffix=fields["suffix"],
            seed=fields["seed"],
            hyperparameters=hyperparameters,
        )
        return job.to_dict()

    def jobs(self) -> list[dict]:
        """Return all jobs, newest first."""
        return [job.to_dict() for job in self.client.fine_tuning.jobs.list(limit=100)]

    def models(self) -> frozenset[str]:
        """Return the ids of the models that the server serves."""
        return frozenset(model.id for model in self.client.models.list())

    def model_states(self) -> list[dict]:
        """Return the models of the server with their state."""
        address = f"{str(self.client.base_url).removesuffix('v1/')}pellucid/v1/models"
        return cast(dict, self.client.get(address, cast_to=object))["data"]

    def job(self, id: str) -> dict:
        """Return a job."""
        return self.client.fine_tuning.jobs.retrieve(id).to_dict()

    def cancel(self, id: str) -> dict:
        """Cancel a job and return it."""
        return self.client.fine_tuning.jobs.cancel(id).to_dict()

    def delete(self, name: str) -> list[str]:
        """Delete a model and its checkpoints, given by its id or its job; return the deleted ids.

        Raises:
            NotFound: the job has no model.
        """
        available = self.models()
        if name.startswith(("ftjob-", "ft-")):
            job = self.job(name)
            check_finished(job)
            checkpoints = self.client.fine_tuning.jobs.checkpoints.list(name, limit=100)
            ids = [
                job["fine_tuned_model"],
                *(checkpoint.fine_tuned_model_checkpoint for checkpoint in checkpoints),
            ]
            deleted = [id for id in ids if id in available]
            if not deleted:
                raise NotFound(
                    f"the job {name} has no model: its status is {job['status']}, or the model was "
                    "deleted"
                )
        else:
            deleted = [name, *(id for id in available if id.startswith(name + CHECKPOINT_INFIX))]
        deleted.sort(reverse=True)  # the model last: deleting it deletes its checkpoints
        for id in deleted:
            self.client.models.delete(id)
        return deleted

    def detached_hint(self, id: str) -> str:
        """Return the message for a job that was created without `--follow`."""
        return f"`pellucid finetune follow {id}` shows its progress"

    def detach(self, id: str) -> None:
        """Print that the job continues on the server, and how to follow or cancel it."""
        console.info(
            f"\n{id} continues on {self.location}: `pellucid finetune follow {id}` shows it again, "
            f"`pellucid finetune cancel {id}` cancels it (both with the same --host)"
        )

    def usage_hint(self, model: str) -> str:
        """Return the message on how to use a fine-tuned model."""
        return f"use it {self.location}: model={model!r}"

    def events(self, id: str) -> Iterator[dict]:
        """Yield the past and the new events of a job until it is finished.

        Raises:
            Unreachable: the connection broke before the job was finished.
        """
        with self.client.get(
            f"/fine_tuning/jobs/{quote(id, safe='')}/events",
            cast_to=object,
            options={"params": {"stream": True}},
            stream=True,
            stream_cls=openai.Stream[Any],
        ) as events:
            try:
                yield from events
            except openai.APIConnectionError as error:
                reason = error.__cause__ or error
                raise Unreachable(
                    f"the connection broke ({reason}); the job may still be running: follow it "
                    f"with `pellucid finetune follow {id}` and the same --host"
                ) from None
        if self.job(id)["status"] not in FINISHED:
            raise Unreachable(
                "the server closed the connection; the job may still be running: follow it with "
                f"`pellucid finetune follow {id}` and the same --host"
            )

    def upload(self, path: Path, purpose: openai.types.FilePurpose) -> str:
        """Upload a file in chunks and return its id."""
        with path.open("rb") as file:
            return self.client.files.create(file=file, purpose=purpose).id


def _base_url(host: str) -> str:
    host = host if "://" in host else f"http://{host}"
    with contextlib.suppress(ValueError):
        parts = urlsplit(host)
        # Reading `port` raises ValueError if it is not a number.
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != -1:
            return host.rstrip("/").removesuffix("/v1") + "/v1/"
    raise WrongUsage(f"{host} is not the address of a server; use http://HOST:PORT")
