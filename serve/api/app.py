"""The ASGI application: middleware, routes and error handlers.

A request passes the middleware from the top down, a response from the bottom up. The order matters:
request ids, headers and metrics cover everything; then come the checks of host and origin, of the
key, of the request rate, and of the body size.
"""

import contextlib
import functools
from collections.abc import AsyncIterator
from typing import cast

from fastapi import Depends, FastAPI
from starlette.datastructures import State
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Scope

from serve.api import errors, logs, unused_fields
from serve.api.auth import KeyRing
from serve.api.batch_runner import BatchRunner
from serve.api.body_limit import BodyLimit
from serve.api.headers import NOT_ASSESSED, ResponseHeaders
from serve.api.metrics import Metrics
from serve.api.middleware import LOCAL_ORIGINS, ApiKeys, HostAndOrigin
from serve.api.openapi import openapi_schema, route_docs
from serve.api.rate_limit import RATE_HEADERS, Admission, RateLimiter
from serve.api.routes import (
    audio,
    batches,
    chat,
    completions,
    conversations,
    decisions,
    embeddings,
    files,
    fine_tuning,
    health,
    images,
    manage_models,
    models,
    moderations,
    pages,
    rerank,
    responses,
    stored_chat,
    tokens,
    uploads,
)
from serve.api.routes.legacy import edits, engines, fine_tunes
from serve.api.settings import ServerSettings
from serve.api.state import ServerState, refresh_models
from serve.api.stored_responses import ResponseStore
from serve.api.temp_files import TempFiles
from serve.jobs.batches import Batches
from serve.jobs.jobs import JobStore
from serve.jobs.runner import JobRunner
from serve.jobs.server_lock import ServerLock
from serve.jobs.store import Store
from serve.models.registry import Registry


def create_app(settings: ServerSettings, registry: Registry) -> FastAPI:
    """Return the ASGI application.

    Set ``app.state.is_draining`` to refuse new requests while the running ones finish. At shutdown,
    call ``app.state.job_runner.close()`` to stop fine-tuning, and then ``app.state.store.close()``.

    Args:
        settings: Keys, limits and the data folder.
        registry: The models to serve. The caller closes their engines.
    """
    store = Store(settings.home)
    server_lock = ServerLock(settings.home)
    batch_store = Batches(store, server_lock)
    metrics = Metrics(registry, batch_store)

    def on_end(scope: Scope, status: int) -> None:
        metrics.request_ended(scope, status)
        logs.log_request(scope, status)

    keys = KeyRing(settings.api_keys, settings.home)
    limiter = RateLimiter(settings.requests_per_minute) if settings.requests_per_minute else None

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.batch_runner.start()  # continues batches that an earlier server left unfinished
        yield
        await state.batch_runner.stop()
        server_lock.close()

    app = FastAPI(
        lifespan=lifespan,
        title="Pellucid",
        description="The model stack behind the OpenAI API, from scratch, on this machine.",
        openapi_url=None,  # `routes/pages.py` serves /openapi.json
        redirect_slashes=False,
        dependencies=[Depends(refresh_models)],
        middleware=[
            Middleware(
                ResponseHeaders,
                timeout=settings.answer_timeout,
                on_start=metrics.request_started,
                on_end=on_end,
            ),
            Middleware(
                HostAndOrigin,
                hosts=settings.allowed_hosts,
                origins=settings.allowed_origins,
                requires_key=keys.requires_key,
            ),
            Middleware(
                CORSMiddleware,
                allow_origins=settings.allowed_origins,
                allow_origin_regex=LOCAL_ORIGINS,  # those that `HostAndOrigin` lets in
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=[
                    *("x-request-id", "openai-processing-ms", "openai-model"),
                    *(unused_fields.HEADER, NOT_ASSESSED, *RATE_HEADERS),
                ],
            ),
            Middleware(ApiKeys, keys=keys),
            Middleware(Admission, limiter=limiter, is_draining=lambda: state.is_draining),
            Middleware(
                BodyLimit,
                limit=settings.max_body_bytes,
                path_limits={
                    **audio.BODY_LIMITS,
                    **files.BODY_LIMITS,
                    **images.BODY_LIMITS,
                    **uploads.BODY_LIMITS,
                },
            ),
        ],
    )
    jobs = JobStore(store, settings.home)
    state = ServerState(
        registry=registry,
        home=settings.home,
        store=store,
        responses=ResponseStore(
            store,
            server_lock,
            is_enabled=settings.store_responses,
            max_bytes=settings.max_stored_bytes,
            max_days=settings.max_stored_days,
        ),
        batches=batch_store,
        jobs=jobs,
        job_runner=JobRunner(jobs),
        temp_files=TempFiles(settings.home / "pictures"),
        allow_pull=settings.allow_pull,
        is_strict=settings.is_strict,
    )
    state.batch_runner = BatchRunner(app, state.batches, registry)
    app.state = cast(State, state)
    files.drop_expired(store)
    uploads.drop_expired(store)
    state.job_runner.watch()  # continues jobs that an earlier server left unfinished
    errors.install(app)
    app.add_api_route(
        "/metrics", metrics.page, methods=["GET"], summary="Prometheus metrics", **route_docs()
    )
    # Paths that contain an engine id match greedily, so longer paths are registered first.
    routes = (health, models, manage_models, chat, completions, edits, embeddings, rerank)
    routes += (moderations, stored_chat, responses, conversations, decisions, audio, images)
    routes += (files, uploads, batches, fine_tuning, fine_tunes)
    routes += (engines, tokens, pages)
    for route in routes:
        app.include_router(route.router)
    app.openapi = functools.cache(lambda: openapi_schema(app))
    return app
