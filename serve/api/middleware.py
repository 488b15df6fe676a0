"""Who may talk to this server: hosts, origins, keys.

A server without keys on the loopback interface is still reachable from every page the user's
browser shows. Two checks close that door, and both run before anything is read. The Host header
must name this machine (else a page can rebind its own name to 127.0.0.1 and be "same origin"), and
a request that carries a foreign Origin is refused (else a page can post to us without reading the
answer). Cross-origin use is a setting; CORS headers for the origins it names are Starlette's work.

All of these are plain ASGI middlewares: they never wrap the body of a response, so that streaming
and the client's disconnect pass through untouched.
"""

import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.api.auth import KeyRing
from serve.api.errors import APIError
from serve.api.request_context import context_of

LOOPBACK = ("localhost", "127.0.0.1", "::1")
HEALTH_PATHS = ("/health", "/v1/health", "/ready")  # a supervisor asks these without a key
PAGE_PATHS = ("/", "/docs", "/openapi.json")  # pages are shown to anybody; what they do is not
PAGE_PREFIXES = ("/web/", "/docs/")
CAPABILITY_PREFIXES = ("/images/",)  # what is in there has a name that is as good as a key


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


def is_public(path: str) -> bool:
    """Whether a path is served without a key."""
    return path in (*HEALTH_PATHS, *PAGE_PATHS) or path.startswith(
        PAGE_PREFIXES + CAPABILITY_PREFIXES
    )


KEY_HINT = (
    "This server takes the keys it was started with and those of `pellucid keys`, on its machine."
)


class ApiKeys:
    """Asks for one of the keys as ``Authorization: Bearer KEY``; without keys, asks for nothing.

    Either way it notes who asks: the key's name, or the address.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing):
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            context_of(scope).client = (scope.get("client") or ("",))[0]
            if self.keys.requires_key() and not is_public(scope["path"]):
                owner = self._authenticate(Headers(scope=scope))
                if isinstance(owner, APIError):
                    return await owner.response()(scope, receive, send)
                context_of(scope).client = owner
        await self.app(scope, receive, send)

    def _authenticate(self, headers: Headers) -> str | APIError:
        """The name of the key that came, or what is wrong with it."""
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
    """A key as it may be shown: of a long one the first and last characters, of a short one none.

    >>> mask("sk-abcdefghijklmnop"), mask("secret")
    ('sk-ab***op', '***')
    """
    return f"{key[:5]}***{key[-2:]}" if len(key) >= 16 else "***"
