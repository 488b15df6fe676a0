"""The whole server: layers, routes and errors, put together.

A request passes the layers from the top down, an answer from the bottom up. Their order matters:
ids, headers and counting on everything, then who may talk to us at all, then keys, then how often,
then how much.
"""

import functools
from typing import cast

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Scope

from serve.api import errors, logs
from serve.api.auth import KeyRing
from serve.api.body_limit import BodyLimit
from serve.api.headers import ResponseHeaders
from serve.api.metrics import Metrics
from serve.api.middleware import ApiKeys, HostAndOrigin
from serve.api.openapi import openapi_schema, route_docs
from serve.api.rate_limit import RATE_HEADERS, Admission, RateLimiter
from serve.api.routes import (
    audio,
    chat,
    completions,
    embeddings,
    files,
    fine_tuning,
    health,
    images,
    models,
    pages,
    tokens,
)
from serve.api.routes.legacy import edits, engines, fine_tunes
from serve.api.settings import ServerSettings
from serve.api.state import ServerState
from serve.api.temp_files import TempFiles
from serve.jobs.jobs import JobStore
from serve.jobs.runner import JobRunner
from serve.jobs.store import Store
from serve.models.registry import Registry


def create_app(settings: ServerSettings, registry: Registry) -> FastAPI:
    """Builds the ASGI application.

    Set ``app.state.is_draining`` to have it finish what it has and take nothing new; at the end,
    close ``app.state.keeper``, which stops fine-tuning.

    Args:
        settings: who may use it, and how.
        registry: the models it serves. Closing their engines is left to who made them.
    """
    metrics = Metrics(registry)

    def ended(scope: Scope, status: int) -> None:
        metrics.request_ended(scope, status)
        logs.log_request(scope, status)

    rate = RateLimiter(settings.requests_per_minute) if settings.requests_per_minute else None
    app = FastAPI(
        title="Pellucid",
        description="The model stack behind the OpenAI API, from scratch, on this machine.",
        openapi_url=None,  # `routes/pages.py` has its own
        redirect_slashes=False,
        middleware=[
            Middleware(
                ResponseHeaders,
                timeout=settings.answer_timeout,
                on_start=metrics.request_started,
                on_end=ended,
            ),
            Middleware(
                HostAndOrigin, hosts=settings.allowed_hosts, origins=settings.allowed_origins
            ),
            Middleware(
                CORSMiddleware,
                allow_origins=settings.allowed_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "openai-processing-ms", *RATE_HEADERS],
            ),
            Middleware(ApiKeys, keys=KeyRing(settings.api_keys, settings.home)),
            Middleware(Admission, limiter=rate, is_draining=lambda: state.is_draining),
            Middleware(
                BodyLimit,
                limit=settings.max_body_bytes,
                path_limits=audio.BODY_LIMITS | files.BODY_LIMITS | images.BODY_LIMITS,
            ),
        ],
    )
    store = Store(settings.home)
    jobs = JobStore(store, settings.home)
    state = ServerState(
        registry=registry,
        home=settings.home,
        store=store,
        jobs=jobs,
        job_runner=JobRunner(jobs),
        temp_files=TempFiles(settings.home / "pictures"),
    )
    app.state = cast(State, state)
    files.drop_expired(store)
    state.job_runner.watch()  # jobs that were not over when the last server ended, here or there
    errors.install(app)
    app.add_api_route(
        "/metrics", metrics.page, methods=["GET"], summary="Numbers for Prometheus", **route_docs()
    )
    # Paths with an engine's name in them match greedily: the longer ones first, the bare one last.
    routes = (health, models, chat, completions, edits, embeddings, audio, images)
    routes += (files, fine_tuning, fine_tunes)
    routes += (engines, tokens, pages)
    for route in routes:
        app.include_router(route.router)
    app.openapi = functools.cache(lambda: openapi_schema(app))
    return app
