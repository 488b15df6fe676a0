"""Limit the size of a request body and the time it takes to arrive."""

import asyncio
from collections.abc import Mapping
from fnmatch import fnmatch
from types import MappingProxyType

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import APIError

LINGER_SECONDS = 2.0  # time for which the rest of a refused body is read and dropped
BODY_TIMEOUT_SECONDS = 300.0  # time that a body may take to arrive


class _TooLarge(Exception):
    pass


class _TooSlow(Exception):
    pass


class BodyLimit:
    """Pure ASGI middleware that refuses bodies that are too large (413) or too slow (408).

    A body whose Content-Length exceeds the limit is refused unread; a body without a Content-Length
    is refused once more bytes than the limit have arrived. The timeout keeps slow clients from
    holding connections.

    Args:
        app: The next application.
        limit: Largest body, in bytes.
        timeout: Longest time that a body may take to arrive, in seconds.
        path_limits: Limits of the paths that accept larger bodies, in bytes, by path; "*" stands
            for any text.
    """

    def __init__(
        self,
        app: ASGIApp,
        limit: int,
        timeout: float = BODY_TIMEOUT_SECONDS,
        path_limits: Mapping[str, int] = MappingProxyType({}),
    ):
        self.app, self.limit, self.timeout, self.path_limits = app, limit, timeout, path_limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limits = (n for pattern, n in self.path_limits.items() if fnmatch(scope["path"], pattern))
        limit = max([self.limit, *limits])
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > limit:
            return await self._refuse(limit, receive, send)
        received, is_complete = 0, False
        deadline = asyncio.get_running_loop().time() + self.timeout

        async def receive_limited() -> Message:
            nonlocal received, is_complete
            if is_complete:  # only a disconnect can follow, which has no time limit
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise _TooSlow from None
            received += len(message.get("body", b""))
            if received > limit:
                raise _TooLarge
            is_complete = not message.get("more_body", False)
            return message

        try:
            await self.app(scope, receive_limited, send)
        except _TooLarge:
            await self._refuse(limit, receive, send)
        except _TooSlow:
            error = APIError(
                408,
                f"The request body did not arrive within {self.timeout:g} seconds. Send it faster, "
                "or send less.",
                code="request_timeout",
                headers={"connection": "close"},
            )
            await error.response()(scope, receive, send)

    async def _refuse(self, limit: int, receive: Receive, send: Send) -> None:
        """Send a 413, then drop the rest of the body for up to `LINGER_SECONDS`.

        Most clients read no response before they have sent their body. Closing at once would reset
        the connection, and the client would report the reset instead of the error.
        """
        error = APIError(
            413,
            f"Maximum content size limit ({limit}) exceeded",
            code="request_too_large",
            headers={"connection": "close"},
        ).response()
        start = {"type": "http.response.start", "status": 413, "headers": error.raw_headers}
        await send(start)
        await send({"type": "http.response.body", "body": error.body, "more_body": True})
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while (await receive()).get("more_body"):
                    pass
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b""})
