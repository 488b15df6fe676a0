"""GET / and /docs: the page to chat and to look at tokens, and the one that describes the API.

Plain files, served as they are: no build step, and a policy that lets the browser load nothing from
anywhere else and run no script but these. They are in the folder `serve/web`; the ones of Swagger
UI, which shows /openapi.json, come with the package fastapi-offline. What the pages can do, they do
through the API.
"""

import mimetypes
from pathlib import Path

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parents[2] / "web"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # ask whether it has changed: it does when Pellucid is updated
}
# Swagger UI sets styles, and shows icons that are written in them.
_SWAGGER_POLICY = POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'").replace(
    "img-src 'self'", "img-src 'self' data:"
)
_WEB_FILES = StaticFiles(directory=FOLDER)
_SWAGGER_FILES = StaticFiles(packages=[("fastapi_offline", "static")])
mimetypes.add_type("text/javascript", ".js")  # some systems have another


@router.get("/")
async def page(request: Request) -> Response:
    return await _file(_WEB_FILES, "index.html", request)


@router.get("/docs")
async def docs(request: Request) -> Response:
    return await _file(
        _WEB_FILES, "docs.html", request, {"content-security-policy": _SWAGGER_POLICY}
    )


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    return JSONResponse(request.app.openapi())


@router.get("/web/{name}")
async def file(request: Request, name: str) -> Response:
    if name.endswith(".html"):
        raise HTTPException(404)  # a page has one address, and its own policy there
    return await _file(_WEB_FILES, name, request)


@router.get("/docs/{name}")
async def swagger(request: Request, name: str) -> Response:
    return await _file(_SWAGGER_FILES, name, request)


async def _file(
    files: StaticFiles, name: str, request: Request, headers: dict[str, str] | None = None
) -> Response:
    """A file; or 304, if the browser has it as it is."""
    response = await files.get_response(name, request.scope)
    response.headers.update(HEADERS | (headers or {}))
    return response
