"""GET /v1/engines: the models, as they were called before 2022.

Clients of 2023 still call ``/v1/engines/ID/completions`` when they are given ``engine=`` instead of
``model=``; each generation route answers under that path too, see `requests.read_json`.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from serve.api.openapi import described
from serve.api.responses import EngineReply, Engines
from serve.api.state import state_of
from serve.models.spec import LoadedModel, ModelSpec

router = APIRouter(prefix="/v1")


def _engine(model: LoadedModel | ModelSpec) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "engine",
        "created": model.created,
        "owner": model.owned_by,
        "permissions": None,
        "ready": True,
    }


@router.get("/engines", **described(Engines))
async def list_engines(request: Request) -> dict[str, Any]:
    """List the models (as of 2021)."""
    return {
        "object": "list",
        "data": [_engine(model) for model in state_of(request).registry.list()],
    }


@router.get("/engines/{engine:path}", **described(EngineReply))
async def get_engine(request: Request, engine: str) -> dict[str, Any]:
    """Look up a model (as of 2021)."""
    return _engine(state_of(request).registry.resolve(engine))
