"""Who may talk to this server: hosts, origins, keys, and how much they may send.

A server without keys on the loopback interface is still reachable from every page the user's
browser shows. Two checks close that door, and both run before anything is read. The Host header
must name this machine (else a page can rebind its own name to 127.0.0.1 and be "same origin"), and
a request that carries a foreign Origin is refused (else a page can post to us without reading the
answer). Cross-origin use is a setting; CORS headers for the origins it names are Starlette's work.

All of these are plain ASGI middlewares: they never wrap the body of a response, so that streaming
and the client's disconnect pass through untouched.
"""

import asyncio
import hmac
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import APIError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/health", "/v1/health")  # a supervisor asks these without a key
LINGER_SECONDS = 2.0


class HostAndOrigin:
    """Refuses requests for another host's name, or from another site's page, with 403.

    Args:
        app: the next application.
        hosts: names beside the loopback ones; "*" admits every Host.
        origins: origins ("https://app.example") whose pages may call; "*" admits every Origin.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], origins: Collection[str]):
        self.app = app
        self.hosts = {host_name(host) for host in (*LOOPBACK, *hosts)}
        self.origins = {origin.lower().rstrip("/") for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(Headers(scope=scope))):
            return await error.response()(scope, receive, send)
        await self.app(scope, receive, send)

    def _refusal(self, headers: Headers) -> APIError | None:
        host, origin = headers.get("host", "").lower(), headers.get("origin", "").lower()
        if not self.hosts & {host_name(host), "*"}:
            return APIError(
                403,
                f"The Host header '{host[:80]}' does not name this server. Use localhost or "
                "127.0.0.1, or start the server with this name among its allowed hosts.",
                code="host_not_allowed",
            )
        own = origin.partition("://")[2] == host  # a page that this server itself has served
        if origin and not own and not self.origins & {origin, "*"}:
            return APIError(
                403,
                f"Pages of the origin '{origin[:80]}' may not use this server. Start it with this "
                "origin among its allowed origins if they should.",
                code="origin_not_allowed",
            )
        return None


def host_name(host: str) -> str:
    """The name in a Host header: without port, brackets, final dot or capitals; "" for no host.

    >>> host_name("LocalHost.:8000"), host_name("[::1]:8000"), host_name("::1"), host_name("a@b")
    ('localhost', '::1', '::1', '')
    """
    if host.count(":") > 1 and not host.startswith("["):
        host = f"[{host}]"  # an IPv6 address as settings spell it
    match = re.fullmatch(r"(?:\[([^\]]+)\]|([^][:/@]+))(?::\d*)?", host.lower())
    return (match[1] or match[2]).rstrip(".") if match else ""


class ApiKeys:
    """Asks for one of ``keys`` as ``Authorization: Bearer KEY``; without keys, asks for nothing."""

    def __init__(self, app: ASGIApp, keys: Collection[str]):
        self.app = app
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and self.keys and scope["path"] not in OPEN_PATHS
        if guarded and (error := self._refusal(Headers(scope=scope))):
            return await error.response()(scope, receive, send)
        await self.app(scope, receive, send)

    def _refusal(self, headers: Headers) -> APIError | None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip()
        challenge = {"www-authenticate": "Bearer"}
        if scheme.lower() != "bearer" or not key:
            return APIError(
                401,
                "You didn't provide an API key. You need to provide your API key in an "
                "Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY). "
                "The keys of this server are those it was started with.",
                headers=challenge,
            )
        # Every key is compared, each in constant time: the answer's delay tells nothing.
        if not any([hmac.compare_digest(key.encode("latin-1"), known) for known in self.keys]):
            return APIError(
                401,
                f"Incorrect API key provided: {mask(key)}. "
                "The keys of this server are those it was started with.",
                code="invalid_api_key",
                headers=challenge,
            )
        return None


def mask(key: str) -> str:
    """A key as it may be shown: of a long one the first and last characters, of a short one none.

    >>> mask("sk-abcdefghijklmnop"), mask("secret")
    ('sk-ab***op', '***')
    """
    return f"{key[:5]}***{key[-2:]}" if len(key) >= 16 else "***"


class _TooLarge(Exception):
    pass


class BodyLimit:
    """Refuses a request body over ``limit`` bytes with 413, announced or not, unread."""

    def __init__(self, app: ASGIApp, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > self.limit:
            return await self._refuse(receive, send)
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:
                raise _TooLarge
            return message

        try:
            await self.app(scope, counted, send)
        except _TooLarge:
            await self._refuse(receive, send)

    async def _refuse(self, receive: Receive, send: Send) -> None:
        """Answers, then lingers: most clients read no answer before they have sent their body.

        What still arrives is dropped for a moment. Closing at once would reset the connection, and
        the client would report that in place of the error.
        """
        error = APIError(
            413,
            f"Maximum content size limit ({self.limit}) exceeded",
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
