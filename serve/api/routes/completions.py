"""POST /v1/completions: continue a text.

The prompt is text, token ids, or a list of either. Choice ``i * n + j`` is the j-th continuation of
prompt i. Special tokens spelled out in a prompt are encoded as special tokens, unlike in a chat,
because fill-in-the-middle prompts contain them. An empty prompt is the start of a document.
Logprobs are those of the model's distribution before temperature and penalties; ``logprobs: 0``
requests only that of the chosen token. With ``echo`` the prompt has logprobs too, which scores a
text; the first token has none, because no prediction precedes it. If the model ends the text, the
end-of-text token is the last of the logprobs and not part of the text.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bpe import Encoding, Tokenizer
from serve.api.context_window import COMPLETION_WORDING, refuse_too_long, resolve_max_tokens
from serve.api.detokenize import TextDelta, TokenWithOffset, clamp_logprob, token_text
from serve.api.errors import APIError
from serve.api.generation import (
    Choice,
    Generation,
    Prompt,
    prompt_logprobs_to_api,
    refuse_streamed_prompt_logprobs,
)
from serve.api.infill import infill_prompt
from serve.api.openapi import route_docs
from serve.api.request_context import RequestContext, context_of
from serve.api.requests import CompletionBody, read_json
from serve.api.responses import Completion, CompletionChunk
from serve.api.sse import cancel_on_disconnect, event_stream
from serve.api.state import get_loaded_model
from serve.api.token_ids import imitated_encoding, native_ids
from serve.models.decoder import DecoderModel

router = APIRouter(prefix="/v1")

DEFAULT_MAX_TOKENS = 16


@router.post("/completions", **route_docs(Completion, CompletionBody, events=CompletionChunk))
@router.post("/engines/{engine:path}/completions", include_in_schema=False)
async def create_completion(request: Request) -> Response:
    """Continue a text, score it, or fill in the text before a suffix."""
    body = await read_json(request, CompletionBody)
    _refuse_contradictions(body)
    refuse_streamed_prompt_logprobs(body)
    model = await get_loaded_model(request, body.model, DecoderModel)
    # Megabytes of text take seconds to encode, which would block the event loop.
    generation = await asyncio.to_thread(_build_generation, body, model, context_of(request.scope))
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.id,
        "system_fingerprint": model.fingerprint,
    }
    if body.stream:
        return await event_stream(request, _chunks(body, generation, head))
    work = (
        generation.best(body.n) if generation.choices_per_prompt > body.n else generation.choices()
    )
    choices = await cancel_on_disconnect(request.receive, work)
    encoding = model.tokenizer.encoding
    replies = [_choice(body, encoding, index, choice) for index, choice in enumerate(choices)]
    if body.prompt_logprobs is not None:
        for index, reply in enumerate(replies):
            tokens = generation.prompt_logprobs[index // body.n]
            reply["prompt_logprobs"] = prompt_logprobs_to_api(encoding, tokens)
    return JSONResponse(
        {
            **head,
            "choices": replies,
            "usage": generation.usage.to_api(),
        }
    )


async def _chunks(
    body: CompletionBody, generation: Generation, head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    encoding = generation.model.tokenizer.encoding
    include_usage = body.stream_options.include_usage
    tail = {"usage": None} if include_usage else {}
    async with aclosing(generation.text_deltas()) as deltas:
        async for index, delta in deltas:
            choice = _choice(body, encoding, index, delta)
            yield {**head, "choices": [choice], **tail}
    if include_usage:
        yield {**head, "choices": [], "usage": generation.usage.to_api()}


def _choice(
    body: CompletionBody, encoding: Encoding, index: int, output: Choice | TextDelta
) -> dict[str, Any]:
    # The logprobs include the end token: evaluation harnesses score a text by requesting one token
    # more than it has and dropping the last entry.
    tokens = [*output.tokens, output.end_token] if output.end_token else output.tokens
    return {
        "text": output.text,
        "index": index,
        "logprobs": None if body.logprobs is None else _logprobs(encoding, tokens),
        "finish_reason": output.finish_reason,
    }


def _logprobs(encoding: Encoding, tokens: Sequence[TokenWithOffset]) -> dict[str, Any]:
    def name(token: int) -> str:
        return token_text(encoding.decode_single_token_bytes(token))

    chosen: list[float | None] = []
    alternatives: list[dict[str, float] | None] = []
    for token in (item.token for item in tokens):
        if token.logprob is None:  # the first token of an echoed prompt
            chosen.append(None)
            alternatives.append(None)
            continue
        logprobs: dict[str, float] = {}
        # Includes the chosen token. Of two tokens with the same text the likelier one counts.
        for id, logprob in (*token.top_logprobs, (token.id, token.logprob)):
            logprobs.setdefault(name(id), clamp_logprob(logprob))
        chosen.append(clamp_logprob(token.logprob))
        alternatives.append(logprobs)
    return {
        "tokens": [name(item.token.id) for item in tokens],
        "token_logprobs": chosen,
        "top_logprobs": alternatives,
        "text_offset": [item.offset for item in tokens],
    }


def _build_generation(
    body: CompletionBody, model: DecoderModel, request_context: RequestContext
) -> Generation:
    choices_per_prompt = body.best_of or body.n
    # Ranking the choices needs logprobs even if the response does not contain them.
    top_logprobs = 0 if choices_per_prompt > body.n and body.logprobs is None else body.logprobs
    imitated = imitated_encoding(body.model, model.id, is_pattern=request_context.is_pattern)
    prompts = [
        _prompt(body, model, start, ids) for start, ids in _encode_prompts(body, model, imitated)
    ]
    return Generation(
        model,
        prompts,
        body,
        choices_per_prompt,
        top_logprobs,
        request_context,
        is_likelihood_scored=bool(body.best_of) or (body.echo and body.logprobs is not None),
    )


def _prompt(body: CompletionBody, model: DecoderModel, start: list[int], ids: list[int]) -> Prompt:
    """Return the prompt for the engine.

    Args:
        body: The request.
        model: The model.
        start: Token ids to insert before the text, such as BOS; see `_start_ids`.
        ids: Token ids of the text.
    """
    if body.suffix:
        prompt = infill_prompt(model.tokenizer, ids, body.suffix)
    else:
        prompt = Prompt(token_ids=[*start, *ids], max_tokens=0)
    max_tokens = resolve_max_tokens(
        COMPLETION_WORDING,
        model.context,
        len(prompt.token_ids),
        body.max_tokens,
        DEFAULT_MAX_TOKENS,
    )
    echo_ids = ids if body.echo else []
    has_prompt_logprobs = bool(echo_ids) and body.logprobs is not None
    return replace(
        prompt,
        max_tokens=max_tokens,
        echo_ids=echo_ids,
        has_prompt_logprobs=has_prompt_logprobs,
        prompt_logprobs=body.prompt_logprobs,
    )


def _encode_prompts(
    body: CompletionBody, model: DecoderModel, imitated: Encoding | None
) -> list[tuple[list[int], list[int]]]:
    """Return two lists per prompt: the token ids to insert before it, and its own token ids."""
    tokenizer = model.tokenizer
    is_single = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    prompts = cast("list[str | list[int]]", [body.prompt] if is_single else body.prompt)
    encoded: list[tuple[list[int], list[int]]] = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            refuse_too_long(COMPLETION_WORDING, model.context, tokenizer.encoding, prompt)
            ids = tokenizer.encoding.encode(prompt, allowed_special="all")
            encoded.append((_start_ids(tokenizer, ids), ids))
        else:
            path = "prompt" if is_single else f"prompt[{number}]"
            encoded.append(([], native_ids(prompt, body.model, model, path, imitated)))
    return encoded


def _start_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Return the token ids to insert before a text with the token ids `ids`, such as BOS."""
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        return [] if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id]
    if ids:
        return []
    # Models of this family were trained with <|endoftext|> between documents, not with their BOS.
    end_of_text = tokenizer.encoding.special_tokens.get("<|endoftext|>")
    candidates = (end_of_text, tokenizer.bos_id, tokenizer.eos_id)
    return [next(id for id in candidates if id is not None)]


def _refuse_contradictions(body: CompletionBody) -> None:
    def bad(message: str, param: str) -> APIError:
        return APIError(400, message, param=param, code="invalid_value")

    if body.best_of and body.best_of < body.n:
        raise bad(
            "You requested that the server return more choices than it will generate (HINT: you "
            f"must set 'n' (currently {body.n}) to be at most 'best_of' (currently "
            f"{body.best_of}), or omit either parameter if you don't specifically want to use "
            "them.)",
            "best_of",
        )
    if body.stream and body.best_of > body.n:
        raise bad(
            f"Invalid 'best_of': all {body.best_of} choices must be complete to rank them, so they "
            "cannot be streamed. Leave out 'best_of' or 'stream'.",
            "best_of",
        )
    if body.suffix and body.echo and body.logprobs is not None:
        raise bad(
            "Invalid 'echo': with 'suffix' the prompt is part of a fill-in-the-middle prompt, so "
            "it has no logprobs to return. Leave out 'echo', 'suffix' or 'logprobs'.",
            "echo",
        )
