"""/v1/responses: answer a conversation that the server can store.

A request is translated to a chat request (`serve/api/response_requests.py`), and the generated text
to items (`serve/api/response_events.py`). With `store` (the default) the response can be read later
and continued with `previous_response_id` or in a conversation (`serve/api/stored_responses.py`).

Left out: tools that OpenAI's servers run, such as web search, and prompts that they store.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve.api.context_window import RESPONSE_WORDING
from serve.api.errors import APIError, as_api_error, missing_parameter
from serve.api.generation import Generation, Usage
from serve.api.message_deltas import DeltaReader
from serve.api.openapi import route_docs
from serve.api.pagination import ItemsQuery, page_of, read_query
from serve.api.request_context import context_of
from serve.api.requests import Body, Message, read_json, report_unused
from serve.api.response_events import Event, ResponseWriter, replay
from serve.api.response_items import to_items, to_messages
from serve.api.response_requests import (
    ConversationName,
    FlatTool,
    InputTokensBody,
    ResponseBody,
    namespaces,
    needs_no_tool,
    response_params,
    to_chat_body,
)
from serve.api.responses import (
    InputTokens,
    ItemPage,
    ResponseDeleted,
    ResponseEvent,
    ResponseReply,
)
from serve.api.routes.chat import (
    build_generation,
    chat_logprobs,
    prompt_text,
    report_unused_variables,
)
from serve.api.routes.moderations import load_moderator, moderate_response
from serve.api.sse import cancel_on_disconnect, event_stream
from serve.api.state import get_loaded_model, stored_of
from serve.api.stored_responses import BackgroundRun, ResponseStore, is_unfinished
from serve.api.tools import ToolSettings, read_tools
from serve.api.unused_fields import Unused
from serve.jobs.store import new_id
from serve.models.decoder import DecoderModel

log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1")

# --- create -----------------------------------------------------------------------------------


@router.post("/responses", **route_docs(ResponseReply, ResponseBody, events=ResponseEvent))
async def create_response(request: Request) -> Response:
    """Generate the next items of a conversation."""
    body = await read_json(request, ResponseBody)
    stored, owner = stored_of(request)
    is_stored = body.store and stored.is_enabled
    if body.background and not is_stored:
        raise APIError(
            400,
            "A response in the background must be stored, so that it can be read later: leave "
            "'store' out, and start the server without --no-store.",
            param="background",
            code="invalid_value",
        )
    if body.conversation is not None and not is_stored:
        raise APIError(
            400,
            "A response that is not stored cannot be added to a conversation: leave 'store' out, "
            "and start the server without --no-store, or send the items of the conversation.",
            param="conversation",
            code="invalid_value",
        )
    history = await asyncio.to_thread(_history, stored, owner, body)
    items = await asyncio.to_thread(stored.resolve_references, to_items(body.input), owner, "input")
    moderator = await load_moderator(request, body.moderation)
    generation, tools = await _generation(request, body, history, items)
    response = _response(body, generation, is_stored=is_stored)
    for index, item in enumerate(items):  # with the id of the response, to find it by the item's
        item["id"] = f"{item['id'].partition('_')[0]}_{response['id'].partition('_')[2]}in{index}"
    writer = ResponseWriter(response)
    moderation = None
    if moderator is not None:
        response["moderation"] = None
        messages = _messages(body, [*history, *items], len(history))
        prompt = prompt_text(messages)
        moderation = partial(moderate_response, request, moderator, prompt)
    events = _events(writer, generation, tools, namespaces(body.tools), moderation)
    record = {"response": response, "input": [*history, *items], "parts": writer.parts}
    if is_stored:
        if body.background:  # can be read before its end
            await asyncio.to_thread(stored.add, "response", response["id"], owner, record)
        events = _store_at_end(stored, owner, record, items, events)
    if body.background:

        def cancel() -> Event:
            if is_unfinished(response):
                writer.cancel()
                stored.update("response", response["id"], **record)
            assert writer.last_event is not None
            return writer.last_event

        run = stored.running[response["id"]] = BackgroundRun()
        run.task = asyncio.create_task(run.collect(events, cancel))
        run.task.add_done_callback(lambda _: stored.running.pop(response["id"], None))
        if body.stream:
            return await event_stream(request, run.follow(), named=True)
        return JSONResponse(response)
    if body.stream:
        return await event_stream(request, events, named=True)
    await cancel_on_disconnect(request.receive, _read_all(events))
    if writer.error is not None:
        raise writer.error
    return JSONResponse(response)


async def _events(
    writer: ResponseWriter,
    generation: Generation,
    tools: ToolSettings | None,
    qualified_names: Mapping[str, tuple[str, str]],
    moderation: Callable[[str], Awaitable[dict[str, Any]]] | None,
) -> AsyncGenerator[Event, None]:
    """Yield the events of a response. An error after the first token is an event, too."""
    reader = DeltaReader(tools, generation.model)
    include_logprobs = generation.requests[0].top_logprobs is not None
    encoding = generation.model.tokenizer.encoding
    has_begun = writer.response["background"]
    if has_begun:
        for event in writer.begin():
            yield event
    try:
        async with aclosing(generation.text_deltas()) as deltas:
            async for _, delta in deltas:
                if not has_begun:  # an error before this is an HTTP error
                    has_begun = True
                    for event in writer.begin():
                        yield event
                for fields, tokens in reader.read(delta):
                    logprobs = chat_logprobs(encoding, tokens) if include_logprobs else []
                    for part in _parts(fields, logprobs, qualified_names):
                        for event in writer.write(part):
                            yield event
                if delta.finish_reason:
                    generation.usage.reasoning_tokens += reader.reasoning_tokens
                    reason = reader.finish_reason(delta.finish_reason)
                    if moderation is not None:
                        text = _output_text(writer.response["output"])
                        writer.response["moderation"] = await moderation(text)
                    for event in writer.end(reason, _usage(generation.usage)):
                        yield event
    except Exception as error:
        if not has_begun:
            raise
        if not isinstance(error, APIError):
            log.exception("%s failed", writer.response["id"])
        writer.error = as_api_error(error)
        yield writer.fail(writer.error.message)


def _parts(
    fields: dict[str, Any],
    logprobs: list[dict[str, Any]],
    qualified_names: Mapping[str, tuple[str, str]],
) -> Iterator[list[Any]]:
    """Yield the parts of a response that a delta of a chat message stands for."""
    if "reasoning_content" in fields:
        yield ["reasoning", fields["reasoning_content"]]
    if "content" in fields:
        yield ["text", fields["content"], logprobs]
    for call in fields.get("tool_calls", ()):
        if "id" in call:
            name = call["function"]["name"]
            namespace, name = qualified_names.get(name, (None, name))
            yield ["call", call["id"], name, namespace]
        if call["function"]["arguments"]:
            yield ["arguments", call["function"]["arguments"]]


async def _store_at_end(
    stored: ResponseStore,
    owner: str,
    record: dict[str, Any],
    items: list[dict[str, Any]],
    events: AsyncGenerator[Event, None],
) -> AsyncGenerator[Event, None]:
    """Yield the events of a response, and store it before the last one.

    Args:
        stored: The stored responses; a response in the background is among them.
        owner: The API key that the response belongs to.
        record: The stored form of the response, which the events complete.
        items: The items of the request.
        events: The events.
    """
    response = record["response"]

    def save() -> None:
        if response["background"]:
            stored.update("response", response["id"], **record)
        else:
            stored.add("response", response["id"], owner, record)
        if "conversation" in response and response["status"] in ("completed", "incomplete"):
            new_items = [*items, *response["output"]]
            stored.add_items(response["conversation"]["id"], owner, new_items)

    async with aclosing(events):
        async for event in events:
            if not is_unfinished(response):
                await asyncio.to_thread(save)
            yield event


def _output_text(output: list[dict[str, Any]]) -> str:
    """Return the text of a response: its messages, and the arguments of its calls."""
    texts = [item["arguments"] for item in output if item["type"] == "function_call"]
    for item in output:
        if item["type"] == "message":
            texts += [part["text"] for part in item["content"]]
    return "\n".join(texts)


async def _read_all(events: AsyncGenerator[Event, None]) -> None:
    async with aclosing(events):
        async for _ in events:
            pass


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _response(body: ResponseBody, generation: Generation, *, is_stored: bool) -> dict[str, Any]:
    """Return a response without output in OpenAI's shape."""
    params = generation.requests[0].sampling_params
    response = {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "queued" if body.background else "in_progress",
        "background": body.background,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "model": generation.model.id,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.reasoning.effort, "summary": None},
        "service_tier": "default",
        "store": is_stored,
        "temperature": params.temperature,
        "text": {"format": body.text.format.model_dump(by_alias=True, exclude_none=True)},
        "tool_choice": _dump(body.tool_choice) or "auto",
        "tools": [_dump_tool(tool) for tool in body.tools],
        "top_logprobs": body.top_logprobs,
        "top_p": params.top_p,
        "truncation": body.truncation,
        "usage": None,
        "user": body.user,
        "metadata": body.metadata,
    }
    if body.conversation is not None:
        response["conversation"] = {"id": _id(body.conversation)}
    return response


def _dump_tool(tool: FlatTool) -> dict[str, Any]:
    if tool.type != "function":
        return tool.model_dump(exclude_unset=True)
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": bool(tool.strict),
    }


def _dump(value: Any) -> Any:
    return value.model_dump(exclude_none=True) if isinstance(value, Body) else value


def _id(conversation: str | ConversationName) -> str:
    return conversation if isinstance(conversation, str) else conversation.id


# --- the conversation -------------------------------------------------------------------------


def _history(stored: ResponseStore, owner: str, body: InputTokensBody) -> list[dict[str, Any]]:
    """Return the items before those of the request: of its conversation or previous response."""
    if body.previous_response_id is not None and body.conversation is not None:
        raise APIError(
            400,
            "Only one of 'previous_response_id' and 'conversation' can be set.",
            param="conversation",
            code="invalid_value",
        )
    if body.conversation is not None:
        id = _id(body.conversation)
        stored.get("conversation", id, owner)
        return stored.items(id)
    if (id := body.previous_response_id) is None:
        return []
    try:
        record = stored.get("response", id, owner)
    except APIError:
        raise APIError(
            400,
            f"Previous response with id '{id[:80]}' not found.",
            param="previous_response_id",
            code="previous_response_not_found",
        ) from None
    if record["response"]["status"] not in ("completed", "incomplete"):
        raise APIError(
            400,
            f"The previous response '{id}' has the status '{record['response']['status']}': only a "
            "completed or incomplete response can be continued.",
            param="previous_response_id",
            code="invalid_value",
        )
    return [*record["input"], *record["response"]["output"]]


async def _generation(
    request: Request,
    body: InputTokensBody,
    history: list[dict[str, Any]],
    items: list[dict[str, Any]],
) -> tuple[Generation, ToolSettings | None]:
    """Return the generation of a response, and its tools."""
    report_unused(
        request,
        [
            Unused(f"tools[{index}]", is_declared=True)
            for index, tool in enumerate(body.tools)
            if needs_no_tool(tool)
        ],
    )
    with response_params(body):
        chat = to_chat_body(body, [])
        tools = read_tools(chat)
        model = await get_loaded_model(
            request, body.model, DecoderModel, needs_tools=tools is not None
        )
        report_unused_variables(request, chat, model, "reasoning.effort")

        async def build(num_dropped: int) -> Generation:
            kept = _drop_turns(history, items, num_dropped)
            chat.messages = _messages(body, *kept)
            if not chat.messages:
                raise missing_parameter("input")
            return await asyncio.to_thread(
                build_generation, chat, tools, model, context_of(request.scope), RESPONSE_WORDING
            )

        # Drop as few of the oldest turns as possible: none, or else a binary search.
        num_turns = len(_turns([*history, *items])) if body.truncation == "auto" else 1
        generation, low, high, num_dropped = None, 0, max(1, num_turns), 0
        while low < high:
            try:
                generation, high = await build(num_dropped), num_dropped
            except APIError as error:
                low = num_dropped + 1
                nothing_fits = low == high and generation is None
                if nothing_fits or error.code != "context_length_exceeded":
                    raise
            num_dropped = (low + high) // 2
        assert generation is not None
        return generation, tools


def _messages(
    body: InputTokensBody, conversation: list[dict[str, Any]], num_stored: int
) -> list[Message]:
    start = [Message(role="system", content=body.instructions)] if body.instructions else []
    return start + to_messages(conversation, num_stored)


def _turns(conversation: list[dict[str, Any]]) -> list[int]:
    """Return the index of each user message; a turn ends before the next one."""
    return [index for index, item in enumerate(conversation) if item.get("role") == "user"]


def _drop_turns(
    history: list[dict[str, Any]], items: list[dict[str, Any]], count: int
) -> tuple[list[dict[str, Any]], int]:
    """Drop the oldest turns of a conversation; instructions stay.

    Returns:
        The other items, and the number of those that are not from this request.
    """
    conversation = [*history, *items]
    end = _turns(conversation)[count] if count else 0
    kept = [item for item in conversation[:end] if item.get("role") in ("system", "developer")]
    return [*kept, *conversation[end:]], len(kept) + max(0, len(history) - end)


# --- read, cancel, delete ---------------------------------------------------------------------


class RetrieveQuery(Body):
    """Query parameters of GET /v1/responses/{id}."""

    stream: bool = False
    starting_after: int | None = None


@router.post("/responses/input_tokens", **route_docs(InputTokens, InputTokensBody))
async def count_input_tokens(request: Request) -> dict[str, Any]:
    """Count the tokens of a request for a response, without computing it."""
    body = await read_json(request, InputTokensBody)
    stored, owner = stored_of(request)
    history = await asyncio.to_thread(_history, stored, owner, body)
    items = await asyncio.to_thread(stored.resolve_references, to_items(body.input), owner, "input")
    generation, _ = await _generation(request, body, history, items)
    return {"object": "response.input_tokens", "input_tokens": generation.usage.prompt_tokens}


@router.get("/responses/{response_id}", **route_docs(ResponseReply, events=ResponseEvent))
async def get_response(request: Request, response_id: str) -> Response:
    """Return a stored response, or its events from a sequence number on."""
    query = read_query(request, RetrieveQuery)
    stored, owner = stored_of(request)
    run = stored.running.get(response_id)
    record = await asyncio.to_thread(stored.get, "response", response_id, owner)
    if not query.stream:
        response = record["response"]
        if run is not None and run.has_started and response["status"] == "queued":
            response["status"] = "in_progress"  # the record is written again at the end
        return JSONResponse(response)
    if run is None:
        _check_finished(record["response"])
    first = -1 if query.starting_after is None else query.starting_after

    async def events() -> AsyncGenerator[Event, None]:
        if run is not None:
            async for event in run.follow():
                yield event
        else:
            for event in replay(record["response"], record["parts"]):
                yield event

    return await event_stream(request, _after(events(), first), named=True)


async def _after(
    events: AsyncGenerator[Event, None], sequence_number: int
) -> AsyncGenerator[Event, None]:
    is_empty = True
    async with aclosing(events):
        async for event in events:
            if event["sequence_number"] > sequence_number:
                is_empty = False
                yield event
    if is_empty:
        raise APIError(
            400,
            f"Invalid 'starting_after': the response has no event after {sequence_number}.",
            param="starting_after",
            code="invalid_value",
        )


@router.get("/responses/{response_id}/input_items", **route_docs(ItemPage))
async def list_input_items(request: Request, response_id: str) -> dict[str, Any]:
    """List the items from which a response was generated."""
    query = read_query(request, ItemsQuery)
    stored, owner = stored_of(request)
    record = await asyncio.to_thread(stored.get, "response", response_id, owner)
    return page_of(record["input"], query, newest_first=query.order == "desc")


@router.post("/responses/{response_id}/cancel", **route_docs(ResponseReply))
async def cancel_response(request: Request, response_id: str) -> dict[str, Any]:
    """Cancel a response that is computed in the background."""
    stored, owner = stored_of(request)
    record = await asyncio.to_thread(stored.get, "response", response_id, owner)
    if not record["response"]["background"]:
        raise APIError(400, "Cannot cancel a synchronous response.", code="invalid_value")
    await stored.stop(response_id)
    record = await asyncio.to_thread(stored.get, "response", response_id, owner)
    _check_finished(record["response"])
    return record["response"]


def _check_finished(response: dict[str, Any]) -> None:
    """Raise APIError if a response, which this server does not compute, is not finished."""
    if is_unfinished(response):
        raise APIError(
            409,
            "Another server of this data folder computes the response: send the request to it, or "
            "wait for its end.",
            code="conflict",
        )


@router.delete("/responses/{response_id}", **route_docs(ResponseDeleted))
async def delete_response(request: Request, response_id: str) -> dict[str, Any]:
    """Delete a stored response. Its bytes are overwritten."""
    stored, owner = stored_of(request)
    await asyncio.to_thread(stored.get, "response", response_id, owner)  # 404 for other keys
    await stored.stop(response_id)
    await asyncio.to_thread(stored.delete, "response", response_id, owner)
    return {"id": response_id, "object": "response", "deleted": True}
