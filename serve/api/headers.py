"""What every response says about itself, and what becomes of a crash.

The outermost layer of the server. It makes a `Call` of each request, and gives each response the
headers OpenAI's clients look for: ``x-request-id``, ``openai-processing-ms``, ``openai-version``
and the client's own ``openai-organization``. An exception nobody handled becomes a 500 in the API's
shape here, because only here does the answer still get those headers; its traceback goes to the log
under the request's id, and nowhere else. When the answer is through, whoever counts is told.
"""

import logging
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api import logs
from serve.api.errors import server_error
from serve.api.request_context import RequestContext

log = logging.getLogger(__name__)

API_VERSION = "2020-10-01"


class ResponseHeaders:
    """Pure ASGI middleware: it touches the start of a response and lets the rest flow by.

    Args:
        app: the next application.
        timeout: seconds that an answer may take to compute.
        begun: told of each request when it comes.
        ended: told when its answer is through or the client gone, with the status; 499 if the
            client left before there was one.
    """

    def __init__(
        self,
        app: ASGIApp,
        timeout: float | None,
        on_start: Callable[[], None],
        on_end: Callable[[Scope, int], None],
    ):
        self.app, self.timeout, self.on_start, self.on_end = app, timeout, on_start, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        call = RequestContext(timeout=self.timeout)
        scope.setdefault("state", {})["call"] = call
        incoming = Headers(scope=scope)
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = call.id
                headers["openai-processing-ms"] = str(round(call.seconds * 1000))
                headers["openai-version"] = API_VERSION
                if organization := incoming.get("openai-organization"):
                    headers["openai-organization"] = organization
            await send(message)

        self.on_start()
        with logs.bind_request_id(call.id):
            try:
                await self.app(scope, receive, send_with_headers)
            except Exception:
                log.exception(
                    "%s %s failed (the client's own id: %r)",
                    scope["method"],
                    scope["path"],
                    incoming.get("x-client-request-id") or incoming.get("x-request-id"),
                )
                if status:
                    raise  # the server then cuts the connection: a truncated answer must look so
                await server_error().response()(scope, receive, send_with_headers)
            finally:
                self.on_end(scope, status or 499)
