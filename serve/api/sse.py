"""Server-sent events, and noticing that the client has gone.

A streamed answer is a series of ``data: {json}`` events and ends in ``data: [DONE]``. Newer routes
name each event (``event: TYPE``), and their last one says by its name that it is. The status
line goes out with the first event, not before: what fails until then (a full queue, an engine that
cannot start) is still an honest 4xx or 5xx, what fails later is an event with an ``error`` object
and the end of the stream, without [DONE]. Where nothing is to be told for long, a comment is sent,
so that nobody on the way takes the connection for a dead one.
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
Events = AsyncGenerator[Event | None, None]  # None: nothing yet, but somebody is there


async def cancel_on_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """Awaits ``work``, but cancels it when the client goes away.

    Args:
        receive: the request's ASGI channel; its body must have been read.
        work: what to do meanwhile.

    Raises:
        ClientDisconnected: after ``work`` has been cancelled and has cleaned up.
    """

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def split_at_base64(answer: Any) -> list[bytes]:
    """The JSON of an answer without its pictures: what stands before, between and behind them.

    A picture takes megabytes of base64, in which nothing needs escaping, and a JSON encoder would
    hold the event loop for half a second over it. So each `b64_json` is "" in `answer`, and the
    base64 is sent between the parts that this returns.

    >>> between_base64({"data": [{"b64_json": ""}, {"b64_json": ""}], "created": 1})
    [b'{"data":[{"b64_json":"', b'"},{"b64_json":"', b'"}],"created":1}']
    """
    mark = b'"b64_json":"'
    first, *rest = to_json(answer).split(mark + b'"')
    *between, last = [first, *(b'"' + part for part in rest)]
    return [*(part + mark for part in between), last]


async def event_stream(request: Request, events: Events, *, named: bool = False) -> Response:
    """The response that streams ``events``; waits for the first, so that its errors are raised.

    Args:
        events: the first must not be None.
        named: whether each event goes under its ``type``, and without [DONE] at the end.
    """
    first = await cancel_on_disconnect(request.receive, anext(events))
    assert first is not None
    return EventStream(first, events, named=named)


class EventStream(Response):
    """Sends events until they end, fail, or nobody listens; then closes their iterator."""

    media_type = "text/event-stream"

    def __init__(self, first: Event, rest: Events, *, named: bool = False):
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]  # it is not known yet
        self.first, self.rest, self.named = first, rest, named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
            for piece in encoded:
                await send_body(piece)
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
