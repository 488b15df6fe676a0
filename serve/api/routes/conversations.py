"""/v1/conversations: items that responses continue and add to.

A conversation has no model. `POST /v1/responses` with its id puts its items before those of the
request, and adds both the request's items and the generated ones when the response is finished.
"""

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request

from serve.api.openapi import route_docs
from serve.api.pagination import ItemsQuery, page_of, paginate, read_query
from serve.api.requests import Body, Metadata, read_json
from serve.api.response_items import Items, to_items
from serve.api.responses import ConversationDeleted, ConversationReply, ItemPage, ItemReply
from serve.api.state import state_of, stored_of
from serve.jobs.store import new_id

router = APIRouter(prefix="/v1")

MAX_ITEMS = 20  # in one request, as at OpenAI


class ConversationBody(Body):
    """Body of POST /v1/conversations."""

    items: Annotated[Items, Field(max_length=MAX_ITEMS)] = []
    metadata: Metadata = {}


class ConversationUpdate(Body):
    """Body of POST /v1/conversations/{id}."""

    metadata: Metadata


class NewItems(Body):
    """Body of POST /v1/conversations/{id}/items."""

    items: Annotated[Items, Field(min_length=1, max_length=MAX_ITEMS)]


@router.post("/conversations", **route_docs(ConversationReply, ConversationBody))
async def create_conversation(request: Request) -> dict[str, Any]:
    """Create a conversation, with up to 20 items."""
    body = await read_json(request, ConversationBody)
    stored, owner = stored_of(request)
    stored.check_enabled()
    items = await asyncio.to_thread(
        stored.resolve_references, to_items(body.items, "items"), owner, "items"
    )
    conversation = {
        "id": new_id("conv_"),
        "object": "conversation",
        "created_at": int(time.time()),
        "metadata": body.metadata,
    }

    def save() -> None:
        stored.add("conversation", conversation["id"], owner, {"conversation": conversation})
        stored.add_items(conversation["id"], owner, items)

    await asyncio.to_thread(save)
    return conversation


@router.get("/conversations/{conversation_id}", **route_docs(ConversationReply))
async def get_conversation(request: Request, conversation_id: str) -> dict[str, Any]:
    """Return a conversation without its items."""
    stored, owner = stored_of(request)
    body = await asyncio.to_thread(stored.get, "conversation", conversation_id, owner)
    return body["conversation"]


@router.post(
    "/conversations/{conversation_id}", **route_docs(ConversationReply, ConversationUpdate)
)
async def update_conversation(request: Request, conversation_id: str) -> dict[str, Any]:
    """Replace the metadata of a conversation."""
    body = await read_json(request, ConversationUpdate)
    stored, owner = stored_of(request)
    stored.check_enabled()
    record = await asyncio.to_thread(stored.get, "conversation", conversation_id, owner)
    conversation = record["conversation"] | {"metadata": body.metadata}
    await asyncio.to_thread(
        stored.update, "conversation", conversation_id, conversation=conversation
    )
    return conversation


@router.delete("/conversations/{conversation_id}", **route_docs(ConversationDeleted))
async def delete_conversation(request: Request, conversation_id: str) -> dict[str, Any]:
    """Delete a conversation and its items. Their bytes are overwritten."""
    stored, owner = stored_of(request)
    await asyncio.to_thread(stored.delete, "conversation", conversation_id, owner)
    return {"id": conversation_id, "object": "conversation.deleted", "deleted": True}


@router.get("/conversations/{conversation_id}/items", **route_docs(ItemPage))
async def list_items(request: Request, conversation_id: str) -> dict[str, Any]:
    """List the items of a conversation."""
    query = read_query(request, ItemsQuery)
    await get_conversation(request, conversation_id)  # 404 for other keys
    return await paginate(
        state_of(request).store,
        "conversation.item",
        query,
        lambda record: record["item"],
        parent=conversation_id,
        order=query.order,
    )


@router.post("/conversations/{conversation_id}/items", **route_docs(ItemPage, NewItems))
async def create_items(request: Request, conversation_id: str) -> dict[str, Any]:
    """Add up to 20 items to a conversation."""
    body = await read_json(request, NewItems)
    stored, owner = stored_of(request)
    stored.check_enabled()
    await asyncio.to_thread(stored.get, "conversation", conversation_id, owner)
    items = await asyncio.to_thread(
        stored.resolve_references, to_items(body.items, "items"), owner, "items"
    )
    await asyncio.to_thread(stored.add_items, conversation_id, owner, items)
    return page_of(items, ItemsQuery(limit=MAX_ITEMS), newest_first=False)


@router.get("/conversations/{conversation_id}/items/{item_id}", **route_docs(ItemReply))
async def get_item(request: Request, conversation_id: str, item_id: str) -> dict[str, Any]:
    """Return an item of a conversation."""
    await get_conversation(request, conversation_id)
    stored, owner = stored_of(request)
    return await asyncio.to_thread(stored.conversation_item, conversation_id, item_id, owner)


@router.delete("/conversations/{conversation_id}/items/{item_id}", **route_docs(ConversationReply))
async def delete_item(request: Request, conversation_id: str, item_id: str) -> dict[str, Any]:
    """Delete an item of a conversation."""
    await get_item(request, conversation_id, item_id)
    stored, owner = stored_of(request)
    await asyncio.to_thread(stored.delete, "conversation.item", item_id, owner)
    return await get_conversation(request, conversation_id)
