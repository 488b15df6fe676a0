"""POST /v1/chat/completions: answer a conversation.

The model's own chat template turns the messages into a prompt; what users write stays text, even if
it spells a special token. Without a limit the answer may fill the rest of the context.

Not yet: tools and functions, JSON formats. Pictures and sound are not for these models.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bpe import Encoding
from serve.api.context_window import CHAT_WORDING, Wording, refuse_too_long, resolve_max_tokens
from serve.api.detokenize import TokenWithOffset, clamp_logprob, token_text
from serve.api.errors import APIError, unsupported
from serve.api.generation import Generation, Prompt
from serve.api.openapi import route_docs
from serve.api.request_context import RequestContext, context_of
from serve.api.requests import ChatBody, Message, read_json
from serve.api.responses import ChatChunk, ChatCompletion
from serve.api.sse import cancel_on_disconnect, event_stream
from serve.api.state import get_loaded_model
from serve.models.decoder import DecoderModel

router = APIRouter(prefix="/v1")


@router.post("/chat/completions", **route_docs(ChatCompletion, ChatBody, events=ChatChunk))
@router.post("/engines/{engine:path}/chat/completions", include_in_schema=False)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    body = await read_json(request, ChatBody)
    _refuse_unsupported(body)
    model = await get_loaded_model(request, body.model, DecoderModel)
    generation = await asyncio.to_thread(_build_generation, body, model, context_of(request.scope))
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": model.id,
        "service_tier": "default",
        "system_fingerprint": model.fingerprint,
    }
    if body.stream:
        return await event_stream(request, _chunks(body, generation, head))
    choices = await cancel_on_disconnect(request.receive, generation.choices())
    return JSONResponse(
        {
            **head,
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": _logprobs(body, model.tokenizer.encoding, choice.tokens),
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": generation.usage.to_api(),
            "metadata": body.metadata,
        }
    )


async def _chunks(
    body: ChatBody, generation: Generation, head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    encoding = generation.model.tokenizer.encoding
    include_usage = body.stream_options.include_usage
    tail = {"usage": None} if include_usage else {}

    def chunk(index: int, delta: dict[str, str], **rest: object) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**head, "choices": [choice | rest], **tail}

    begun: set[int] = set()
    async with aclosing(generation.text_deltas()) as pieces:
        async for index, piece in pieces:
            if index not in begun:
                begun.add(index)
                yield chunk(index, {"role": "assistant", "content": ""})
            if piece.text:
                logprobs = _logprobs(body, encoding, piece.tokens)
                yield chunk(index, {"content": piece.text}, logprobs=logprobs)
            if piece.finish_reason:
                yield chunk(index, {}, finish_reason=piece.finish_reason)
    if include_usage:
        yield {**head, "choices": [], "usage": generation.usage.to_api()}


def _logprobs(
    body: ChatBody, encoding: Encoding, tokens: Sequence[TokenWithOffset]
) -> dict[str, Any] | None:
    if not body.logprobs:
        return None

    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        data = encoding.decode_single_token_bytes(id)
        return {"token": token_text(data), "logprob": clamp_logprob(logprob), "bytes": list(data)}

    content = [
        entry(token.id, token.logprob)
        | {"top_logprobs": [entry(*other) for other in token.top_logprobs]}
        for token in (placed.token for placed in tokens)
    ]
    return {"content": content, "refusal": None}


def _build_generation(body: ChatBody, model: DecoderModel, call: RequestContext) -> Generation:
    messages = [template_message(message, index) for index, message in enumerate(body.messages)]
    prompt = encode_chat(CHAT_WORDING, model, messages)
    wanted = body.max_completion_tokens or body.max_tokens
    limit = resolve_max_tokens(CHAT_WORDING, model.context, len(prompt), wanted, model.context)
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    whole = [Prompt(token_ids=prompt, max_tokens=limit)]
    return Generation(model, whole, body, body.n, top_logprobs, call)


def encode_chat(
    wording: Wording,
    model: DecoderModel,
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The conversation as the model reads it, up to where its own turn begins.

    Args:
        wording: what the route calls its input, `context_window.MESSAGES` or another.
        model: a chat model.
        messages: a role and a content each.
        add_generation_prompt: whether it ends with the beginning of the model's turn.

    Raises:
        APIError: 404 for a model without chat template, 400 for messages that the template refuses
            or that are far too long.
    """
    template, encoding = model.tokenizer.chat_template, model.tokenizer.encoding
    if template is None:
        raise APIError(
            404,
            "This is not a chat model and thus not supported in the v1/chat/completions endpoint. "
            "Did you mean to use v1/completions?",
            param="model",
        )
    try:
        # Only what the template leaves of the messages must fit: it may drop or trim some.
        if sum(len(message["content"]) for message in messages) > model.context:
            refuse_too_long(wording, model.context, encoding, template.render(messages))
        return template.encode(encoding, messages, add_generation_prompt=add_generation_prompt)
    except ValueError as error:  # many templates refuse roles they were not made for
        raise APIError(
            400, f"Invalid '{wording.param}': {error}.", param=wording.param, code="invalid_value"
        ) from None


def template_message(message: Message, index: int) -> dict[str, str]:
    """A message as templates know it: a role and one string."""
    path = f"messages[{index}]"
    if message.role in ("tool", "function"):
        raise unsupported(
            f"{path}.role",
            message.role,
            "Supported values are: 'developer', 'system', 'user' and 'assistant'.",
        )
    for name in ("tool_calls", "function_call"):
        if value := getattr(message, name):
            raise unsupported(f"{path}.{name}", value, "Tools are not supported so far.")
    content = message.content
    if content is None:
        raise APIError(
            400,
            "Invalid value for 'content': expected a string, got null.",
            param=f"{path}.content",
            code="invalid_value",
        )
    if isinstance(content, str):
        return {"role": message.role, "content": content}
    texts: list[str] = []
    for number, part in enumerate(content):
        part_path = f"{path}.content[{number}]"
        if part.type not in ("text", "refusal"):
            raise unsupported(f"{part_path}.type", part.type, "It reads text only.")
        text: str | None = getattr(part, part.type)
        if text is None:
            raise APIError(
                400,
                f"Missing required parameter: '{part_path}.{part.type}'.",
                param=f"{part_path}.{part.type}",
                code="missing_required_parameter",
            )
        texts.append(text)
    return {"role": message.role, "content": "".join(texts)}


def _refuse_unsupported(body: ChatBody) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(
            400,
            "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.",
            param="top_logprobs",
            code="invalid_value",
        )
    if body.response_format.type != "text":
        raise unsupported(
            "response_format.type", body.response_format.type, "Only 'text' is supported so far."
        )
    if "audio" in body.modalities:
        raise unsupported("modalities", "audio", "Only 'text' is supported.")
    for name in ("audio", "tools", "functions"):
        if value := getattr(body, name):
            raise unsupported(name, value, "Leave it out: it is not supported so far.")
    for name in ("tool_choice", "function_call"):
        if (value := getattr(body, name)) not in (None, "none", "auto"):
            raise unsupported(name, value, "Supported values are: 'none' and 'auto'.")
