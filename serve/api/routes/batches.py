"""/v1/batches: a file of requests that are answered when nothing else waits.

A batch takes requests to one endpoint from an uploaded file with the purpose "batch". All lines are
checked first; one error fails the batch. See `serve/api/batch_runner.py`.
"""

import asyncio
from typing import Any, Literal

from fastapi import APIRouter
from starlette.requests import Request

from serve.api.errors import APIError
from serve.api.openapi import route_docs
from serve.api.pagination import PageQuery, paginate, read_query
from serve.api.request_context import context_of
from serve.api.requests import Body, Metadata, read_json
from serve.api.responses import BatchesReply, BatchReply
from serve.api.routes.files import ExpiresAfter
from serve.api.state import state_of
from serve.api.stored_files import find_file

router = APIRouter(prefix="/v1")


class BatchBody(Body):
    """Body of POST /v1/batches."""

    input_file_id: str
    endpoint: Literal[
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/moderations",
        "/v1/responses",
    ]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


@router.post("/batches", **route_docs(BatchReply, BatchBody))
async def create_batch(request: Request) -> dict[str, Any]:
    """Create a batch, which is validated and answered in the background."""
    body = await read_json(request, BatchBody)
    state = state_of(request)
    file = await asyncio.to_thread(find_file, state.store, body.input_file_id, "input_file_id")
    if file["purpose"] != "batch":
        raise APIError(
            400,
            f"Invalid 'input_file_id': the file has the purpose '{file['purpose']}'. Upload it "
            "with the purpose 'batch'.",
            param="input_file_id",
            code="invalid_value",
        )
    fields = body.model_dump(include={"endpoint", "completion_window", "metadata"})
    batch = await asyncio.to_thread(
        state.batches.create,
        context_of(request.scope).owner,
        body.input_file_id,
        fields,
        output_seconds=body.output_expires_after and body.output_expires_after.seconds,
    )
    state.batch_runner.start()
    return batch


@router.get("/batches", **route_docs(BatchesReply))
async def list_batches(request: Request) -> dict[str, Any]:
    """List the batches, newest first."""
    owner = context_of(request.scope).owner
    return await paginate(
        state_of(request).store,
        "batch",
        read_query(request, PageQuery),
        lambda record: record["batch"],
        predicate=lambda record: record["owner"] == owner,
    )


@router.get("/batches/{batch_id}", **route_docs(BatchReply))
async def get_batch(request: Request, batch_id: str) -> dict[str, Any]:
    """Return a batch with its status and counts."""
    batches = state_of(request).batches
    if await asyncio.to_thread(batches.owner, batch_id) != context_of(request.scope).owner:
        raise APIError(404, f"No batch found with id '{batch_id[:80]}'.", code="not_found")
    batch = await asyncio.to_thread(batches.get, batch_id)
    assert batch is not None
    return batch


@router.post("/batches/{batch_id}/cancel", **route_docs(BatchReply))
async def cancel_batch(request: Request, batch_id: str) -> dict[str, Any]:
    """Cancel a batch; the requests that run now are still answered."""
    batch = await get_batch(request, batch_id)
    if batch["status"] not in ("validating", "in_progress", "cancelling"):
        raise APIError(
            400,
            f"Cannot cancel a batch with status '{batch['status']}'.",
            code="invalid_value",
        )
    return await asyncio.to_thread(state_of(request).batches.cancel, batch_id)
