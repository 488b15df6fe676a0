"""Response headers and unhandled exceptions.

This is the outermost middleware. It creates the `RequestContext` of each request and adds the
headers that OpenAI's clients expect: ``x-request-id``, ``openai-processing-ms``,
``openai-version``, the client's ``openai-organization``, and ``openai-model``, the id of the model
that answers. ``x-pellucid-ignored`` lists the request's fields without effect, and
``x-pellucid-not-assessed`` the categories of which a moderation says nothing. An unhandled
exception becomes a 500 error with these headers, which a handler outside this middleware could not
add. The traceback goes only to the log, with the request's id.
"""

import logging
from collections.abc import Callable
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api import logs
from serve.api.errors import server_error
from serve.api.request_context import RequestContext
from serve.api.unused_fields import HEADER, header_value

log = logging.getLogger(__name__)

API_VERSION = "2020-10-01"
NOT_ASSESSED = "x-pellucid-not-assessed"


class ResponseHeaders:
    """Pure ASGI middleware that adds OpenAI's headers, such as x-request-id, to each response.

    It passes the body on in chunks as they arrive. An unhandled exception becomes a 500 if the
    response has not started.

    Args:
        app: The next application.
        timeout: Longest time to compute a response, in seconds; None for no limit.
        on_start: Called when a request arrives.
        on_end: Called with scope and status when the response is complete or the client has
            disconnected. The status is 499 if the client disconnected before the response began.
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
        """Handle a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        context = RequestContext(timeout=self.timeout)
        scope.setdefault("state", {})["context"] = context
        request_headers = Headers(scope=scope)
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = context.id
                headers["openai-processing-ms"] = str(round(context.seconds * 1000))
                headers["openai-version"] = API_VERSION
                if context.model:
                    headers["openai-model"] = quote(context.model, safe="/:@+ ")
                if context.unused_fields:
                    headers[HEADER] = header_value(context.unused_fields)
                if context.not_assessed:
                    headers[NOT_ASSESSED] = ", ".join(context.not_assessed)
                if organization := request_headers.get("openai-organization"):
                    headers["openai-organization"] = organization
            await send(message)

        self.on_start()
        with logs.bind_request_id(context.id):
            try:
                await self.app(scope, receive, send_with_headers)
            except Exception:
                log.exception(
                    "%s %s failed (client's request id: %r)",
                    scope["method"],
                    scope["path"],
                    request_headers.get("x-client-request-id")
                    or request_headers.get("x-request-id"),
                )
                if status:
                    raise  # uvicorn then closes the connection, so the client sees the truncation
                await server_error().response()(scope, receive, send_with_headers)
            finally:
                self.on_end(scope, status or 499)
