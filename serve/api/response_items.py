"""Items of /v1/responses: the conversation as a list of messages, calls and results of calls.

An item is a JSON object in the shape of OpenAI's API. The chat template takes messages instead: an
assistant's text and the calls after it are one message, and the result of a call is a message of
the role "tool". The text of a reasoning item belongs to the message after it.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from serve.api.errors import APIError, missing_parameter, unsupported
from serve.api.requests import Body, CalledFunction, Message, MessageToolCall, tag
from serve.jobs.store import new_id

# Types of parts, and the fields of their contents.
_PARTS = {name: "text" for name in ("input_text", "output_text", "text")}
_PARTS |= {"refusal": "refusal", "input_json": "data"}
_ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


class ItemPart(Body):
    """A part of the content of an item. Only text, refusals and JSON are supported."""

    type: str
    text: str | None = None
    refusal: str | None = None
    data: Any = None
    annotations: Any = None
    logprobs: Any = None


ItemContent = Annotated[
    Annotated[str, Tag("a string")]
    | Annotated[list[ItemPart], Field(fail_fast=True), Tag("an array of objects")],
    Discriminator(tag),
]


class InputItem(Body):
    """An item of a conversation; which fields it needs depends on its type."""

    type: str = "message"
    id: str | None = None
    status: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Any = None  # of a message: `ItemContent`; of reasoning: not read
    phase: str | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    output: ItemContent | None = None
    summary: Any = None
    encrypted_content: str | None = None


class MessageItem(InputItem):
    """A message of a conversation."""

    content: ItemContent | None = None


def _item_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "a message" if kind in (None, "message") else "an item"


Item = Annotated[
    Annotated[MessageItem, Tag("a message")] | Annotated[InputItem, Tag("an item")],
    Discriminator(_item_tag),
]
Items = Annotated[list[Item], Field(max_length=10_000, fail_fast=True)]


def to_items(input: str | Sequence[InputItem], param: str = "input") -> list[dict[str, Any]]:
    """Return the items of a request in the shape in which they are stored and listed.

    Args:
        input: The text of a user's message, or items.
        param: The path of the items in the request, for messages.

    Raises:
        APIError: 400 for an item of another type, or one without a field that its type needs.
    """
    if isinstance(input, str):
        input = [MessageItem(role="user", content=input)]
    return [_to_item(item, f"{param}[{index}]") for index, item in enumerate(input)]


def _to_item(item: InputItem, path: str) -> dict[str, Any]:
    def needed(name: str) -> Any:
        if (value := getattr(item, name)) is None:
            raise missing_parameter(f"{path}.{name}")
        return value

    match item.type:
        case "message":
            role = needed("role")
            part = "output_text" if role == "assistant" else "input_text"
            content = [
                {"type": part, "text": text}
                | ({"annotations": [], "logprobs": []} if role == "assistant" else {})
                for text in texts_of(needed("content"), f"{path}.content")
            ]
            fields: dict[str, Any] = {"role": role, "content": content}
            prefix = "msg_"
        case "function_call":
            prefix = "fc_"
            fields = {
                "call_id": needed("call_id"),
                "name": needed("name"),
                "arguments": needed("arguments"),
            }
            if item.namespace is not None:
                fields["namespace"] = item.namespace
        case "function_call_output":
            prefix = "fco_"
            output = "".join(texts_of(needed("output"), f"{path}.output"))
            fields = {"call_id": needed("call_id"), "output": output}
        case "reasoning":
            content = item.content if isinstance(item.content, list) else []
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            parts = [{"type": "reasoning_text", "text": t} for t in texts if isinstance(t, str)]
            return {"type": "reasoning", "id": new_id("rs_"), "summary": [], "content": parts}
        case "item_reference":
            return {"type": "item_reference", "id": needed("id")}
        case _:
            raise unsupported(
                f"{path}.type", item.type, f"Supported values are: {', '.join(_ITEM_TYPES)}."
            )
    return {"type": item.type, "id": new_id(prefix), "status": "completed", **fields}


def texts_of(content: str | Sequence[ItemPart], path: str) -> list[str]:
    """Return the texts of a content. JSON becomes text.

    Raises:
        APIError: 400 for a part of another type, such as an image, or one without its field.
    """
    if isinstance(content, str):
        return [content]
    texts = []
    for number, part in enumerate(content):
        if (name := _PARTS.get(part.type)) is None:
            raise unsupported(
                f"{path}[{number}].type",
                part.type,
                f"Supported values are: {', '.join(_PARTS)}.",
            )
        if (value := getattr(part, name)) is None:
            raise missing_parameter(f"{path}[{number}].{name}")
        texts.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return texts


def qualified_name(namespace: str | None, name: str) -> str:
    """Return the name of a function for the model, which knows no namespaces."""
    return name if namespace is None else f"{namespace}__{name}"


def to_messages(items: Sequence[dict[str, Any]], num_stored: int = 0) -> list[Message]:
    """Return the messages of a conversation for `tools.template_messages`.

    Args:
        items: The items, as `to_items` returns them.
        num_stored: Number of items at the beginning that are not from this request, for messages.

    Raises:
        APIError: 400 for the result of a call that is not in the conversation.
    """
    messages: list[Message] = []
    call_ids: set[str] = set()
    reasoning: str | None = None  # of the next message of the assistant

    def answer(text: str | None = None) -> Message:
        nonlocal reasoning
        message = Message(role="assistant", content=text, reasoning_content=reasoning)
        reasoning = None
        return message

    for index, item in enumerate(items):
        match item["type"]:
            case "message":
                text = "".join(part["text"] for part in item["content"])
                is_answer = item["role"] == "assistant"
                messages.append(
                    answer(text) if is_answer else Message(role=item["role"], content=text)
                )
            case "reasoning":
                reasoning = "".join(part["text"] for part in item.get("content", ())) or None
            case "function_call":
                call_ids.add(item["call_id"])
                if not messages or messages[-1].role != "assistant" or reasoning:
                    messages.append(answer())
                name = qualified_name(item.get("namespace"), item["name"])
                function = CalledFunction(name=name, arguments=item["arguments"])
                call = MessageToolCall(id=item["call_id"], function=function)
                messages[-1].tool_calls = [*messages[-1].tool_calls, call]
            case "function_call_output":
                if item["call_id"] not in call_ids:
                    path = f"input[{index - num_stored}].call_id"
                    raise APIError(
                        400,
                        f"No tool call found for function call output with call_id "
                        f"{item['call_id'][:80]}.",
                        param=path,
                        code="invalid_value",
                    )
                messages.append(
                    Message(role="tool", tool_call_id=item["call_id"], content=item["output"])
                )
    return messages
