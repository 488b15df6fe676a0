"""POST /v1/chat/completions: answer a conversation.

The model's chat template turns the messages into a prompt. Special tokens spelled out in a message
are encoded as plain text. Without `max_tokens` the answer may fill the rest of the context.

The calls of tools in an answer are found by a parser as the text arrives; see `serve/api/tools.py`.
So is the reasoning of models that answer on channels (gpt-oss).
The models take no images or audio.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bpe import Encoding
from bpe.chat import RESERVED_VARIABLES
from serve.api.context_window import CHAT_WORDING, Wording, refuse_too_long, resolve_max_tokens
from serve.api.detokenize import TokenWithOffset, clamp_logprob, token_text
from serve.api.errors import APIError, unsupported
from serve.api.generation import (
    Choice,
    Generation,
    Prompt,
    prompt_logprobs_to_api,
    refuse_streamed_prompt_logprobs,
)
from serve.api.message_deltas import DeltaReader, add_delta, read_message
from serve.api.openapi import route_docs
from serve.api.request_context import RequestContext, context_of
from serve.api.requests import ChatBody, FunctionDefinition, Message, read_json, report_unused
from serve.api.responses import ChatChunk, ChatCompletion
from serve.api.routes.moderations import load_moderator, moderate_chat
from serve.api.routes.stored_chat import check_store, store_completion, store_streamed
from serve.api.sse import cancel_on_disconnect, event_stream
from serve.api.state import get_loaded_model
from serve.api.structured_output import compile_output_grammar
from serve.api.tools import (
    ToolSettings,
    compile_tools,
    prompt_with_tools,
    read_tools,
    template_messages,
)
from serve.api.unused_fields import Unused, path_part
from serve.models.decoder import DecoderModel
from serve.models.moderation import ModerationModel

router = APIRouter(prefix="/v1")


@router.post("/chat/completions", **route_docs(ChatCompletion, ChatBody, events=ChatChunk))
@router.post("/engines/{engine:path}/chat/completions", include_in_schema=False)
async def create_chat_completion(request: Request) -> Response:
    """Generate the next message of a conversation."""
    body = await read_json(request, ChatBody)
    _refuse_unsupported(body)
    if body.store:
        check_store(request)
    tools = read_tools(body)
    moderator = await load_moderator(request, body.moderation)
    model = await get_loaded_model(request, body.model, DecoderModel, needs_tools=tools is not None)
    report_unused_variables(request, body, model)
    context = context_of(request.scope)
    generation = await asyncio.to_thread(build_generation, body, tools, model, context)
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": model.id,
        "service_tier": "default",
        "system_fingerprint": model.fingerprint,
    }
    if body.stream:
        chunks = _chunks(body, tools, generation, head)
        if moderator is not None:
            chunks = _moderated(request, moderator, body, chunks, head)
        if body.store:
            chunks = store_streamed(request, body, chunks)
        return await event_stream(request, chunks)
    choices = await cancel_on_disconnect(request.receive, generation.choices())
    extra = {}
    if body.prompt_logprobs is not None:
        extra["prompt_logprobs"] = prompt_logprobs_to_api(
            model.tokenizer.encoding, generation.prompt_logprobs[0]
        )
    replies = [
        _choice(index, choice, body, tools, generation) for index, choice in enumerate(choices)
    ]
    if moderator is not None:
        answers = [text_of(reply["message"]) for reply in replies]
        prompt = prompt_text(body.messages)
        extra["moderation"] = await moderate_chat(request, moderator, prompt, answers)
    completion = {
        **head,
        "choices": replies,
        "usage": generation.usage.to_api(),
        "metadata": body.metadata,
        **extra,
    }
    if body.store:
        await store_completion(request, body, completion)
    return JSONResponse(completion)


def text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message: its content and the arguments of its calls."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    if message.get("function_call"):
        calls.append(message["function_call"])
    texts = (message.get("content"), *(call["arguments"] for call in calls))
    return "\n".join(str(text) for text in texts if text)


def prompt_text(messages: Sequence[Message]) -> str:
    """Return the texts of the messages of a conversation, to moderate them."""
    return "\n".join(map(text_of, template_messages(messages)))


async def _moderated(
    request: Request,
    model: ModerationModel,
    body: ChatBody,
    chunks: AsyncGenerator[dict[str, Any], None],
    head: dict[str, Any],
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the chunks of a completion, and one with the moderation of its texts.

    The chunk with the usage is the last one.
    """
    choices: dict[int, dict[str, Any]] = {}
    usage_chunks = []
    async with aclosing(chunks):
        async for chunk in chunks:
            for choice in chunk["choices"]:
                add_delta(choices, choice)
            if chunk["choices"]:
                yield chunk
            else:
                usage_chunks.append(chunk)
    answers = [text_of(choices[index]["message"]) for index in sorted(choices)]
    moderation = await moderate_chat(request, model, prompt_text(body.messages), answers)
    yield {**head, "choices": [], "moderation": moderation}
    for chunk in usage_chunks:
        yield chunk


def _choice(
    index: int, choice: Choice, body: ChatBody, tools: ToolSettings | None, generation: Generation
) -> dict[str, Any]:
    """Return a finished choice in OpenAI's shape."""
    message, tokens, finish_reason = read_message(
        choice,
        tools,
        generation.model,
        generation.usage,
        is_continued=body.continue_final_message,
    )
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(body, generation.model.tokenizer.encoding, tokens),
        "finish_reason": finish_reason,
    }


def report_unused_variables(
    request: Request,
    body: ChatBody,
    model: DecoderModel,
    effort_path: str = "reasoning_effort",
) -> None:
    """Report variables of the chat template that it does not read; see `unused_fields.py`.

    Args:
        request: The request.
        body: Its body, as a chat request.
        model: The model.
        effort_path: The path of `reasoning_effort` in the request.

    Raises:
        APIError: 400 for an unused variable if the server is strict.
    """
    template = model.tokenizer.chat_template
    paths = {name: f"chat_template_kwargs.{path_part(name)}" for name in body.chat_template_kwargs}
    if body.reasoning_effort is not None:
        paths = {"reasoning_effort": effort_path} | paths
    report_unused(
        request,
        [
            Unused(path, is_declared=True)
            for name, path in paths.items()
            if template is not None and name not in template.variables
        ],
    )


def _template_variables(body: ChatBody, model: DecoderModel) -> dict[str, Any]:
    """Return the variables that a request sets for the chat template.

    Raises:
        APIError: 400 for an effort that the model was not trained on, or two that differ.
    """
    effort, variables = body.reasoning_effort, body.chat_template_kwargs
    if effort is None:
        return variables
    if model.has_channels and effort not in ("low", "medium", "high"):
        raise unsupported(
            "reasoning_effort", effort, "Supported values are: 'low', 'medium' and 'high'."
        )
    if variables.get("reasoning_effort", effort) != effort:
        raise APIError(
            400,
            "Invalid 'reasoning_effort': 'chat_template_kwargs' has another value of it. Send one "
            "of them.",
            param="reasoning_effort",
            code="invalid_value",
        )
    return variables | {"reasoning_effort": effort}


async def _chunks(
    body: ChatBody, tools: ToolSettings | None, generation: Generation, head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    encoding = generation.model.tokenizer.encoding
    include_usage = body.stream_options.include_usage
    tail = {"usage": None} if include_usage else {}

    def chunk(index: int, delta: dict[str, Any], **rest: object) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**head, "choices": [choice | rest], **tail}

    readers: dict[int, DeltaReader] = {}
    started: set[int] = set()
    async with aclosing(generation.text_deltas()) as deltas:
        async for index, delta in deltas:
            if (reader := readers.get(index)) is None:
                reader = readers[index] = DeltaReader(
                    tools, generation.model, is_continued=body.continue_final_message
                )
                if tools is None:
                    yield chunk(index, {"role": "assistant", "content": ""})
            parts = list(reader.read(delta))
            if tools is not None and index not in started and (parts or delta.finish_reason):
                started.add(index)
                is_call = bool(parts) and not parts[0][0].keys() & {"content", "reasoning_content"}
                yield chunk(index, {"role": "assistant", "content": None if is_call else ""})
            for fields, tokens in parts:
                logprobs = _logprobs(body, encoding, tokens) if "content" in fields else None
                yield chunk(index, fields, logprobs=logprobs)
            if delta.finish_reason:
                generation.usage.reasoning_tokens += reader.reasoning_tokens
                reason = reader.finish_reason(delta.finish_reason)
                yield chunk(index, {}, finish_reason=reason)
    if include_usage:
        yield {**head, "choices": [], "usage": generation.usage.to_api()}


def _logprobs(
    body: ChatBody, encoding: Encoding, tokens: Sequence[TokenWithOffset]
) -> dict[str, Any] | None:
    if not body.logprobs:
        return None
    return {"content": chat_logprobs(encoding, tokens), "refusal": None}


def chat_logprobs(encoding: Encoding, tokens: Sequence[TokenWithOffset]) -> list[dict[str, Any]]:
    """Return the logprobs of tokens in the shape of chat completions and responses."""

    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        data = encoding.decode_single_token_bytes(id)
        return {"token": token_text(data), "logprob": clamp_logprob(logprob), "bytes": list(data)}

    return [
        entry(token.id, token.logprob)
        | {"top_logprobs": [entry(*alternative) for alternative in token.top_logprobs]}
        for token in (item.token for item in tokens)
    ]


def build_generation(
    body: ChatBody,
    tools: ToolSettings | None,
    model: DecoderModel,
    request_context: RequestContext,
    wording: Wording = CHAT_WORDING,
) -> Generation:
    """Return the generation of the choices of a chat request.

    Args:
        body: The request.
        tools: Its tools.
        model: The model.
        request_context: As for `Generation`.
        wording: The message for a conversation that is too long.

    Raises:
        APIError: As `encode_chat` and `Generation`, and 400 for tools that are not supported.
    """
    token_ids = encode_chat(
        wording,
        model,
        template_messages(body.messages),
        functions=tools.functions if tools else (),
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=body.continue_final_message,
        variables=_template_variables(body, model),
    )
    max_tokens = resolve_max_tokens(
        wording,
        model.context,
        len(token_ids),
        body.max_completion_tokens or body.max_tokens,
        default=model.context,
    )
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    prompts = [
        Prompt(token_ids=token_ids, max_tokens=max_tokens, prompt_logprobs=body.prompt_logprobs)
    ]
    if tools:
        output_grammar = compile_tools(tools, body, model)
    else:
        is_message = model.has_channels and not body.continue_final_message
        output_grammar = compile_output_grammar(body, model, is_message=is_message)
    return Generation(
        model,
        prompts,
        body,
        body.n,
        top_logprobs,
        request_context,
        output_grammar=output_grammar,
    )


def encode_chat(
    wording: Wording,
    model: DecoderModel,
    messages: list[dict[str, Any]],
    *,
    functions: Sequence[FunctionDefinition] = (),
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of a conversation, rendered with the model's chat template.

    Args:
        wording: The message for a conversation that is too long, such as
            `context_window.CHAT_WORDING`.
        model: A chat model.
        messages: The result of `tools.template_messages`.
        functions: The functions that the model may call.
        add_generation_prompt: Whether to append the start of the model's turn.
        continue_final_message: Whether the model continues the last message.
        variables: More variables of the template, such as "enable_thinking".

    Raises:
        APIError: 404 for a model without chat template, 400 for messages that the template refuses
            or that cannot fit the context.
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
        messages, tools = prompt_with_tools(template, model.tool_notation, messages, functions)
        # The rendered text is checked, because a template may drop or trim messages.
        parts = [*messages, *(tools or ())]
        if sum(len(str(value)) for part in parts for value in part.values()) > model.context:
            text = template.render(messages, tools=tools)
            refuse_too_long(wording, model.context, encoding, text)
        return template.encode(
            encoding,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            continue_final_message=continue_final_message,
            variables=variables,
        )
    except ValueError as error:  # many templates refuse unknown roles or orders of roles
        raise APIError(
            400, f"Invalid '{wording.param}': {error}.", param=wording.param, code="invalid_value"
        ) from None


def _refuse_unsupported(body: ChatBody) -> None:
    refuse_streamed_prompt_logprobs(body)
    if body.continue_final_message and body.add_generation_prompt:
        raise APIError(
            400,
            "Invalid 'continue_final_message': it cannot be combined with "
            "'add_generation_prompt', which starts another message.",
            param="continue_final_message",
            code="invalid_value",
        )
    for name in sorted(RESERVED_VARIABLES & body.chat_template_kwargs.keys()):
        raise APIError(
            400,
            f"Invalid 'chat_template_kwargs': the request itself sets the variable '{name}'.",
            param=f"chat_template_kwargs.{name}",
            code="invalid_value",
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(
            400,
            "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.",
            param="top_logprobs",
            code="invalid_value",
        )
