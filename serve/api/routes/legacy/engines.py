"""GET /v1/engines: the models, which OpenAI's API called engines before 2022.

Clients of 2023 call ``/v1/engines/ID/completions`` when they get ``engine=`` instead of ``model=``.
Each generation route accepts that path too; see `requests.read_json`.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from serve.api.openapi import route_docs
from serve.api.responses import EngineReply, Engines
from serve.api.state import state_of
from serve.models.spec import LoadedModel, ModelSpec

router = APIRouter(prefix="/v1")


def _engine_to_api(model: LoadedModel | ModelSpec) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "engine",
        "created": model.created,
        "owner": model.owned_by,
        "permissions": None,
        "ready": True,
    }


@router.get("/engines", **route_docs(Engines))
async def list_engines(request: Request) -> dict[str, Any]:
    """List the models (API of 2021)."""
    return {
        "object": "list",
        "data": [_engine_to_api(model) for model in state_of(request).registry.list_models()],
    }


@router.get("/engines/{engine:path}", **route_docs(EngineReply))
async def get_engine(request: Request, engine: str) -> dict[str, Any]:
    """Return a model (API of 2021)."""
    return _engine_to_api(state_of(request).registry.resolve(engine))
