"""Middleware for access control: hosts, origins, keys.

Without keys, a server on the loopback interface is still reachable from every web page that the
user opens. Two checks prevent that, before the body is read. The Host header must name this machine
(against DNS rebinding: a page that resolves its own name to 127.0.0.1 would be "same origin"). A
request with a foreign Origin is refused (a page could otherwise send POST requests without reading
the response). Cross-origin use is a setting; Starlette adds the CORS headers for allowed origins.
Pages that this machine serves, such as `http://localhost:3000`, may send requests if the server
requires a key, because a page without the key then learns nothing.

All classes are pure ASGI middleware. They do not wrap the response body, so streaming and
disconnects work unchanged.
"""

import re
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.api.auth import KeyRing
from serve.api.errors import APIError
from serve.api.request_context import context_of

LOOPBACK = ("localhost", "127.0.0.1", "::1")
LOCAL_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
HEALTH_PATHS = ("/health", "/v1/health", "/ready")  # health checks come without an API key
PAGE_PATHS = ("/", "/docs", "/openapi.json")  # public, but the API requests of a page need a key
PAGE_PREFIXES = ("/web/", "/docs/")
CAPABILITY_PREFIXES = ("/images/",)  # public, because the file names cannot be guessed


class HostAndOrigin:
    """Pure ASGI middleware that refuses requests with a foreign Host or Origin header (403).

    Args:
        app: The next application.
        hosts: Accepted names in addition to the loopback names; "*" accepts every Host.
        origins: Accepted origins ("https://app.example"); "*" accepts every Origin.
        requires_key: Returns whether requests need a key; then origins of this machine are
            accepted.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Collection[str],
        origins: Collection[str],
        requires_key: Callable[[], bool],
    ):
        self.app, self.requires_key = app, requires_key
        self.hosts = {host_name(host) for host in (*LOOPBACK, *hosts)}
        self.origins = {origin.lower().rstrip("/") for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "http" and (error := self._refusal(Headers(scope=scope))):
            return await error.response()(scope, receive, send)
        await self.app(scope, receive, send)

    def _refusal(self, headers: Headers) -> APIError | None:
        host, origin = headers.get("host", "").lower(), headers.get("origin", "").lower()
        if not self.hosts & {host_name(host), "*"}:
            return APIError(
                403,
                f"The Host header '{host[:80]}' does not name this server. Use localhost or "
                "127.0.0.1, or start the server with "
                f"--allowed-host {host_name(host)[:80] or 'NAME'}.",
                code="host_not_allowed",
            )
        is_same_origin = origin.partition("://")[2] == host
        if not origin or is_same_origin or self.origins & {origin, "*"}:
            return None
        is_local = re.fullmatch(LOCAL_ORIGINS, origin) is not None
        if is_local and self.requires_key():
            return None
        alternative = ", or require a key (`pellucid keys create NAME`)" if is_local else ""
        return APIError(
            403,
            f"This server refuses requests from web pages of the origin '{origin[:80]}'. To "
            f"allow them, start the server with --allowed-origin {origin[:80]}{alternative}.",
            code="origin_not_allowed",
        )


def host_name(host: str) -> str:
    """Return the name in a Host header, in lower case, without port, brackets and final dot.

    The result is "" for an invalid header.

    >>> host_name("LocalHost.:8000"), host_name("[::1]:8000"), host_name("::1"), host_name("a@b")
    ('localhost', '::1', '::1', '')
    """
    if host.count(":") > 1 and not host.startswith("["):
        host = f"[{host}]"  # an IPv6 address without brackets, as in settings
    match = re.fullmatch(r"(?:\[([^\]]+)\]|([^][:/@]+))(?::\d*)?", host.lower())
    return (match[1] or match[2]).rstrip(".") if match else ""


def is_public(path: str) -> bool:
    """Return whether a path is served without a key."""
    return path in (*HEALTH_PATHS, *PAGE_PATHS) or path.startswith(
        PAGE_PREFIXES + CAPABILITY_PREFIXES
    )


KEY_HINT = (
    "This server accepts the keys it was started with and those that `pellucid keys create NAME` "
    "creates on its machine."
)


class ApiKeys:
    """Pure ASGI middleware that requires ``Authorization: Bearer KEY`` if the server has keys.

    It sets `RequestContext.client` to the key's name, or to the client's address, and
    `RequestContext.owner` to the key's name.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing):
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "http":
            context_of(scope).client = (scope.get("client") or ("",))[0]
            if self.keys.requires_key() and not is_public(scope["path"]):
                owner = self._authenticate(Headers(scope=scope))
                if isinstance(owner, APIError):
                    return await owner.response()(scope, receive, send)
                context_of(scope).client = context_of(scope).owner = owner
        await self.app(scope, receive, send)

    def _authenticate(self, headers: Headers) -> str | APIError:
        """Return the name of the request's key, or the error to send."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip()
        challenge = {"www-authenticate": "Bearer"}
        if scheme.lower() != "bearer" or not key:
            return APIError(
                401,
                "You didn't provide an API key. You need to provide your API key in an "
                f"Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY). "
                f"{KEY_HINT}",
                headers=challenge,
            )
        return self.keys.owner(key.encode("latin-1")) or APIError(
            401,
            f"Incorrect API key provided: {mask(key)}. {KEY_HINT}",
            code="invalid_api_key",
            headers=challenge,
        )


def mask(key: str) -> str:
    """Return the first and last characters of a key, or none of a key under 16 characters.

    >>> mask("sk-abcdefghijklmnop"), mask("secret")
    ('sk-ab***op', '***')
    """
    return f"{key[:5]}***{key[-2:]}" if len(key) >= 16 else "***"
