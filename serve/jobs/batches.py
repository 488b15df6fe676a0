"""Batches: many requests in a file, answered when nothing else waits.

A batch is an object of the store, and each result is one too, whose id has the number of the line.
The database accepts an id once, so a line has one result, however often the server is killed. The
next server goes on with the lines that have none. At the end the results are written to files in
the order of the lines, and erased. A batch is run by the server that created it; when that server
has ended, by another one that shares the data folder (see `server_lock.py`).

The status of a batch is validating, in_progress, finalizing, and finally completed, failed, expired
or cancelled (cancelling while lines still run).
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from sqlite3 import IntegrityError
from typing import Any

from serve.jobs.server_lock import ServerLock
from serve.jobs.store import JsonObject, Store, file_record, new_id

log = logging.getLogger(__name__)

WINDOW_SECONDS = 24 * 3600
MAX_LINES = 50_000
MAX_ERRORS = 100  # in the `errors` of a batch
RUNNING = ("in_progress", "finalizing", "cancelling")
UNFINISHED = ("validating", *RUNNING)
FINISHED = ("completed", "failed", "expired", "cancelled")


@dataclass(frozen=True)
class Line:
    """A request of a batch: the number of its line, from 0, its id and its body."""

    index: int
    custom_id: str
    body: JsonObject


class InvalidLine(ValueError):
    """A line that is no request. Its `code`, `message` and `param` go into the batch's errors."""

    def __init__(self, code: str, message: str, param: str | None = None):
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


class Batches:
    """The batches of a store.

    Args:
        store: the store.
        server: the lock of the server that runs its batches.
    """

    def __init__(self, store: Store, server: ServerLock):
        self._store, self._server = store, server
        self._reported: set[str] = set()  # batches that wait for a server with their models

    def create(
        self,
        owner: str,
        input_file_id: str,
        fields: Mapping[str, Any],
        output_seconds: int | None = None,
    ) -> JsonObject:
        """Create a batch and return it in OpenAI's shape.

        Args:
            owner: the API key that it belongs to.
            input_file_id: the id of the file with the requests.
            fields: endpoint, completion_window and metadata.
            output_seconds: the lifetime of its output files in seconds; None for no limit.
        """
        now = int(time.time())
        batch = {
            "id": new_id("batch_"),
            "object": "batch",
            "errors": None,
            "input_file_id": input_file_id,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "in_progress_at": None,
            "expires_at": now + WINDOW_SECONDS,
            "finalizing_at": None,
            "completed_at": None,
            "failed_at": None,
            "expired_at": None,
            "cancelling_at": None,
            "cancelled_at": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            **fields,
        }
        record = {
            "owner": owner,
            "server": self._server.id,
            "output_seconds": output_seconds,
            "batch": batch,
        }
        self._store.add("batch", batch["id"], record)
        return batch

    def get(self, id: str) -> JsonObject | None:
        """Return a batch; None if it does not exist."""
        record = self._store.get("batch", id)
        return None if record is None else record["batch"]

    def owner(self, id: str) -> str | None:
        """Return the API key that a batch belongs to; None if it does not exist."""
        record = self._store.get("batch", id)
        return None if record is None else record["owner"]

    def next_unfinished(
        self, is_served: Callable[[str], bool], skip: Collection[str] = ()
    ) -> JsonObject | None:
        """Return the oldest unfinished batch that is not run by another server.

        The batch of a server that has ended waits for one with the same models, until it expires.

        Args:
            is_served: takes the name of a model, and returns whether this server has it.
            skip: ids of batches that are not returned.
        """
        with self._store.transaction():
            records, _ = self._store.page(
                "batch",
                predicate=lambda record: (
                    record["batch"]["status"] in UNFINISHED and record["batch"]["id"] not in skip
                ),
            )
            for record in records:
                batch, server = record["batch"], record.get("server", "")
                if server == self._server.id:
                    return batch
                if not self._server.has_ended(server):
                    continue
                missing = [name for name in record.get("models", ()) if not is_served(name)]
                if not missing or not self.can_continue(batch["id"]):
                    self._store.update("batch", batch["id"], server=self._server.id)
                    return batch
                if batch["id"] not in self._reported:
                    self._reported.add(batch["id"])
                    log.warning(
                        "%s waits for a server with the model %s", batch["id"], ", ".join(missing)
                    )
        return None

    def counts(self) -> tuple[Counter[str], Counter[str]]:
        """Return the number of all batches by status, and that of their requests by status."""
        statuses, requests = Counter[str](), Counter[str]()
        for record in self._store.page("batch")[0]:
            statuses[record["batch"]["status"]] += 1
            requests.update(record["batch"]["request_counts"])
        return statuses, requests

    def set_status(self, id: str, status: str, **fields: Any) -> JsonObject:
        """Set the status of a batch and its time, and other fields; return the batch."""
        with self._store.transaction():
            batch = self.get(id)
            assert batch is not None
            batch |= {"status": status, f"{status}_at": int(time.time()), **fields}
            self._store.update("batch", id, batch=batch)
        return batch

    def set_in_progress(self, id: str, lines: Sequence[Line]) -> None:
        """Start a batch whose lines are valid, unless it was cancelled."""
        with self._store.transaction():
            batch = self.get(id)
            assert batch is not None
            if batch["status"] == "validating":
                counts = {"total": len(lines), "completed": 0, "failed": 0}
                self.set_status(id, "in_progress", request_counts=counts)
                models = sorted({line.body["model"] for line in lines if "model" in line.body})
                self._store.update("batch", id, models=models)

    def can_continue(self, id: str) -> bool:
        """Return whether a batch is neither cancelled nor expired."""
        batch = self.get(id)
        return (
            batch is not None
            and batch["status"] == "in_progress"
            and time.time() < batch["expires_at"]
        )

    def cancel(self, id: str) -> JsonObject:
        """Stop a batch after the lines that run now; return the batch."""
        with self._store.transaction():
            batch = self.get(id)
            assert batch is not None
            if batch["status"] in ("validating", "in_progress"):
                return self.set_status(id, "cancelling")
        return batch

    # -- lines ---------------------------------------------------------------------------------

    def read_lines(
        self, batch: JsonObject, check: Callable[[JsonObject], None]
    ) -> tuple[list[Line], list[JsonObject]]:
        """Return the requests of a batch, and the errors of lines that are no requests.

        Args:
            batch: the batch.
            check: called with the body of each request; raises InvalidLine.
        """
        lines: list[Line] = []
        errors: list[JsonObject] = []
        ids: set[str] = set()
        with self._store.blob_path(batch["input_file_id"]).open("rb") as file:
            for index, text in enumerate(file):
                if not text.strip():
                    continue
                try:
                    if len(lines) == MAX_LINES:
                        raise InvalidLine(
                            "too_many_requests", f"A batch has at most {MAX_LINES:,} requests."
                        )
                    line = _read_line(index, text, batch["endpoint"], ids)
                    check(line.body)
                    lines.append(line)
                except InvalidLine as error:
                    errors.append(
                        {
                            "code": error.code,
                            "message": error.message,
                            "param": error.param,
                            "line": index + 1,
                        }
                    )
                    if len(errors) == MAX_ERRORS:
                        break
        if not lines and not errors:
            message = "The input file has no requests."
            errors = [{"code": "empty_file", "message": message, "param": None, "line": None}]
        return lines, errors

    def unanswered(self, id: str, lines: Sequence[Line]) -> list[Line]:
        """Return the lines of a batch that have no result."""
        return [
            line for line in lines if self._store.get("batch.result", _result_id(id, line)) is None
        ]

    def add_result(self, id: str, line: Line, result: JsonObject, *, is_error: bool) -> None:
        """Store the result of a line, unless it has one."""
        with suppress(IntegrityError), self._store.transaction():
            body = {"result": result, "is_error": is_error}
            self._store.add("batch.result", _result_id(id, line), body, parent=id)
            batch = self.get(id)
            assert batch is not None
            counts = batch["request_counts"]
            counts["failed" if is_error else "completed"] += 1
            self._store.update("batch", id, batch=batch)

    def finalize(self, id: str, lines: Sequence[Line], status: str, expired: bool = False) -> None:
        """Write the output and error files of a batch, and set its last status.

        Args:
            id: the id of the batch.
            lines: all lines.
            status: the last status.
            expired: whether lines without a result are errors of the error file.
        """
        batch = self.set_status(id, "finalizing") if status == "completed" else self.get(id)
        assert batch is not None
        output_seconds = (self._store.get("batch", id) or {}).get("output_seconds")
        files: dict[str, str | None] = {}
        for name, is_error in (("output", False), ("error", True)):
            # The id is known in advance, so that a killed server leaves no second file.
            file_id = f"file-{id.removeprefix('batch_')}{name}"
            if self._store.get("file", file_id) is not None:
                files[f"{name}_file_id"] = file_id
                continue
            with self._store.open_blob(file_id) as blob:
                for line in lines:
                    record = self._store.get("batch.result", _result_id(id, line))
                    if record is None and expired and is_error:
                        error = {
                            "code": "batch_expired",
                            "message": "This request was not answered before the batch expired.",
                        }
                        record = {"result": _result(line, None, error), "is_error": True}
                    if record is not None and record["is_error"] == is_error:
                        text = json.dumps(record["result"], ensure_ascii=False)
                        # Half of a surrogate pair, which JSON can escape, is not valid UTF-8.
                        blob.write(text.encode("utf-8", "backslashreplace"))
                        blob.write(b"\n")
                if blob.size:
                    filename = f"{id}_{name}.jsonl"
                    file = file_record(file_id, filename, blob.size, "batch_output")
                    if output_seconds is not None:
                        file["expires_at"] = file["created_at"] + output_seconds
                    blob.commit(file)
            files[f"{name}_file_id"] = file_id if blob.size else None
        with self._store.transaction():
            self.set_status(id, status, **files)
            self._store.erase("batch.result", [_result_id(id, line) for line in lines])


def result_of(line: Line, status: int, request_id: str, body: Any) -> JsonObject:
    """Return the result of a line that was answered, in OpenAI's shape."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return _result(line, response, None)


def _result(line: Line, response: JsonObject | None, error: JsonObject | None) -> JsonObject:
    return {
        "id": new_id("batch_req_"),
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }


def _result_id(id: str, line: Line) -> str:
    return f"{id}:{line.index}"


def _read_line(index: int, text: bytes, endpoint: str, ids: set[str]) -> Line:
    """Return the request of a line.

    Raises:
        InvalidLine: the line is no request for the endpoint, or its id is not unique.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidLine("invalid_json_line", f"This line is not valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise InvalidLine("invalid_json_line", "This line is not a JSON object.")
    custom_id = data.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise InvalidLine("missing_required_parameter", "custom_id is missing.", "custom_id")
    if custom_id in ids:
        raise InvalidLine(
            "duplicate_custom_id", f"Another line has the custom_id {custom_id!r:.80}.", "custom_id"
        )
    ids.add(custom_id)
    if data.get("method") != "POST":
        message = f"method is {data.get('method')!r:.40}: use 'POST'."
        raise InvalidLine("invalid_method", message, "method")
    if data.get("url") != endpoint:
        raise InvalidLine(
            "mismatched_url",
            f"url is {data.get('url')!r:.80}, but the endpoint of the batch is '{endpoint}'.",
            "url",
        )
    if not isinstance(body := data.get("body"), dict):
        raise InvalidLine("missing_required_parameter", "body is missing.", "body")
    return Line(index, custom_id, body)
