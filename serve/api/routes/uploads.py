"""/v1/uploads: upload a file in parts of up to 64 MB, which can be sent in any order.

An upload is pending for an hour. Completing it joins the parts in the given order, checks the size
and the MD5 of the whole, and makes a file as /v1/files does.
"""

import asyncio
import hashlib
import time
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request

from serve.api.errors import APIError
from serve.api.multipart import File, read_form
from serve.api.openapi import route_docs
from serve.api.request_context import context_of
from serve.api.requests import Body, read_json
from serve.api.responses import UploadPart, UploadReply
from serve.api.routes.files import MAX_BYTES, PURPOSES, ExpiresAfter
from serve.api.stored_files import store_of
from serve.jobs.store import Store, file_record, new_id

router = APIRouter(prefix="/v1")

MAX_PART = 64 * 2**20
BODY_LIMITS = {"/v1/uploads/*/parts": MAX_PART + 2**20}  # the part and the rest of the form
PENDING_SECONDS = 3600


class UploadBody(Body):
    """Body of POST /v1/uploads."""

    filename: Annotated[str, Field(min_length=1)]
    purpose: PURPOSES
    bytes: Annotated[int, Field(ge=1, le=MAX_BYTES)]
    mime_type: str
    expires_after: ExpiresAfter | None = None


class PartForm(Body):
    """Form of POST /v1/uploads/{id}/parts."""

    data: File


class CompleteBody(Body):
    """Body of POST /v1/uploads/{id}/complete."""

    part_ids: Annotated[list[str], Field(min_length=1, max_length=10_000)]
    md5: str | None = None


@router.post("/uploads", **route_docs(UploadReply, UploadBody))
async def create_upload(request: Request) -> dict[str, Any]:
    """Start an upload of a file in parts."""
    body = await read_json(request, UploadBody)
    now = int(time.time())
    upload = {
        "id": new_id("upload_"),
        "object": "upload",
        "created_at": now,
        "filename": body.filename,
        "bytes": body.bytes,
        "purpose": body.purpose,
        "status": "pending",
        "expires_at": now + PENDING_SECONDS,
        "file": None,
    }
    record = {
        "owner": context_of(request.scope).owner,
        "upload": upload,
        "file_seconds": body.expires_after and body.expires_after.seconds,
    }
    await asyncio.to_thread(store_of(request).add, "upload", upload["id"], record)
    return upload


@router.post("/uploads/{upload_id}/parts", **route_docs(UploadPart, form=PartForm))
async def add_part(request: Request, upload_id: str) -> dict[str, Any]:
    """Add a part to an upload (a form: `data`)."""
    store, record = await _pending(request, upload_id)
    id = new_id("part_")
    with store.open_blob(id) as incoming:
        await read_form(request, PartForm, {"data": incoming}, MAX_PART)
        parts = await asyncio.to_thread(_parts, store, upload_id)
        sent = sum(part["bytes"] for part in parts.values()) + incoming.size
        announced = record["upload"]["bytes"]
        # A part may be sent again, after a lost response or with other content.
        if incoming.size > announced or sent > 2 * announced:
            raise _bad(
                "data",
                f"The parts have {sent:,} bytes, but the upload was announced with "
                f"{announced:,}, and may have as many once more in parts that are sent again.",
            )
        part = {
            "id": id,
            "object": "upload.part",
            "created_at": int(time.time()),
            "upload_id": upload_id,
        }
        stored = {"part": part, "bytes": incoming.size}
        await asyncio.to_thread(incoming.commit, stored, "upload.part", upload_id)
    try:
        await _pending(request, upload_id)
    except APIError:  # the upload has ended meanwhile, and deleted its other parts
        await asyncio.to_thread(store.delete_blob, "upload.part", id)
        raise
    return part


@router.post("/uploads/{upload_id}/complete", **route_docs(UploadReply, CompleteBody))
async def complete_upload(request: Request, upload_id: str) -> dict[str, Any]:
    """Join the parts of an upload to a file."""
    body = await read_json(request, CompleteBody)
    store, record = await _pending(request, upload_id)
    return await asyncio.to_thread(_complete, store, record, body)


@router.post("/uploads/{upload_id}/cancel", **route_docs(UploadReply))
async def cancel_upload(request: Request, upload_id: str) -> dict[str, Any]:
    """Cancel an upload and delete its parts."""
    store, record = await _pending(request, upload_id)
    upload = record["upload"] | {"status": "cancelled"}
    await asyncio.to_thread(_end, store, upload)
    return upload


def _complete(store: Store, record: dict[str, Any], body: CompleteBody) -> dict[str, Any]:
    upload, parts = record["upload"], _parts(store, record["upload"]["id"])
    for index, id in enumerate(body.part_ids):
        if id not in parts:
            raise _bad(f"part_ids[{index}]", f"The upload has no part '{id[:80]}'.")
        if id in body.part_ids[:index]:
            raise _bad(f"part_ids[{index}]", f"The part '{id[:80]}' is listed twice.")
    size = sum(parts[id]["bytes"] for id in body.part_ids)
    if size != upload["bytes"]:
        raise _bad(
            "part_ids",
            f"The parts have {size:,} bytes, but the upload was announced with "
            f"{upload['bytes']:,}. Add the missing parts.",
        )
    digest = hashlib.md5(usedforsecurity=False)
    file_id = new_id("file-")
    with store.open_blob(file_id) as blob:
        for id in body.part_ids:
            with store.blob_path(id).open("rb") as part:
                while data := part.read(2**20):
                    digest.update(data)
                    blob.write(data)
        if body.md5 is not None and body.md5.lower() != digest.hexdigest():
            raise _bad("md5", f"The MD5 of the parts is {digest.hexdigest()}.")
        file = file_record(file_id, upload["filename"], size, upload["purpose"])
        if (seconds := record["file_seconds"]) is not None:
            file["expires_at"] = file["created_at"] + seconds
        with store.transaction():
            current = store.get("upload", upload["id"])
            if current is None or current["upload"]["status"] != "pending":
                raise _bad(None, "The upload was completed or cancelled meanwhile.")
            blob.commit(file)
            upload |= {"status": "completed", "file": file}
            store.update("upload", upload["id"], upload=upload)
    _end(store, upload)
    return upload


def _end(store: Store, upload: dict[str, Any]) -> None:
    """Store the last status of an upload, and delete its parts."""
    store.update("upload", upload["id"], upload=upload)
    for id in _parts(store, upload["id"]):
        store.delete_blob("upload.part", id)


def _parts(store: Store, upload_id: str) -> dict[str, dict[str, Any]]:
    records, _ = store.page("upload.part", parent=upload_id)
    return {record["part"]["id"]: record for record in records}


async def _pending(request: Request, id: str) -> tuple[Store, dict[str, Any]]:
    """Return the store and the record of an upload that waits for parts."""
    store = store_of(request)
    record = await asyncio.to_thread(store.get, "upload", id)
    if record is None or record["owner"] != context_of(request.scope).owner:
        raise APIError(404, f"No upload found with id '{id[:80]}'.", code="not_found")
    upload = record["upload"]
    if upload["status"] == "pending" and upload["expires_at"] <= time.time():
        upload["status"] = "expired"
        await asyncio.to_thread(_end, store, upload)
    if upload["status"] != "pending":
        raise _bad(None, f"The upload has the status '{upload['status']}': start another one.")
    return store, record


def drop_expired(store: Store) -> None:
    """Delete the parts of expired uploads from the store."""
    now = time.time()
    records, _ = store.page(
        "upload",
        predicate=lambda record: (
            record["upload"]["status"] == "pending" and record["upload"]["expires_at"] <= now
        ),
    )
    for record in records:
        _end(store, record["upload"] | {"status": "expired"})


def _bad(param: str | None, message: str) -> APIError:
    return APIError(400, message, param=param, code="invalid_value")
