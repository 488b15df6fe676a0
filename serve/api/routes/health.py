"""GET /health, /ready and /version, for supervisors and load balancers."""

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
    """Report whether the server can compute: 503 if the device thread has ended."""
    if not state_of(request).registry.is_alive:
        return JSONResponse({"status": "the device thread has ended"}, 503)
    return JSONResponse({"status": "ok"})


@router.head("/ready", include_in_schema=False)
@router.get("/ready", **route_docs(Status))
async def ready(request: Request) -> Response:
    """Report whether the server accepts requests: 200, or 503 during shutdown."""
    if state_of(request).is_draining:
        return JSONResponse({"status": "draining"}, 503, headers={"retry-after": "5"})
    return JSONResponse({"status": "ready"})


@router.get("/version", **route_docs(Version))
async def get_version() -> dict[str, str]:
    """Report the version of Pellucid."""
    try:
        return {"version": version("pellucid")}
    except PackageNotFoundError:
        return {"version": "run from its folder"}
