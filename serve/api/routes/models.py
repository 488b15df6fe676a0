"""GET and DELETE /v1/models: list, look up and delete models.

An alias ("gpt-4") can be looked up and returns the model that it refers to; the list contains
models only. Only fine-tuned models can be deleted.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from serve.api.errors import APIError
from serve.api.openapi import route_docs
from serve.api.responses import Deleted, Model, Models
from serve.api.state import state_of
from serve.exceptions import UnknownModel
from serve.models import adapters, generation_config
from serve.models.catalogue import SERVES
from serve.models.spec import LoadedModel, ModelSpec

router = APIRouter(prefix="/v1")


def model_to_api(model: LoadedModel | ModelSpec, spec: ModelSpec | None = None) -> dict[str, Any]:
    """Return a model in OpenAI's shape, with extensions.

    Args:
        model: The model, loaded or not.
        spec: The spec that a loaded model was loaded from; None if there is none.
    """
    spec = model if isinstance(model, ModelSpec) else spec
    is_loaded = not isinstance(model, ModelSpec)
    context = spec.context if spec else None
    window = model.context if is_loaded else context
    defaults = getattr(model, "default_sampling", {})
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": model.owned_by,
        # Extensions. As in other servers, `context_length` is the length that the model was trained
        # for, and `max_model_len` the maximum that this server accepts.
        "kind": model.kind,
        "sampling": generation_config.resolve_params({}, defaults)
        if model.kind == "decoder"
        else None,
        "context_length": context if context is not None else window,
        "max_model_len": window,
        "dtype": model.dtype if is_loaded else None,
        "tools": getattr(model, "tools", None),
        "evaluation": spec.evaluation if spec else None,
        "capabilities": list((spec and spec.capabilities) or SERVES.get(model.kind, ())),
    }


@router.head("/models", include_in_schema=False)
@router.get("/models", **route_docs(Models))
async def list_models(request: Request) -> dict[str, Any]:
    """List the models."""
    registry = state_of(request).registry
    return {
        "object": "list",
        "data": [model_to_api(model, registry.spec(model.id)) for model in registry.list_models()],
    }


@router.head("/models/{model_id:path}", include_in_schema=False)
@router.get("/models/{model_id:path}", **route_docs(Model))  # an id can contain slashes
async def get_model(request: Request, model_id: str) -> dict[str, Any]:
    """Return the model with this id or alias."""
    registry = state_of(request).registry
    return model_to_api(registry.resolve(model_id), registry.spec(model_id))


@router.delete("/models/{model_id:path}", **route_docs(Deleted))
async def delete_model(request: Request, model_id: str) -> dict[str, Any]:
    """Delete a fine-tuned model, with its checkpoints."""
    state = state_of(request)
    registry, home = state.registry, state.home
    if registry.resolve(model_id).id != model_id:
        raise UnknownModel(model_id)  # an alias cannot be deleted
    if not adapters.exists(home, model_id):
        raise APIError(
            403,
            f"The model `{model_id}` cannot be deleted: only models that were fine-tuned on this "
            "server can.",
            param="model",
            code="not_deletable",
        )
    if len(registry.list_models()) == 1:
        raise APIError(
            400,
            f"The model `{model_id}` cannot be deleted: it is the only model of this server, and a "
            "server needs at least one.",
            param="model",
            code="invalid_value",
        )
    # The files first: a model whose files remain would return at the next start.
    for id in await asyncio.to_thread(state_of(request).jobs.delete_model, model_id):
        with suppress(UnknownModel):  # the registry may have removed it already
            registry.remove(id)
    return {"id": model_id, "object": "model", "deleted": True}
