"""GET / and /docs: the page for chat and tokens, and the documentation of the API.

The pages are static files in `serve/web` without a build step. Their Content-Security-Policy allows
only scripts and resources of this server. Swagger UI, which shows /openapi.json, comes with the
package fastapi-offline. The pages use only the public API.
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
    "cache-control": "no-cache",  # revalidate: files change when Pellucid is updated
}
# Swagger UI sets inline styles and shows icons from data: URLs.
_SWAGGER_POLICY = POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'").replace(
    "img-src 'self'", "img-src 'self' data:"
)
_WEB_FILES = StaticFiles(directory=FOLDER)
_SWAGGER_FILES = StaticFiles(packages=[("fastapi_offline", "static")])
mimetypes.add_type("text/javascript", ".js")  # some systems register another type


@router.get("/")
async def page(request: Request) -> Response:
    """Serve the web page, on which users chat and look at tokens."""
    return await _file(_WEB_FILES, "index.html", request)


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Serve the documentation of the API."""
    return await _file(
        _WEB_FILES, "docs.html", request, {"content-security-policy": _SWAGGER_POLICY}
    )


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """Serve the OpenAPI description."""
    return JSONResponse(request.app.openapi())


@router.get("/web/{name}")
async def file(request: Request, name: str) -> Response:
    """Serve a script, style sheet or icon of the pages."""
    if name.endswith(".html"):
        raise HTTPException(404)  # each page has its own route, which sets its security policy
    return await _file(_WEB_FILES, name, request)


@router.get("/docs/{name}")
async def swagger(request: Request, name: str) -> Response:
    """Serve a file of Swagger UI."""
    return await _file(_SWAGGER_FILES, name, request)


async def _file(
    files: StaticFiles, name: str, request: Request, headers: dict[str, str] | None = None
) -> Response:
    """Return a file, or 304 if the browser's copy is current."""
    response = await files.get_response(name, request.scope)
    response.headers.update(HEADERS | (headers or {}))
    return response
