"""/v1/files: upload, list, download and delete files, for example training data.

An upload is written to disk as it arrives and is listed when it is complete. Its content is neither
checked nor executed; a fine-tuning job reports errors in its training file. A download returns the
uploaded bytes, with a media type that depends only on the file's purpose.
"""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from serve.api.errors import APIError
from serve.api.multipart import File, read_form
from serve.api.openapi import route_docs
from serve.api.pagination import OrderedPageQuery, paginate, read_query
from serve.api.requests import Body
from serve.api.responses import FileDeleted, FileReply, Files
from serve.api.stored_files import find_file, is_alive, no_such_file, store_of
from serve.jobs.store import Store, file_record, new_id

router = APIRouter(prefix="/v1")

MAX_BYTES = 512 * 2**20
BODY_LIMITS = {"/v1/files": MAX_BYTES + 2**20}  # bytes of a body: the file and the rest of the form
PURPOSES = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]

_TYPES = {  # media type by purpose; else application/octet-stream
    "fine-tune": "application/jsonl",
    "batch": "application/jsonl",
    "batch_output": "application/jsonl",
    "fine-tune-results": "text/csv; charset=utf-8",
}


class ExpiresAfter(Body):
    """The lifetime of an uploaded file, in seconds after its creation."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class FileForm(Body):
    """Form of POST /v1/files."""

    file: File
    purpose: PURPOSES
    expires_after: ExpiresAfter | None = None


class FilesQuery(OrderedPageQuery):
    """Query parameters of the list of files."""

    purpose: str | None = None


@router.post("/files", **route_docs(FileReply))
async def create_file(request: Request) -> dict[str, Any]:
    """Upload a file (a form: `file` and `purpose`)."""
    store, id = store_of(request), new_id("file-")
    with store.open_blob(id) as incoming:
        form = await read_form(request, FileForm, {"file": incoming}, MAX_BYTES)
        if not incoming.size:
            raise APIError(400, "File is empty.", param="file", code="invalid_file")
        record = file_record(id, form.file.filename, incoming.size, form.purpose)
        if form.expires_after is not None:
            record["expires_at"] = record["created_at"] + form.expires_after.seconds
        await asyncio.to_thread(incoming.commit, record)
    return record


@router.get("/files", **route_docs(Files))
async def list_files(request: Request) -> dict[str, Any]:
    """List the files, optionally those with one purpose."""
    query = read_query(request, FilesQuery)
    return await paginate(
        store_of(request),
        "file",
        query,
        dict,
        order=query.order,
        predicate=lambda file: is_alive(file) and query.purpose in (None, file["purpose"]),
    )


@router.get("/files/{file_id}", **route_docs(FileReply))
async def get_file(request: Request, file_id: str) -> dict[str, Any]:
    """Return the description of an uploaded file."""
    return await asyncio.to_thread(find_file, store_of(request), file_id)


@router.get("/files/{file_id}/content", **route_docs(media_type="application/octet-stream"))
async def get_content(request: Request, file_id: str) -> Response:
    """Download the content of a file: the uploaded bytes, unchanged."""
    store = store_of(request)
    file = await asyncio.to_thread(find_file, store, file_id)
    return FileResponse(
        store.blob_path(file_id),
        media_type=_TYPES.get(file["purpose"], "application/octet-stream"),
        filename=file["filename"],  # as an attachment
        headers={"x-content-type-options": "nosniff", "content-security-policy": "sandbox"},
    )


@router.delete("/files/{file_id}", **route_docs(FileDeleted))
async def delete_file(request: Request, file_id: str) -> dict[str, Any]:
    """Delete a file. Existing fine-tuning jobs keep their own copy."""
    store = store_of(request)
    if not await asyncio.to_thread(store.delete_file, file_id):
        raise no_such_file(file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def drop_expired(store: Store) -> None:
    """Delete expired files from the store."""
    expired, _ = store.page("file", predicate=lambda file: not is_alive(file))
    for file in expired:
        store.delete_file(file["id"])
