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
from serve.models.spec import LoadedModel, ModelSpec

router = APIRouter(prefix="/v1")


def model_to_api(model: LoadedModel | ModelSpec) -> dict[str, Any]:
    """Return a model in OpenAI's shape, with its kind and sampling defaults as extensions."""
    defaults = getattr(model, "default_sampling", {})
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": model.owned_by,
        # Extensions: the kind of model, and its default sampling settings.
        "kind": model.kind,
        "sampling": generation_config.resolve_params({}, defaults)
        if model.kind == "decoder"
        else None,
    }


@router.head("/models", include_in_schema=False)
@router.get("/models", **route_docs(Models))
async def list_models(request: Request) -> dict[str, Any]:
    """List the models."""
    return {
        "object": "list",
        "data": [model_to_api(model) for model in state_of(request).registry.list_models()],
    }


@router.head("/models/{model_id:path}", include_in_schema=False)
@router.get("/models/{model_id:path}", **route_docs(Model))  # an id can contain slashes
async def get_model(request: Request, model_id: str) -> dict[str, Any]:
    """Return the model with an id or alias."""
    return model_to_api(state_of(request).registry.resolve(model_id))


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
