"""How large a request's body may be, and how long it may take to arrive."""

import asyncio
from collections.abc import Mapping
from types import MappingProxyType

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import APIError

LINGER_SECONDS = 2.0  # for which what a client still sends is read and dropped
BODY_TIMEOUT_SECONDS = 300.0  # that a body may take to arrive


class _TooLarge(Exception):
    pass


class _TooSlow(Exception):
    pass


class BodyLimit:
    """Refuse a request body over ``limit`` bytes with 413: unread if announced, else at the limit.

    ``uploads`` gives paths that take more than others.

    One that does not arrive in time is a 408: whoever sends a byte a minute holds no connection.
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
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limit = max(self.limit, self.path_limits.get(scope["path"], 0))
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > limit:
            return await self._refuse(limit, receive, send)
        seen, is_whole = 0, False
        end = asyncio.get_running_loop().time() + self.timeout

        async def counted() -> Message:
            nonlocal seen, is_whole
            if is_whole:  # what comes now is the client's leaving, and that has time
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise _TooSlow from None
            seen += len(message.get("body", b""))
            if seen > limit:
                raise _TooLarge
            is_whole = not message.get("more_body", False)
            return message

        try:
            await self.app(scope, counted, send)
        except _TooLarge:
            await self._refuse(limit, receive, send)
        except _TooSlow:
            error = APIError(
                408,
                f"The request's body did not arrive within {self.timeout:g} seconds.",
                code="request_timeout",
                headers={"connection": "close"},
            )
            await error.response()(scope, receive, send)

    async def _refuse(self, limit: int, receive: Receive, send: Send) -> None:
        """Answers, then lingers: most clients read no answer before they have sent their body.

        What still arrives is dropped for a moment. Closing at once would reset the connection, and
        the client would report that in place of the error.
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
