"""Server-sent events, and cancellation when the client disconnects.

A streamed response is a series of ``data: {json}`` events and ends with ``data: [DONE]``. Newer
routes name each event (``event: TYPE``), and the name of the last event marks the end. The status
line is sent with the first event: an error before it (a full queue, an engine that cannot start)
returns a 4xx or 5xx status. A later error is sent as an event with an ``error`` object, which ends
the stream without [DONE]. During long pauses a comment is sent, so that proxies keep the connection
open.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.errors import APIError, ClientDisconnected, as_api_error

log = logging.getLogger(__name__)

T = TypeVar("T")
Event = dict[str, Any]
Events = AsyncGenerator[Event | None, None]  # None: a keep-alive comment


async def cancel_on_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """Await ``work``, and cancel it when the client disconnects.

    Args:
        receive: The request's ASGI channel; its body must have been read.
        work: The awaitable to run.

    Returns:
        The result of ``work``.

    Raises:
        ClientDisconnected: The client has disconnected. ``work`` was cancelled and has ended.
    """

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def split_at_base64(body: Any) -> list[bytes]:
    """Encode a response as JSON and split it at the empty values of `b64_json`.

    An image takes megabytes of base64, which needs no escaping, and a JSON encoder would block the
    event loop for half a second. So each `b64_json` is "" in `body`, and the caller sends the
    base64 between the parts.

    >>> split_at_base64({"data": [{"b64_json": ""}, {"b64_json": ""}], "created": 1})
    [b'{"data":[{"b64_json":"', b'"},{"b64_json":"', b'"}],"created":1}']
    """
    mark = b'"b64_json":"'
    first, *rest = to_json(body).split(mark + b'"')
    *parts, last = [first, *(b'"' + part for part in rest)]
    return [*(part + mark for part in parts), last]


async def event_stream(request: Request, events: Events, *, named: bool = False) -> Response:
    """Return a response that streams ``events``, after waiting for the first one.

    Errors before the first event are raised here.

    Args:
        request: The request, whose body has been read.
        events: The events; None for a comment that keeps the connection open. The first must not be
            None.
        named: Whether to name each event after its ``type``, and to omit [DONE] at the end.
    """
    first = await cancel_on_disconnect(request.receive, anext(events))
    assert first is not None
    return EventStream(first, events, named=named)


class EventStream(Response):
    """A response that sends events until they end, fail, or the client disconnects.

    At the end it closes the iterator `rest`.

    Args:
        first: The first event.
        rest: The other events; None for a comment that keeps the connection open.
        named: Whether to name each event after its ``type``, and to omit [DONE] at the end.
    """

    media_type = "text/event-stream"

    def __init__(self, first: Event, rest: Events, *, named: bool = False):
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]  # unknown in advance
        self.first, self.rest, self.named = first, rest, named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        async with aclosing(self.rest):
            with suppress(ClientDisconnected):
                await cancel_on_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async def send_body(body: bytes) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": True})

        async def send_data(data: bytes, name: bytes = b"") -> None:
            await send_body(name + b"data: " + data + b"\n\n")

        async def send_event(event: Event) -> None:
            name = b"event: " + event["type"].encode() + b"\n" if self.named else b""
            if not isinstance(encoded := event.get("b64_json"), list):
                return await send_data(to_json(event), name)
            before, after = split_at_base64(event | {"b64_json": ""})
            await send_body(name + b"data: " + before)
            for chunk in encoded:
                await send_body(chunk)
            await send_body(after + b"\n\n")

        headers = self.raw_headers
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send_event(self.first)
        try:
            async for event in self.rest:
                if event is None:
                    await send_body(b": still here\n\n")
                else:
                    await send_event(event)
            if not self.named:
                await send_data(b"[DONE]")
        except Exception as error:
            if not isinstance(error, APIError):
                log.exception("the stream failed")
            name = b"event: error\n" if self.named else b""
            await send_data(to_json(as_api_error(error).body()), name)
        await send({"type": "http.response.body", "body": b""})
