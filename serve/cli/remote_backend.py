"""A server's fine-tuning API, as the command line asks it: through the official client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import openai

from serve.cli import console
from serve.exceptions import Failure, NotFound, Unreachable, WrongUsage
from serve.jobs.jobs import FINISHED, check_finished
from serve.models.adapters import CHECKPOINT_INFIX

TIMEOUT = 600  # seconds until a server has answered, or sent a sign of life


@contextlib.contextmanager
def open_remote_backend(host: str, key: str) -> Iterator[RemoteBackend]:
    """The jobs of a server.

    Args:
        host: its address, as "http://127.0.0.1:8000" or "127.0.0.1:8000".
        key: what it asks for; empty for none.

    Raises:
        WrongUsage: this is no address.
        NotFound, Failure: the server said so.
        Unreachable: it did not answer.
    """
    base = _base_url(host)
    try:
        with openai.OpenAI(
            base_url=base,
            api_key=key or "none",
            default_headers=None if key else {"Authorization": ""},
            timeout=TIMEOUT,
            max_retries=0,  # a job must not be made twice
        ) as client:
            yield RemoteBackend(client, f"at {base.removesuffix('/v1/')}")
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        message = body.get("message", f"the server answered with status {error.status_code}")
        raise (NotFound if error.status_code == 404 else Failure)(message) from None
    except openai.APIConnectionError as error:
        raise Unreachable(f"no server answers at {base}: {error.__cause__ or error}") from None
    except openai.APIError as error:
        raise Unreachable(error.message) from None
    except ValueError as error:  # an id that cannot stand in a path, an answer that is no JSON
        raise Failure(f"{base}: {error}") from None


class RemoteBackend:
    """The jobs of a server, through a client."""

    def __init__(self, client: openai.OpenAI, where: str):
        self._client, self.location = client, where

    def create(self, model: str | None, data: Path, valid: Path | None, **fields: Any) -> dict:
        """Uploads the files and makes a job of them."""
        names = ("n_epochs", "batch_size", "learning_rate_multiplier")
        if model is None:
            if (first := next(iter(self._client.models.list()), None)) is None:
                raise NotFound(f"the server {self.location} offers no model")
            model = first.id
        hyperparameters: Any = {name: fields[name] or "auto" for name in names}
        job = self._client.fine_tuning.jobs.create(
            model=model,
            training_file=self._upload(data),
            validation_file=None if valid is None else self._upload(valid),
            suffix=fields["suffix"],
            seed=fields["seed"],
            hyperparameters=hyperparameters,
        )
        return job.to_dict()

    def jobs(self) -> list[dict]:
        """All jobs, newest first."""
        return [job.to_dict() for job in self._client.fine_tuning.jobs.list(limit=100)]

    def models(self) -> frozenset[str]:
        """The ids of the models that are offered."""
        return frozenset(model.id for model in self._client.models.list())

    def job(self, id: str) -> dict:
        """A job."""
        return self._client.fine_tuning.jobs.retrieve(id).to_dict()

    def cancel(self, id: str) -> dict:
        """A job, which is cancelled now."""
        return self._client.fine_tuning.jobs.cancel(id).to_dict()

    def delete(self, name: str) -> list[str]:
        """Deletes a model, or what a job made; gives the ids of what is gone."""
        offered = self.models()
        if name.startswith(("ftjob-", "ft-")):
            job = self.job(name)
            check_finished(job)
            left = self._client.fine_tuning.jobs.checkpoints.list(name, limit=100)
            made = [job["fine_tuned_model"], *(one.fine_tuned_model_checkpoint for one in left)]
            doomed = [id for id in made if id in offered]
            if not doomed:
                raise NotFound(f"there is no model of {name}: it {job['status']}, or was deleted")
        else:
            doomed = [name, *(id for id in offered if id.startswith(name + CHECKPOINT_INFIX))]
        doomed.sort(reverse=True)  # the model last: its checkpoints would go with it
        for id in doomed:
            self._client.models.delete(id)
        return doomed

    def detached_hint(self, id: str) -> str:
        """Says what happens to a job that was made and is not followed."""
        return f"`pellucid finetune follow {id}` shows what it learns"

    def detach(self, id: str) -> None:
        """Says what becomes of a job that is followed no longer."""
        console.info(
            f"\n{id} goes on {self.location}: `pellucid finetune follow {id}` shows it again, "
            f"`pellucid finetune cancel {id}` ends it (both with --host, as here)"
        )

    def usage_hint(self, model: str) -> str:
        """How a model is asked that a job has made."""
        return f"ask it {self.location}: model={model!r}"

    def events(self, id: str) -> Iterator[dict]:
        """What happened to a job and what happens, until it is over."""
        with self._client.get(
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
                raise Unreachable(f"the connection broke ({reason}); the job may go on") from None
        if self.job(id)["status"] not in FINISHED:
            raise Unreachable("the server ended the connection; the job may go on")

    def _upload(self, path: Path) -> str:
        """Sends a file as it is read; gives its id."""
        with path.open("rb") as file:
            return self._client.files.create(file=file, purpose="fine-tune").id


def _base_url(host: str) -> str:
    host = host if "://" in host else f"http://{host}"
    with contextlib.suppress(ValueError):
        parts = urlsplit(host)
        # `port` raises if it is no number.
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != -1:
            return host.rstrip("/").removesuffix("/v1") + "/v1/"
    raise WrongUsage(f"{host} is no address of a server: use http://HOST:PORT")
