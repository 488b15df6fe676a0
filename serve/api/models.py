"""GET /v1/models: what is served here.

An alias ("gpt-4") can be asked for by name and answers with the model it stands for; the list holds
models only.
"""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from serve.engine import ServedModel
from serve.registry import Registry

router = APIRouter(prefix="/v1")


def registry_of(request: Request) -> Registry:
    """The models of the application that serves ``request``."""
    return request.app.state.registry


def card(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": model.owned_by,
    }


@router.head("/models")
@router.get("/models")
async def list_models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [card(model) for model in registry_of(request).list()]}


@router.head("/models/{model_id:path}")
@router.get("/models/{model_id:path}")  # ids may hold slashes
async def get_model(request: Request, model_id: str) -> dict[str, Any]:
    return card(registry_of(request).resolve(model_id))
