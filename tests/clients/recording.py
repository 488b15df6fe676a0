"""A proxy that records what a client sends, and what the server answers."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from tests.serve.scripted import serve_app


@dataclass
class Exchange:
    """A request and its response.

    Attributes:
        path: The path of the request.
        sent: The body of the request.
        status: The status of the response.
        ignored: The fields of the request that had no effect, as the server says.
        received: The body of the response.
    """

    path: str
    sent: bytes
    status: int
    ignored: str
    received: bytes = b""

    @property
    def fields(self) -> dict[str, Any]:
        """The JSON object in the body of the request; empty without one."""
        return json.loads(self.sent) if self.sent else {}

    @property
    def error_code(self) -> str | None:
        """The code of the error that the response reports; None without an error."""
        return json.loads(self.received)["error"]["code"] if self.status >= 400 else None


@contextmanager
def recording(url: str, exchanges: list[Exchange]) -> Iterator[str]:
    """Run a proxy for a server on a thread and a free port; yield its URL.

    Args:
        url: The address of the server.
        exchanges: The list to which the proxy appends.
    """
    app = FastAPI(openapi_url=None)

    @app.api_route("/{path:path}", methods=["GET", "POST", "DELETE"])
    async def forward(request: Request) -> StreamingResponse:
        # One client a request: the loop of the server's thread is not there when the app is made.
        client = httpx.AsyncClient(base_url=url, timeout=None, trust_env=False)
        sent = await request.body()
        headers = [(k, v) for k, v in request.headers.raw if k not in (b"host", b"accept-encoding")]
        path = request.url.path
        upstream = client.build_request(
            request.method,
            path,
            params=request.query_params,
            headers=[*headers, (b"accept-encoding", b"identity")],
            content=sent,
        )
        response = await client.send(upstream, stream=True)
        ignored = response.headers.get("x-pellucid-ignored", "")
        exchange = Exchange(path, sent, response.status_code, ignored)
        exchanges.append(exchange)

        async def body() -> AsyncIterator[bytes]:
            try:
                async for chunk in response.aiter_raw():
                    exchange.received += chunk
                    yield chunk
            finally:  # the client went away, or the response has ended
                await response.aclose()
                await client.aclose()

        return StreamingResponse(body(), response.status_code, dict(response.headers))

    with serve_app(app) as address:
        yield address
