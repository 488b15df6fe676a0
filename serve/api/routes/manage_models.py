"""Routes under /pellucid/v1/models: list the state of models; load, unload and pull models.

OpenAI has no such routes. The paths and fields are those of llama.cpp's router and of LM Studio
(`load` and `unload` with ``model``), the events of a pull those of Ollama (``status``,
``completed``, ``total``). A pull downloads from other servers and fills the disk, so it needs
`--allow-pull`. It accepts names of the catalogue and of the hub, but no paths and no URLs.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve import settings
from serve.api.errors import APIError
from serve.api.openapi import route_docs
from serve.api.requests import Body, read_json
from serve.api.responses import ManagedModel, ManagedModels, PullProgress
from serve.api.sse import Events, cancel_on_disconnect, event_stream
from serve.api.state import ServerState, state_of
from serve.exceptions import (
    Corrupt,
    DoesNotFit,
    Failure,
    Forbidden,
    NotFound,
    RateLimited,
    UnknownModel,
    Unreachable,
    Unusable,
    WrongUsage,
)
from serve.models import catalogue, download, hub

router = APIRouter(prefix="/pellucid/v1/models")

_UNKNOWN = "`model_not_found`"
PROGRESS_SECONDS = 0.2  # between two progress events of a pull
# Status and code of the response to each failure. A class precedes its base class.
_ERRORS: dict[type[Failure], tuple[int, str]] = {
    WrongUsage: (400, "invalid_value"),
    Unusable: (400, "invalid_value"),
    NotFound: (404, "model_not_found"),
    Forbidden: (403, "model_gated"),
    RateLimited: (503, "source_rate_limited"),
    Unreachable: (502, "source_unreachable"),
    Corrupt: (502, "wrong_checksum"),
    DoesNotFit: (507, "does_not_fit"),
    Failure: (500, "pull_failed"),
}


class ModelBody(Body):
    """Body of POST /pellucid/v1/models/load and /unload."""

    model: str = Field(
        min_length=1,
        description="An id or alias; to pull, an id of the catalogue or hf:OWNER/REPO.",
    )


class PullBody(ModelBody):
    """Body of POST /pellucid/v1/models/pull."""

    stream: bool = Field(True, description="Whether to send events of the progress.")


async def status_to_api(state: ServerState, id: str) -> dict[str, Any]:
    """Return the state of a model; the memory of a model that is not loaded is an estimate."""
    status = state.registry.status(id)
    memory, spec = status.memory, state.registry.spec(id)
    if memory is None and spec is not None:
        # The estimate needs the hash of the files, which takes seconds the first time.
        memory = await asyncio.to_thread(spec.memory)
    return {
        "id": status.id,
        "object": "model.status",
        "kind": status.kind,
        "state": status.state,
        "memory": memory,
        "loaded_at": None if status.loaded_at is None else int(status.loaded_at),
        "requests": status.requests,
        "busy": not status.is_idle,
    }


@router.get("", **route_docs(ManagedModels))
async def list_states(request: Request) -> dict[str, Any]:
    """List the models with their state."""
    state = state_of(request)
    models = state.registry.list_models()
    return {"object": "list", "data": [await status_to_api(state, model.id) for model in models]}


@router.post(
    "/load",
    **route_docs(
        ManagedModel,
        ModelBody,
        errors={
            404: _UNKNOWN,
            503: "`model_not_ready`: memory does not suffice, or a file is damaged.",
        },
    ),
)
async def load(request: Request) -> dict[str, Any]:
    """Load a model into memory; others are unloaded if memory is short."""
    body, state = await read_json(request, ModelBody), state_of(request)
    model = await state.registry.load_soon(body.model)
    return await status_to_api(state, model.id)


@router.post(
    "/unload",
    **route_docs(
        ManagedModel,
        ModelBody,
        errors={404: _UNKNOWN, 409: "`model_busy`: it answers a request, or others need it."},
    ),
)
async def unload(request: Request) -> dict[str, Any]:
    """Unload a model from memory. The next request for it loads it again."""
    body, state = await read_json(request, ModelBody), state_of(request)
    if not await state.registry.unload_soon(body.model):
        raise APIError(
            409,
            f"The model `{body.model}` cannot be unloaded: it is processing a request, or a loaded "
            "fine-tuned model shares its weights. Try again later.",
            param="model",
            code="model_busy",
        )
    return await status_to_api(state, body.model)


@router.post(
    "/pull",
    **route_docs(
        ManagedModel,
        PullBody,
        events=PullProgress,
        errors={
            400: "`invalid_value`: no name of the hub, or a repository of pickles only.",
            403: "`pull_not_allowed`: the server runs without --allow-pull; `model_gated`.",
            404: _UNKNOWN,
            409: "`pull_in_progress`: one model is pulled at a time.",
            500: "`model_not_usable`: it was pulled, but its files are damaged or unsupported.",
            502: "`source_unreachable`, `wrong_checksum`.",
            503: "`source_rate_limited`: the hub asks to wait.",
            507: "`does_not_fit`: memory or disk does not suffice.",
        },
    ),
)
async def pull(request: Request) -> Response:
    """Pull a model of the catalogue or of the hub. When the client disconnects, the pull stops."""
    body, state = await read_json(request, PullBody), state_of(request)
    if not state.allow_pull:
        raise APIError(
            403,
            "This server does not pull models. Start it with --allow-pull, or run `pellucid pull`.",
            code="pull_not_allowed",
        )
    known_models = catalogue.load(settings.config_folder())
    if not body.model.startswith(hub.PREFIX) and known_models.get(body.model) is None:
        raise APIError(
            404,
            f"No model of the catalogue is called `{body.model[:80]}`. Use an id of `pellucid "
            f"models`, or {hub.FORM}.",
            param="model",
            code="model_not_found",
        )
    events = _pull_events(state, body.model, known_models)
    if body.stream:
        return await event_stream(request, events)

    async def last_event() -> dict[str, Any]:
        last: dict[str, Any] = {}
        async for event in events:
            last = event or last
        return last["model"]

    return JSONResponse(await cancel_on_disconnect(request.receive, last_event()))


async def _pull_events(state: ServerState, name: str, known_models: catalogue.Catalogue) -> Events:
    """Pull a model on a thread, and yield its progress. Closing the generator stops the thread."""
    if state.is_pulling:
        raise APIError(
            409, "Another model is being pulled. Try again later.", code="pull_in_progress"
        )
    state.is_pulling = True
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None]()
    stop, last = threading.Event(), 0.0

    def put(event: dict[str, Any] | None) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, event)

    def progress(done: int, total: int) -> None:
        nonlocal last
        if stop.is_set():
            raise _Stopped
        if (now := time.monotonic()) - last > PROGRESS_SECONDS or done == total:
            last = now
            put({"status": f"pulling {name}", "completed": done, "total": total})

    def notify(line: str) -> None:
        put({"status": line})

    def work() -> str:
        try:
            if name.startswith(hub.PREFIX):
                return hub.pull(name, state.home, notify=notify, progress=progress).id
            entry = known_models.get(name)
            assert entry is not None
            download.pull(entry, state.home, notify=notify, progress=progress)
            return entry.id
        except _Stopped:
            return ""
        finally:
            state.is_pulling = False
            put(None)

    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        while (event := await queue.get()) is not None:
            yield event
        id = await task
        await state.registry.refresh()
        yield {"status": "success", "model": await status_to_api(state, id)}
    except UnknownModel:
        raise APIError(
            500,
            f"{name} was pulled, but cannot be used. `pellucid models check` shows the reason.",
            type="server_error",
            param="model",
            code="model_not_usable",
            headers={"x-should-retry": "false"},
        ) from None
    except Failure as error:
        status, code = next(row for kind, row in _ERRORS.items() if isinstance(error, kind))
        raise APIError(
            status,
            str(error),
            type="server_error" if status >= 500 else "invalid_request_error",
            param="model",
            code=code,
            headers={"x-should-retry": "false"},
        ) from None
    finally:
        stop.set()
        task.add_done_callback(lambda task: task.cancelled() or task.exception())


class _Stopped(Exception):
    """Raised on the thread of a pull when the client has disconnected."""
