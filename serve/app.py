"""The whole server: layers, routes and errors, put together.

A request passes the layers from the top down, an answer from the bottom up. Their order matters:
ids and headers on everything, then who may talk to us at all, then keys, then how much.
"""

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from serve import errors
from serve.api import chat, completions, edits, engines, models, tokens
from serve.headers import ResponseHeaders
from serve.registry import Registry
from serve.security import OPEN_PATHS, ApiKeys, BodyLimit, HostAndOrigin
from serve.settings import Settings


def create_app(settings: Settings, registry: Registry) -> FastAPI:
    """Builds the ASGI application.

    Args:
        settings: who may use it, and how.
        registry: the models it serves. Closing their engines is left to who made them.
    """
    app = FastAPI(
        title="Pellucid",
        # Requests are read by `schemas.read_json`, of which FastAPI's generated pages know nothing.
        openapi_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(ResponseHeaders),
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
            Middleware(ApiKeys, keys=settings.api_keys),
            Middleware(BodyLimit, limit=settings.max_body_bytes),
        ],
    )
    app.state.registry = registry
    errors.install(app)
    for path in OPEN_PATHS:
        app.add_api_route(path, health, methods=["GET", "HEAD"])
    # Paths with an engine's name in them match greedily: the longer ones first, the bare one last.
    for route in (models, chat, completions, edits, engines):
        app.include_router(route.router, prefix="/v1")
    app.include_router(tokens.router)  # where harnesses look for it: not under /v1
    return app


async def health() -> dict[str, str]:
    """Says that the server answers."""
    return {"status": "ok"}
