"""/v1/chat/completions: list, read, change and delete completions that were stored.

A request with `store: true` stores its messages and its completion; see
`serve/api/stored_responses.py`.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter
from starlette.requests import Request

from serve.api.errors import APIError
from serve.api.message_deltas import add_delta
from serve.api.openapi import route_docs
from serve.api.pagination import ItemsQuery, page_of, paginate, read_query
from serve.api.requests import Body, ChatBody, Metadata, read_json
from serve.api.responses import (
    ChatCompletion,
    ChatCompletionDeleted,
    ChatCompletions,
    ItemPage,
)
from serve.api.state import state_of, stored_of

router = APIRouter(prefix="/v1")

KIND = "chat.completion"


class MetadataUpdate(Body):
    """Body of POST /v1/chat/completions/{id}."""

    metadata: Metadata


class CompletionsQuery(ItemsQuery):
    """Query parameters of the list; `metadata[KEY]=VALUE` selects by metadata."""

    model: str | None = None
    order: Literal["asc", "desc"] = "asc"


def check_store(request: Request) -> None:
    """Raise APIError if the server was started with --no-store."""
    if not state_of(request).responses.is_enabled:
        raise APIError(
            400,
            "Unsupported parameter: 'store' cannot be true, because this server was started with "
            "--no-store.",
            param="store",
            code="unsupported_parameter",
        )


async def store_completion(request: Request, body: ChatBody, completion: dict[str, Any]) -> None:
    """Store a completion and the messages of its request."""
    messages = [
        message.model_dump(exclude_unset=True) | {"id": f"{completion['id']}-{index}"}
        for index, message in enumerate(body.messages)
    ]
    stored, owner = stored_of(request)
    record = {"completion": completion, "messages": messages}
    await asyncio.to_thread(stored.add, KIND, completion["id"], owner, record, parent=owner)


async def store_streamed(
    request: Request, body: ChatBody, chunks: AsyncGenerator[dict[str, Any], None]
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the chunks of a stream, and store the completion that they make at its end."""
    choices: dict[int, dict[str, Any]] = {}
    completion: dict[str, Any] = {}
    async with aclosing(chunks):
        async for chunk in chunks:
            completion = completion or {
                **chunk,
                "object": "chat.completion",
                "usage": None,
                "metadata": body.metadata,
            }
            for choice in chunk["choices"]:
                add_delta(choices, choice)
            for name in ("usage", "moderation"):
                if chunk.get(name) is not None:
                    completion[name] = chunk[name]
            yield chunk
    completion["choices"] = [choices[index] for index in sorted(choices)]
    await store_completion(request, body, completion)


@router.get("/chat/completions", **route_docs(ChatCompletions))
async def list_completions(request: Request) -> dict[str, Any]:
    """List the stored chat completions."""
    query = read_query(request, CompletionsQuery)
    metadata = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in request.query_params.items()
        if name.startswith("metadata[")
    }
    stored, owner = stored_of(request)

    def is_selected(record: dict[str, Any]) -> bool:
        completion = record["completion"]
        return query.model in (None, completion["model"]) and (
            metadata.items() <= (completion["metadata"] or {}).items()
        )

    return await paginate(
        state_of(request).store,
        KIND,
        query,
        lambda record: record["completion"],
        parent=owner,
        order=query.order,
        predicate=lambda record: stored.is_readable(record, owner) and is_selected(record),
    )


@router.get("/chat/completions/{completion_id}", **route_docs(ChatCompletion))
async def get_completion(request: Request, completion_id: str) -> dict[str, Any]:
    """Return a stored chat completion."""
    return (await _record(request, completion_id))["completion"]


@router.get("/chat/completions/{completion_id}/messages", **route_docs(ItemPage))
async def list_messages(request: Request, completion_id: str) -> dict[str, Any]:
    """List the messages of the request of a stored chat completion."""
    query = read_query(request, CompletionsQuery)
    record = await _record(request, completion_id)
    return page_of(record["messages"], query, newest_first=query.order == "desc")


@router.post("/chat/completions/{completion_id}", **route_docs(ChatCompletion, MetadataUpdate))
async def update_completion(request: Request, completion_id: str) -> dict[str, Any]:
    """Replace the metadata of a stored chat completion."""
    body = await read_json(request, MetadataUpdate)
    state_of(request).responses.check_enabled()
    record = await _record(request, completion_id)
    completion = record["completion"] | {"metadata": body.metadata}
    stored, _ = stored_of(request)
    await asyncio.to_thread(stored.update, KIND, completion_id, completion=completion)
    return completion


@router.delete("/chat/completions/{completion_id}", **route_docs(ChatCompletionDeleted))
async def delete_completion(request: Request, completion_id: str) -> dict[str, Any]:
    """Delete a stored chat completion. Its bytes are overwritten."""
    stored, owner = stored_of(request)
    await asyncio.to_thread(stored.delete, KIND, completion_id, owner)
    return {"id": completion_id, "object": "chat.completion.deleted", "deleted": True}


async def _record(request: Request, id: str) -> dict[str, Any]:
    stored, owner = stored_of(request)
    return await asyncio.to_thread(stored.get, KIND, id, owner)
