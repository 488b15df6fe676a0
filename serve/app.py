"""The whole server: layers, routes and errors, put together.

A request passes the layers from the top down, an answer from the bottom up. Their order matters:
ids, headers and counting on everything, then who may talk to us at all, then keys, then how often,
then how much.
"""

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from serve import errors, logs
from serve.api import chat, completions, edits, engines, models, tokens
from serve.headers import ResponseHeaders
from serve.keys import KeyRing
from serve.limits import Admission, RequestRate
from serve.metrics import Metrics
from serve.registry import Registry
from serve.security import ApiKeys, BodyLimit, HostAndOrigin
from serve.settings import Settings


def create_app(settings: Settings, registry: Registry) -> FastAPI:
    """Builds the ASGI application.

    Set ``app.state.is_draining`` to have it finish what it has and take nothing new.

    Args:
        settings: who may use it, and how.
        registry: the models it serves. Closing their engines is left to who made them.
    """
    metrics = Metrics(registry)

    def ended(scope: Scope, status: int) -> None:
        metrics.ended(scope, status)
        logs.request(scope, status)

    rate = RequestRate(settings.requests_per_minute) if settings.requests_per_minute else None
    app = FastAPI(
        title="Pellucid",
        # Requests are read by `schemas.read_json`, of which FastAPI's generated pages know nothing.
        openapi_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(
                ResponseHeaders,
                timeout=settings.answer_timeout,
                begun=metrics.begun,
                ended=ended,
            ),
            Middleware(
                HostAndOrigin, hosts=settings.allowed_hosts, origins=settings.allowed_origins
            ),
            Middleware(
                CORSMiddleware,
                allow_origins=settings.allowed_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "openai-processing-ms"],
            ),
            Middleware(ApiKeys, keys=KeyRing(settings.api_keys, settings.home)),
            Middleware(Admission, rate=rate, is_draining=lambda: app.state.is_draining),
            Middleware(BodyLimit, limit=settings.max_body_bytes),
        ],
    )
    app.state.registry, app.state.is_draining = registry, False
    errors.install(app)
    for path in ("/health", "/v1/health"):
        app.add_api_route(path, health, methods=["GET", "HEAD"])
    app.add_api_route("/ready", ready, methods=["GET", "HEAD"])
    app.add_api_route("/metrics", metrics.page, methods=["GET"])
    # Paths with an engine's name in them match greedily: the longer ones first, the bare one last.
    for route in (models, chat, completions, edits, engines, tokens):
        app.include_router(route.router)
    return app


async def health() -> dict[str, str]:
    """Says that the server answers."""
    return {"status": "ok"}


async def ready(request: Request) -> Response:
    """Says whether the server takes new work: 200, or 503 while it is being stopped."""
    if request.app.state.is_draining:
        return JSONResponse({"status": "draining"}, 503, headers={"retry-after": "5"})
    return JSONResponse({"status": "ready"})
