"""GET and DELETE /v1/models: what is served here.

An alias ("gpt-4") can be asked for by name and answers with the model it stands for; the list holds
models only. What the user made can be deleted; other models belong to whoever runs the server.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from serve.api.errors import APIError
from serve.api.openapi import described
from serve.api.responses import Deleted, Model, Models
from serve.exceptions import UnknownModel
from serve.models import adapters, sampling
from serve.models.decoder import ServedModel
from serve.models.encoder import EmbeddingModel
from serve.models.images import DrawingModel
from serve.models.registry import AnyModel, Offer, Registry
from serve.models.speech import SpeechModel

router = APIRouter(prefix="/v1")


def registry_of(request: Request) -> Registry:
    """The models of the application that serves ``request``."""
    return request.app.state.registry


async def generator_of(request: Request, name: str) -> ServedModel:
    """The model called ``name``, loaded, which must be one that generates text."""
    model = await _of_kind(request, name, "decoder", "does not generate text")
    assert isinstance(model, ServedModel)
    return model


async def embedder_of(request: Request, name: str) -> EmbeddingModel:
    """The model called ``name``, loaded, which must be one that makes embeddings."""
    model = await _of_kind(request, name, "encoder", "does not make embeddings")
    assert isinstance(model, EmbeddingModel)
    return model


async def listener_of(request: Request, name: str) -> SpeechModel:
    """The model called ``name``, loaded, which must be one that writes down speech."""
    model = await _of_kind(request, name, "speech", "does not write down speech")
    assert isinstance(model, SpeechModel)
    return model


async def painter_of(request: Request, name: str | None) -> DrawingModel:
    """The model called ``name``, or the first that draws, loaded, which must be one that does."""
    if name is None:
        drawing = (card.id for card in registry_of(request).list() if card.kind == "images")
        name = next(drawing, "dall-e-2")  # of which the error says what it is and where to get it
    model = await _of_kind(request, name, "images", "does not draw pictures")
    assert isinstance(model, DrawingModel)
    return model


async def _of_kind(request: Request, name: str, kind: str, otherwise: str) -> AnyModel:
    registry = registry_of(request)
    if (found := registry.resolve(name)).kind != kind:  # before it is loaded for nothing
        fitting = [other.id for other in registry.list() if other.kind == kind]
        what = f"`{fitting[0]}` does." if fitting else "No model here does."
        raise APIError(
            404,
            f"The model `{found.id}` {otherwise}. {what}",
            param="model",
            code="model_not_found",
        )
    return await registry.get(name)


def card(model: AnyModel | Offer) -> dict[str, Any]:
    defaults = getattr(model, "sampling", {})
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": model.owned_by,
        # Ours: what a model is for, and how it samples where a request does not say.
        "kind": model.kind,
        "sampling": sampling.resolve({}, defaults) if model.kind == "decoder" else None,
    }


@router.head("/models", include_in_schema=False)
@router.get("/models", **described(Models))
async def list_models(request: Request) -> dict[str, Any]:
    """List the models."""
    return {"object": "list", "data": [card(model) for model in registry_of(request).list()]}


@router.head("/models/{model_id:path}", include_in_schema=False)
@router.get("/models/{model_id:path}", **described(Model))  # ids may hold slashes
async def get_model(request: Request, model_id: str) -> dict[str, Any]:
    """Look up a model by its id or an alias."""
    return card(registry_of(request).resolve(model_id))


@router.delete("/models/{model_id:path}", **described(Deleted))
async def delete_model(request: Request, model_id: str) -> dict[str, Any]:
    """Delete a model that the user made, with its checkpoints."""
    registry, home = registry_of(request), request.app.state.home
    if registry.resolve(model_id).id != model_id:
        raise UnknownModel(model_id)  # an alias is no model of its own
    if not adapters.exists(home, model_id):
        raise APIError(
            403,
            f"The model `{model_id}` was not made here, so it cannot be deleted: only fine-tuned "
            "models can.",
            param="model",
            code="not_deletable",
        )
    if len(registry.list()) == 1:
        raise APIError(
            400,
            f"The model `{model_id}` is the only one here, and a server needs one.",
            param="model",
            code="invalid_value",
        )
    # The files first: a model whose files stayed would be back at the next start.
    for id in await asyncio.to_thread(request.app.state.jobs.delete_model, model_id):
        with suppress(UnknownModel):  # the registry may have noticed by itself
            registry.remove(id)
    return {"id": model_id, "object": "model", "deleted": True}
