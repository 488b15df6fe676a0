"""GET /docs and /openapi.json: the description of this API, to read and to try out.

The page is Swagger UI, from the files that the package fastapi-offline brings: nothing is fetched
from anywhere else, and a policy says so to the browser. It is started by a script of ours, because
the policy allows none inside the page.
"""

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response

from serve.api.openapi import schema

router = APIRouter(include_in_schema=False)

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Pellucid: the API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger-ui.css">
<div id="api"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</html>
"""
START = """SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#api",
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  validatorUrl: null,
});
"""


@router.get("/openapi.json")
async def openapi(request: Request) -> dict[str, Any]:
    return _schema(request.app)


@router.get("/docs")
async def docs() -> Response:
    return HTMLResponse(PAGE, headers={"content-security-policy": POLICY})


@router.get("/docs/start.js")
async def start() -> Response:
    return Response(START, media_type="text/javascript", headers=_ASSET)


@router.get("/docs/swagger-ui.css")
async def style() -> Response:
    return FileResponse(_folder() / "swagger-ui.css", media_type="text/css", headers=_ASSET)


@router.get("/docs/swagger-ui-bundle.js")
async def script() -> Response:
    path = _folder() / "swagger-ui-bundle.js"
    return FileResponse(path, media_type="text/javascript", headers=_ASSET)


_ASSET = {"x-content-type-options": "nosniff", "cache-control": "max-age=3600"}
_schema = functools.lru_cache(maxsize=4)(schema)


@functools.cache
def _folder() -> Path:
    """Where fastapi-offline keeps its files; the package itself is not run."""
    found = find_spec("fastapi_offline")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("the package fastapi-offline is missing: pip install 'pellucid[serve]'")
    return Path(found.submodule_search_locations[0]) / "static"
