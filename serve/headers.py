"""What every response says about itself, and what becomes of a crash.

The outermost layer of the server. It gives each request an id, and each response the headers
OpenAI's clients look for: ``x-request-id``, ``openai-processing-ms``, ``openai-version`` and the
client's own ``openai-organization``. An exception nobody handled becomes a 500 in the API's shape
here, because only here does the answer still get those headers; its traceback goes to the log
under the request's id, and nowhere else.
"""

import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import server_error

log = logging.getLogger(__name__)

API_VERSION = "2020-10-01"


class ResponseHeaders:
    """Pure ASGI middleware: it touches the start of a response and lets the rest flow by."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began = time.perf_counter()
        request_id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        incoming = Headers(scope=scope)
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round((time.perf_counter() - began) * 1000))
                headers["openai-version"] = API_VERSION
                if organization := incoming.get("openai-organization"):
                    headers["openai-organization"] = organization
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception:
            log.exception(
                "%s: %s %s failed (the client's own id: %r)",
                request_id,
                scope["method"],
                scope["path"],
                incoming.get("x-client-request-id") or incoming.get("x-request-id"),
            )
            if started:
                raise  # the server then cuts the connection: a truncated answer must look like one
            await server_error().response()(scope, receive, send_with_headers)
