"""Answer the requests of batches, several at a time, with low priority.

A request of a batch goes to the same routes as any other, inside the process: without a socket, a
key or the rate limit, and with a priority that lets interactive requests pass (see
`transformer/engine/scheduler.py`). Batches run one after the other, oldest first.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from pydantic import ValidationError

from serve.api.errors import APIError, as_api_error, from_validation
from serve.api.request_context import RequestContext
from serve.api.requests import ChatBody, CompletionBody
from serve.api.response_requests import ResponseBody
from serve.api.routes.embeddings import EmbeddingsBody
from serve.api.routes.moderations import ModerationsBody
from serve.api.unused_fields import check_names
from serve.exceptions import UnknownModel
from serve.jobs.batches import Batches, InvalidLine, Line, result_of
from serve.jobs.store import JsonObject
from serve.models.registry import Registry

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_CONCURRENT_LINES = 8
POLL_SECONDS = 5.0  # between two looks for batches of servers that have ended
RETRY_SECONDS = 30.0  # after an unexpected error, such as a full disk
MAX_ATTEMPTS = 5  # of a request while the queue is full
AnyBody = ChatBody | CompletionBody | EmbeddingsBody | ModerationsBody | ResponseBody
ENDPOINTS: dict[str, type[AnyBody]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/embeddings": EmbeddingsBody,
    "/v1/moderations": ModerationsBody,
    "/v1/responses": ResponseBody,
}


class BatchRunner:
    """Runs the batches of a server.

    Args:
        app: the application, whose routes answer the requests.
        batches: the batches.
        registry: the models of the server.
    """

    def __init__(self, app: FastAPI, batches: Batches, registry: Registry):
        self._batches, self._registry = batches, registry
        self._app = app
        self._routes = AsyncExitStackMiddleware(app.router)  # without the other middleware
        self._task: asyncio.Task[None] | None = None
        self._retry_times: dict[str, float] = {}  # of batches with an unexpected error
        self._has_new_batch = asyncio.Event()

    def start(self) -> None:
        """Run all unfinished batches, also a new one; call this on the event loop."""
        self._has_new_batch.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run_for_ever())

    async def stop(self) -> None:
        """Stop; the requests that run now are not recorded, and answered after the next start.

        What a thread writes now is finished first, because another server takes over afterwards.
        """
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run_for_ever(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._has_new_batch.wait(), POLL_SECONDS)
            self._has_new_batch.clear()
            try:
                await self._run_unfinished()
            except Exception:
                log.exception("looking for batches failed; trying again")

    async def _run_unfinished(self) -> None:
        while batch := await _in_thread(
            self._batches.next_unfinished, self._is_served, self._to_skip()
        ):
            try:
                await self._run(batch)
            except Exception:
                # Its answers are kept, and the error may pass.
                log.exception("%s failed; trying again in %.0f s", batch["id"], RETRY_SECONDS)
                self._retry_times[batch["id"]] = time.monotonic() + RETRY_SECONDS

    def _to_skip(self) -> set[str]:
        """Return the ids of batches that wait after an unexpected error."""
        now = time.monotonic()
        self._retry_times = {id: at for id, at in self._retry_times.items() if at > now}
        return set(self._retry_times)

    async def _run(self, batch: JsonObject) -> None:
        id, batches = batch["id"], self._batches
        is_new = batch["status"] == "validating"
        check = self._line_check(batch["endpoint"]) if is_new else lambda body: None
        try:
            lines, errors = await _in_thread(batches.read_lines, batch, check)
        except FileNotFoundError:
            message = f"The file '{batch['input_file_id']}' was deleted."
            error = {"code": "file_not_found", "message": message, "param": None, "line": None}
            lines, errors = [], [error]
        if errors and batch["status"] in ("validating", "in_progress"):
            errors = {"object": "list", "data": errors}
            await _in_thread(batches.set_status, id, "failed", errors=errors)
            return
        await _in_thread(batches.set_in_progress, id, lines)
        waiting = await _in_thread(batches.unanswered, id, lines)
        owner = await _in_thread(batches.owner, id) or ""
        queue = iter(waiting)

        async def work() -> None:
            for line in queue:
                if not await _in_thread(batches.can_continue, id):
                    return
                await self._answer(batch, owner, line)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(MAX_CONCURRENT_LINES, len(waiting))):
                group.create_task(work())
        current = await _in_thread(batches.get, id)
        assert current is not None
        is_expired = current["expires_at"] <= time.time()
        cancelled = current["status"] == "cancelling"
        status = "cancelled" if cancelled else "expired" if is_expired else "completed"
        await _in_thread(batches.finalize, id, lines, status, expired=status == "expired")

    def _line_check(self, endpoint: str) -> Callable[[JsonObject], None]:
        model_class = ENDPOINTS[endpoint]

        def check(body: JsonObject) -> None:
            try:
                check_names(body, model_class)
                model = model_class.model_validate(body, strict=True).model
            except APIError as error:
                param = f"body.{error.param}" if error.param else "body"
                raise InvalidLine(error.code or "invalid_request", error.message, param) from None
            except ValidationError as error:
                found = from_validation(error)
                param = f"body.{found.param}" if found.param else "body"
                raise InvalidLine(found.code or "invalid_request", found.message, param) from None
            if body.get("stream"):
                raise InvalidLine("invalid_value", "A batch is not streamed.", "body.stream")
            if body.get("background"):
                message = "A batch is in the background anyway."
                raise InvalidLine("invalid_value", message, "body.background")
            try:
                self._registry.resolve(model)
            except UnknownModel as error:
                raise InvalidLine("model_not_found", str(error), "body.model") from None

        return check

    def _is_served(self, name: str) -> bool:
        try:
            self._registry.resolve(name)
        except UnknownModel:
            return False
        return True

    async def _answer(self, batch: JsonObject, owner: str, line: Line) -> None:
        context = RequestContext(client=batch["id"], owner=owner, priority=1)
        attempt = 1
        while True:
            status, body = await self._post(batch["endpoint"], line.body, context)
            if status not in (429, 503) or attempt == MAX_ATTEMPTS:
                break
            await asyncio.sleep(2**attempt)
            attempt += 1
        result = result_of(line, status, context.id, body)
        await _in_thread(
            self._batches.add_result, batch["id"], line, result, is_error=status >= 400
        )

    async def _post(self, path: str, body: JsonObject, context: RequestContext) -> tuple[int, Any]:
        """Return the status and the JSON body of the response to a request."""
        content = json.dumps(body).encode()
        messages = [{"type": "http.request", "body": content, "more_body": False}]
        parts: list[bytes] = []
        status = 500

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()  # this client does not disconnect
            raise AssertionError

        async def send(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                parts.append(message.get("body", b""))

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
            "client": None,
            "server": None,
            "app": self._app,
            "state": {"context": context},
        }
        try:
            await self._routes(scope, receive, send)  # pyright: ignore[reportArgumentType]
        except Exception as error:
            api_error = as_api_error(error)
            if api_error.status >= 500:
                log.exception("a request of a batch failed")
            return api_error.status, api_error.body()
        return status, json.loads(b"".join(parts))


async def _in_thread(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function in a thread; if this task is cancelled, wait for the end of the call."""
    call = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(call)
    finally:
        await asyncio.wait([call])
