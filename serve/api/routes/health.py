"""GET /health, /ready and /version: what supervisors and load balancers ask."""

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve.api.openapi import route_docs
from serve.api.responses import Status, Version
from serve.api.state import state_of

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.head("/v1/health", include_in_schema=False)
@router.get("/v1/health", include_in_schema=False)
@router.get("/health", **route_docs(Status))
async def health(request: Request) -> Response:
    """Say whether the server can answer: 503 if the thread that computes has ended."""
    if not state_of(request).registry.is_alive:
        return JSONResponse({"status": "the device thread has ended"}, 503)
    return JSONResponse({"status": "ok"})


@router.head("/ready", include_in_schema=False)
@router.get("/ready", **route_docs(Status))
async def ready(request: Request) -> Response:
    """Say whether the server takes new work: 200, or 503 while it is being stopped."""
    if state_of(request).is_draining:
        return JSONResponse({"status": "draining"}, 503, headers={"retry-after": "5"})
    return JSONResponse({"status": "ready"})


@router.get("/version", **route_docs(Version))
async def get_version() -> dict[str, str]:
    """Say which version of Pellucid this is."""
    try:
        return {"version": version("pellucid")}
    except PackageNotFoundError:
        return {"version": "run from its folder"}
