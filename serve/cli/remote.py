"""A server's fine-tuning API, as the command line asks it: nothing but the standard library."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

from serve.cli import console
from serve.exceptions import Failure, NotFound, Unreachable, WrongUsage
from serve.jobs.jobs import check_is_over
from serve.models.adapters import CHECKPOINT

CHUNK = 2**20


class Remote:
    """The jobs of a server.

    Args:
        host: its address, as "http://127.0.0.1:8000" or "127.0.0.1:8000".
        key: what it asks for; empty for none.
    """

    def __init__(self, host: str, key: str):
        host = host if "://" in host else f"http://{host}"
        if not host.startswith(("http://", "https://")):
            raise WrongUsage(f"{host} is no address of a server: use http://HOST:PORT")
        self._base = host.rstrip("/").removesuffix("/v1") + "/v1/"
        self._key = key
        self.where = f"at {host}"

    def create(self, model: str | None, data: Path, valid: Path | None, **fields: Any) -> dict:
        """Uploads the files and makes a job of them."""
        body: dict[str, Any] = {
            "model": model or self._ask("GET", "models")["data"][0]["id"],
            "training_file": self._upload(data),
            "suffix": fields["suffix"],
            "seed": fields["seed"],
        }
        if valid is not None:
            body["validation_file"] = self._upload(valid)
        names = ("n_epochs", "batch_size", "learning_rate_multiplier")
        body["hyperparameters"] = {name: fields[name] or "auto" for name in names}
        return self._ask("POST", "fine_tuning/jobs", body)

    def jobs(self) -> list[dict]:
        """All jobs, newest first."""
        found: list[dict] = []
        after = ""
        while True:
            page = self._ask("GET", f"fine_tuning/jobs?limit=100{after}")
            found += page["data"]
            if not page["has_more"]:
                return found
            after = f"&after={quote(page['last_id'])}"

    def models(self) -> frozenset[str]:
        """The ids of the models that are offered."""
        return frozenset(model["id"] for model in self._ask("GET", "models")["data"])

    def job(self, id: str) -> dict:
        """A job."""
        return self._ask("GET", f"fine_tuning/jobs/{quote(id, safe='')}")

    def cancel(self, id: str) -> dict:
        """A job, which is cancelled now."""
        return self._ask("POST", f"fine_tuning/jobs/{quote(id, safe='')}/cancel", {})

    def delete(self, name: str) -> list[str]:
        """Deletes a model, or what a job made; gives the ids of what is gone."""
        offered = self.models()
        if name.startswith(("ftjob-", "ft-")):
            job = self.job(name)
            check_is_over(job)
            path = f"fine_tuning/jobs/{quote(name, safe='')}/checkpoints?limit=100"
            left = [one["fine_tuned_model_checkpoint"] for one in self._ask("GET", path)["data"]]
            doomed = [id for id in (job["fine_tuned_model"], *left) if id in offered]
            if not doomed:
                raise NotFound(f"there is no model of {name}: it {job['status']}, or was deleted")
        else:
            doomed = [name, *(id for id in offered if id.startswith(name + CHECKPOINT))]
        doomed.sort(reverse=True)  # the model last: its checkpoints would go with it
        for id in doomed:
            self._ask("DELETE", f"models/{quote(id, safe='')}")
        return doomed

    def without_follow(self, id: str) -> str:
        """Says what happens to a job that was made and is not followed."""
        return f"`pellucid finetune follow {id}` shows what it learns"

    def leave(self, id: str) -> None:
        """Says what becomes of a job that is followed no longer."""
        console.say(
            f"\n{id} goes on {self.where}: `pellucid finetune follow {id}` shows it again, "
            f"`pellucid finetune cancel {id}` ends it (both with --host, as here)"
        )

    def hint(self, model: str) -> str:
        """How a model is asked that a job has made."""
        return f"ask it {self.where}: model={model!r}"

    def events(self, id: str) -> Iterator[dict]:
        """What happened to a job and what happens, until it is over."""
        path = f"fine_tuning/jobs/{quote(id, safe='')}/events?stream=true"
        try:
            with self._open("GET", path) as lines:
                for line in lines:
                    name, _, data = line.decode().strip().partition(": ")
                    if data == "[DONE]":
                        return
                    if name == "data":  # else the end of an event, or a sign of life
                        event = json.loads(data)
                        if "error" in event:
                            raise Unreachable(event["error"]["message"])
                        yield event
        except (OSError, HTTPException) as error:
            raise Unreachable(f"the connection broke ({error}); the job may go on") from None
        raise Unreachable(f"{self._base} ended the connection; the job may go on")

    def _upload(self, path: Path) -> str:
        """Sends a file as it is read; gives its id."""
        boundary = f"pellucid{os.urandom(16).hex()}"
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; '
            f'filename="{quote(path.name, safe=" ()+,")}"\r\n\r\n'
        ).encode()
        tail = f"\r\n--{boundary}--\r\n".encode()

        def body() -> Iterator[bytes]:
            yield head
            with path.open("rb") as file:
                while data := file.read(CHUNK):
                    yield data
            yield tail

        headers = {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Content-Length": str(len(head) + path.stat().st_size + len(tail)),
        }
        with self._open("POST", "files", body(), headers) as answer:
            return json.load(answer)["id"]

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        with self._open(method, path, data, {"Content-Type": "application/json"}) as answer:
            return json.load(answer)

    def _open(
        self, method: str, path: str, data: Any = None, headers: dict[str, str] | None = None
    ) -> Any:
        headers = dict(headers or {}) | (
            {"Authorization": f"Bearer {self._key}"} if self._key else {}
        )
        request = urllib.request.Request(
            self._base + path, data=data, method=method, headers=headers
        )
        try:
            return urllib.request.urlopen(request, timeout=600)
        except urllib.error.HTTPError as error:
            message = _message(error.read(), error.code)
            raise (NotFound if error.code == 404 else Failure)(message) from None
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise Unreachable(f"no server answers at {self._base}: {reason}") from None


def _message(body: bytes, code: int) -> str:
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the server answered with status {code}"
