"""Stored responses, conversations and chat completions: who may read them, and for how long.

They are objects of the server's store (`serve/jobs/store.py`). Each has an owner, the API key that
created it; for other keys it does not exist. The texts of all of them are limited in bytes and in
days: the oldest are deleted first. A deleted text is overwritten on the disk.

A response that runs in the background belongs to an asyncio task of one server. Its events are kept
in memory until it ends, so that several clients can follow it. If its server has ended before it,
the response has failed.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from serve.api.errors import APIError
from serve.api.response_events import Event
from serve.jobs.server_lock import ServerLock
from serve.jobs.store import ID_LENGTH, JsonObject, Store, new_id

KINDS = ("response", "chat.completion", "conversation", "conversation.item")
SECONDS_PER_DAY = 86_400
EXPIRY_CHECK_SECONDS = 3600.0  # an expired object cannot be read, even before it is deleted


@dataclass
class BackgroundRun:
    """A response that is being computed in the background.

    Attributes:
        task: The task that computes it.
        events: Its events so far.
        changed: Notified after each event, and at the end.
        is_finished: Whether no event follows.
        is_cancelled: Whether a client cancelled the response; at its end, a server cancels the
            task, too.
    """

    task: asyncio.Task[None] | None = None
    events: list[Event] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    is_finished: bool = False
    is_cancelled: bool = False

    @property
    def has_started(self) -> bool:
        """Whether the response is not queued any more."""
        return any(event["type"] == "response.in_progress" for event in self.events)

    async def collect(
        self, events: AsyncGenerator[Event, None], cancel: Callable[[], Event]
    ) -> None:
        """Compute the events; `cancel` returns the last event after a client has cancelled."""
        try:
            async with aclosing(events):
                async for event in events:
                    self.events.append(event)
                    async with self.changed:
                        self.changed.notify_all()
        except asyncio.CancelledError:
            if self.is_cancelled and (last := cancel()) not in self.events[-1:]:
                self.events.append(last)
            raise
        finally:
            self.is_finished = True
            async with self.changed:
                self.changed.notify_all()

    async def follow(self) -> AsyncGenerator[Event, None]:
        """Yield all events, as they arrive."""
        count = 0
        while True:
            async with self.changed:
                while len(self.events) == count and not self.is_finished:
                    await self.changed.wait()
            is_finished = self.is_finished
            while count < len(self.events):
                yield self.events[count]
                count += 1
            if is_finished:
                return


class ResponseStore:
    """The stored texts of a server.

    Args:
        store: The store of the server.
        server: The lock of the server.
        is_enabled: Whether requests may store; otherwise nothing is written.
        max_bytes: Limit on the JSON of all objects, in bytes.
        max_days: Age at which objects are deleted, in days.
    """

    def __init__(
        self,
        store: Store,
        server: ServerLock,
        *,
        is_enabled: bool,
        max_bytes: int,
        max_days: float,
    ):
        self._store, self._server, self.is_enabled = store, server, is_enabled
        self._max_bytes, self._max_seconds = max_bytes, max_days * SECONDS_PER_DAY
        self.running: dict[str, BackgroundRun] = {}
        self._num_bytes = store.total_bytes(KINDS)
        self._next_expiry_check = 0.0
        self._prune()

    def check_enabled(self) -> None:
        """Check that requests may store.

        Raises:
            APIError: 400 if they may not.
        """
        if not self.is_enabled:
            raise APIError(400, "This server stores nothing: it was started with --no-store.")

    def add(self, kind: str, id: str, owner: str, body: JsonObject, parent: str = "") -> None:
        """Store an object; the oldest ones are deleted if there is no room."""
        body = body | {"owner": owner, "stored_at": time.time(), "server": self._server.id}
        self._num_bytes += len(json.dumps(body))
        self._store.add(kind, id, body, parent)
        self._prune()

    def get(self, kind: str, id: str, owner: str) -> JsonObject:
        """Return the body of an object.

        Raises:
            APIError: 404 if it does not exist, or belongs to another key.
        """
        body = self._store.get(kind, id)
        if body is None or not self.is_readable(body, owner):
            raise no_such_object(kind, id)
        if kind == "response" and is_unfinished(body["response"]):
            body = self._fail_if_lost(id, body)
        return body

    def update(self, kind: str, id: str, **fields: Any) -> None:
        """Set fields of an object's body; without effect if it was deleted meanwhile."""
        try:
            self._num_bytes += len(json.dumps(fields))
            self._store.update(kind, id, **fields)
        except KeyError:
            return
        self._prune()

    def delete(self, kind: str, id: str, owner: str) -> None:
        """Delete an object and overwrite its bytes.

        Raises:
            APIError: 404 if it does not exist, or belongs to another key.
        """
        body = self.get(kind, id, owner)
        if kind == "conversation":
            items = [item["id"] for item in self.items(id)]
            self._store.erase("conversation.item", items)
        self._store.erase(kind, [id])
        self._num_bytes -= len(json.dumps(body))

    def add_items(self, conversation: str, owner: str, items: Sequence[JsonObject]) -> None:
        """Append items to a conversation."""
        for item in items:
            self.add("conversation.item", item["id"], owner, {"item": item}, conversation)

    def items(self, conversation: str) -> list[JsonObject]:
        """Return all items of a conversation, oldest first."""
        bodies, _ = self._store.page("conversation.item", parent=conversation)
        return [body["item"] for body in bodies]

    def conversation_item(self, conversation: str, id: str, owner: str) -> JsonObject:
        """Return an item of a conversation.

        Raises:
            APIError: 404 if there is no such item, or it belongs to another key.
        """
        body = self._store.get("conversation.item", id, parent=conversation)
        if body is None or not self.is_readable(body, owner):
            raise no_such_object("conversation.item", id)
        return body["item"]

    def resolve_references(
        self, items: Sequence[JsonObject], owner: str, param: str
    ) -> list[JsonObject]:
        """Return items with copies of the stored items in the place of references to them.

        Args:
            items: The items of a request.
            owner: The API key of the request.
            param: The path of the items in the request, for messages.

        Raises:
            APIError: 404 for a reference to an item that does not exist.
        """
        resolved = []
        for index, item in enumerate(items):
            if item["type"] == "item_reference":
                found = self._find_item(item["id"], owner, f"{param}[{index}].id")
                # A conversation has each id once, also if it refers to its own items.
                item = found | {"id": new_id(found["id"].partition("_")[0] + "_")}
            resolved.append(item)
        return resolved

    def _find_item(self, id: str, owner: str, param: str) -> JsonObject:
        """Return the item with an id, of a conversation or of a response.

        Raises:
            APIError: 404 if there is none; `param` is the field that holds the id.
        """
        body = self._store.get("conversation.item", id)
        if body is not None and self.is_readable(body, owner):
            return body["item"]
        # The id of an item of a response has that of the response.
        body = self._store.get("response", f"resp_{id.partition('_')[2][:ID_LENGTH]}")
        if body is not None and self.is_readable(body, owner):
            for item in [*body["input"], *body["response"]["output"]]:
                if item["id"] == id:
                    return item
        raise no_such_object("conversation.item", id, param)

    async def stop(self, id: str) -> None:
        """Stop a response that is computed in the background, and wait until it has stopped."""
        if (run := self.running.get(id)) is not None and run.task is not None:
            run.is_cancelled = True
            run.task.cancel()
            await asyncio.wait([run.task])

    def is_readable(self, body: JsonObject, owner: str) -> bool:
        """Return whether an object belongs to a key and has not expired."""
        return body["owner"] == owner and body["stored_at"] + self._max_seconds >= time.time()

    def _prune(self) -> None:
        """Delete expired objects, and the oldest ones until all others fit."""
        now = time.time()
        if self._num_bytes <= self._max_bytes and now < self._next_expiry_check:
            return
        self._next_expiry_check = now + EXPIRY_CHECK_SECONDS
        if self._num_bytes > self._max_bytes:  # an estimate: updates count old fields as well
            self._num_bytes = self._store.total_bytes(KINDS)
        self._num_bytes -= self._store.erase_oldest(
            KINDS,
            stored_before=now - self._max_seconds,
            num_bytes=self._num_bytes - self._max_bytes,
        )

    def _fail_if_lost(self, id: str, body: JsonObject) -> JsonObject:
        """Return an unfinished response, which has failed if no server computes it any more."""
        if id in self.running or not self._server.has_ended(body.get("server", "")):
            return body
        error = {"code": "server_error", "message": "The server stopped before it had finished."}
        with self._store.transaction():
            # Read it again: the server may have finished it just before its end.
            if (current := self._store.get("response", id)) is None:
                raise no_such_object("response", id)
            if not is_unfinished(response := current["response"]):
                return current
            response |= {"status": "failed", "error": error}
            return self._store.update("response", id, response=response)


def is_unfinished(response: JsonObject) -> bool:
    """Return whether a response is still computed."""
    return response["status"] in ("queued", "in_progress")


_NAMES = {
    "response": "Response",
    "chat.completion": "Chat completion",
    "conversation": "Conversation",
    "conversation.item": "Item",
}


def no_such_object(kind: str, id: str, param: str | None = None) -> APIError:
    """Return the 404 error for a missing object of a kind."""
    return APIError(
        404, f"{_NAMES[kind]} with id '{id[:80]}' not found.", param=param, code="not_found"
    )
