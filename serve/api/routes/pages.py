"""GET /: the page to chat and to look at tokens, from the folder `serve/web`.

Plain files, served as they are: no build step, and a policy that lets the browser load nothing from
anywhere else and run no script but these. What the page can do, it does through the API.
"""

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

from serve.api.errors import APIError

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parents[2] / "web"
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # ask whether it has changed: it does when Pellucid is updated
}
FILES = {path.name: path for path in FOLDER.iterdir() if path.suffix in TYPES}


@router.get("/")
async def page() -> Response:
    return FileResponse(FOLDER / "index.html", media_type="text/html", headers=HEADERS)


@router.get("/web/{name}")
async def file(name: str) -> Response:
    path = FILES.get(name)
    if path is None:
        raise APIError(404, f"Invalid URL (GET /web/{name[:80]})", code="unknown_url")
    return FileResponse(path, media_type=TYPES[path.suffix], headers=HEADERS)
