"""POST /v1/completions: continue a text.

The prompt is text, token ids, or a list of either; choice ``i * n + j`` is the j-th continuation of
prompt i. Special tokens spelled out in a prompt are special here, unlike in a chat: the prompt is
one person's text, and fill-in-the-middle is written with them. An empty prompt is the start of a
document. Logprobs are those of the model's own distribution, before temperature and penalties;
``logprobs: 0`` asks for the chosen token's alone. With ``echo`` they are given for the prompt too,
which scores a text: the very first token, that nothing foretold, has none. The special token that
ended a text is the last of its logprobs, and no part of its text.
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
from serve.api.generation import Choice, Generation, Prompt
from serve.api.infill import infill_prompt
from serve.api.openapi import route_docs
from serve.api.request_context import RequestContext, context_of
from serve.api.requests import CompletionBody, read_json
from serve.api.responses import Completion, CompletionChunk
from serve.api.sse import cancel_on_disconnect, event_stream
from serve.api.state import get_loaded_model
from serve.api.token_ids import native_ids
from serve.models.decoder import DecoderModel

router = APIRouter(prefix="/v1")

DEFAULT_MAX_TOKENS = 16


@router.post("/completions", **route_docs(Completion, CompletionBody, events=CompletionChunk))
@router.post("/engines/{engine:path}/completions", include_in_schema=False)
async def create_completion(request: Request) -> Response:
    """Continue a text, score it, or fill in what stands between two."""
    body = await read_json(request, CompletionBody)
    _refuse_contradictions(body)
    model = await get_loaded_model(request, body.model, DecoderModel)
    # Megabytes of text take seconds to encode: not on the loop that serves everybody.
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
    return JSONResponse(
        {
            **head,
            "choices": [
                _choice(body, encoding, index, choice) for index, choice in enumerate(choices)
            ],
            "usage": generation.usage.to_api(),
        }
    )


async def _chunks(
    body: CompletionBody, generation: Generation, head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    encoding = generation.model.tokenizer.encoding
    include_usage = body.stream_options.include_usage
    tail = {"usage": None} if include_usage else {}
    async with aclosing(generation.text_deltas()) as pieces:
        async for index, piece in pieces:
            choice = _choice(body, encoding, index, piece)
            yield {**head, "choices": [choice], **tail}
    if include_usage:
        yield {**head, "choices": [], "usage": generation.usage.to_api()}


def _choice(
    body: CompletionBody, encoding: Encoding, index: int, said: Choice | TextDelta
) -> dict[str, Any]:
    # The token that ended the text is named too: who scores a text with one token more than it
    # has, and drops that, must find it there.
    tokens = [*said.tokens, said.end_token] if said.end_token else said.tokens
    return {
        "text": said.text,
        "index": index,
        "logprobs": None if body.logprobs is None else _logprobs(encoding, tokens),
        "finish_reason": said.finish_reason,
    }


def _logprobs(encoding: Encoding, tokens: Sequence[TokenWithOffset]) -> dict[str, Any]:
    def name(token: int) -> str:
        return token_text(encoding.decode_single_token_bytes(token))

    chosen: list[float | None] = []
    alternatives: list[dict[str, float] | None] = []
    for token in (placed.token for placed in tokens):
        if token.logprob is None:  # the first of an echoed prompt
            chosen.append(None)
            alternatives.append(None)
            continue
        named: dict[str, float] = {}
        # The chosen token is always among them. Of two that read the same the likelier stays.
        for id, logprob in (*token.top_logprobs, (token.id, token.logprob)):
            named.setdefault(name(id), clamp_logprob(logprob))
        chosen.append(clamp_logprob(token.logprob))
        alternatives.append(named)
    return {
        "tokens": [name(placed.token.id) for placed in tokens],
        "token_logprobs": chosen,
        "top_logprobs": alternatives,
        "text_offset": [placed.offset for placed in tokens],
    }


def _build_generation(
    body: CompletionBody, model: DecoderModel, call: RequestContext
) -> Generation:
    copies = body.best_of or body.n
    # Choosing among more than are returned needs the logprobs, whether they are returned or not.
    top_logprobs = 0 if copies > body.n and body.logprobs is None else body.logprobs
    prompts = [_prompt(body, model, start, ids) for start, ids in _encoded(body, model)]
    is_judged = bool(body.best_of) or (body.echo and body.logprobs is not None)
    return Generation(model, prompts, body, copies, top_logprobs, call, is_judged)


def _prompt(body: CompletionBody, model: DecoderModel, start: list[int], ids: list[int]) -> Prompt:
    """What the model reads for a prompt: its own ids, and perhaps one to start a text with."""
    if body.suffix:
        prompt = infill_prompt(model.tokenizer, ids, body.suffix)
    else:
        prompt = Prompt(token_ids=[*start, *ids], max_tokens=0)
    limit = resolve_max_tokens(
        COMPLETION_WORDING,
        model.context,
        len(prompt.token_ids),
        body.max_tokens,
        DEFAULT_MAX_TOKENS,
    )
    echo = ids if body.echo else []
    is_scored = bool(echo) and body.logprobs is not None
    return replace(prompt, max_tokens=limit, echo=echo, is_scored=is_scored)


def _encoded(body: CompletionBody, model: DecoderModel) -> list[tuple[list[int], list[int]]]:
    """The prompts as token ids, each with the ids that a text is started with."""
    tokenizer = model.tokenizer
    single = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    prompts = cast("list[str | list[int]]", [body.prompt] if single else body.prompt)
    encoded: list[tuple[list[int], list[int]]] = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            refuse_too_long(COMPLETION_WORDING, model.context, tokenizer.encoding, prompt)
            ids = tokenizer.encoding.encode(prompt, allowed_special="all")
            encoded.append((_start_ids(tokenizer, ids), ids))
        else:
            path = "prompt" if single else f"prompt[{number}]"
            encoded.append(([], native_ids(prompt, body.model, model, path)))
    return encoded


def _start_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """What the model expects in front of a text that is encoded as `ids`."""
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        return [] if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id]
    if ids:
        return []
    # Between documents models of this family saw <|endoftext|>, whatever their bos is for.
    end_of_text = tokenizer.encoding.special_tokens.get("<|endoftext|>")
    start = (end_of_text, tokenizer.bos_id, tokenizer.eos_id)
    return [next(id for id in start if id is not None)]


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
            f"Invalid 'best_of': {body.best_of} choices must be finished before the best are "
            "known, so they cannot be streamed. Leave out 'best_of' or 'stream'.",
            "best_of",
        )
    if body.suffix and body.echo and body.logprobs is not None:
        raise bad(
            "Invalid 'echo': with 'suffix' the model reads the prompt in another order than it is "
            "written, so its tokens have no logprobs. Leave out one of the three.",
            "echo",
        )
