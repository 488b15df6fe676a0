"""POST /v1/completions: continue a text.

The prompt is text, token ids, or a list of either; choice ``i * n + j`` is the j-th continuation of
prompt i. Special tokens spelled out in a prompt are special here, unlike in a chat: the prompt is
one person's text, and fill-in-the-middle is written with them. An empty prompt is the start of a
document. Logprobs are those of the model's own distribution, before temperature and penalties;
``logprobs: 0`` asks for the chosen token's alone.

Not yet: echo, suffix, best_of.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, cast

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bpe import Encoding, Tokenizer
from serve.api.context import PROMPT, refuse_hopeless, room
from serve.api.generation import Generation, refuse_foreign_ids
from serve.api.models import registry_of
from serve.api.pieces import FinishReason, Placed, finite, token_text
from serve.api.schemas import CompletionBody, read_json
from serve.api.sse import event_stream, unless_disconnected
from serve.engine import ServedModel
from serve.errors import APIError, unsupported

router = APIRouter()

DEFAULT_MAX_TOKENS = 16


@router.post("/completions")
async def create_completion(request: Request) -> Response:
    body = await read_json(request, CompletionBody)
    _refuse_unsupported(body)
    model = registry_of(request).resolve(body.model)
    # Megabytes of text take seconds to encode: not on the loop that serves everybody.
    generation = await asyncio.to_thread(_plan, body, model)
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.id,
        "system_fingerprint": model.fingerprint,
    }
    if body.stream:
        return await event_stream(request, _chunks(body, generation, head))
    choices = await unless_disconnected(request.receive, generation.choices())
    encoding = model.tokenizer.encoding
    return JSONResponse(
        {
            **head,
            "choices": [
                _choice(body, encoding, index, choice.text, choice.tokens, choice.finish_reason)
                for index, choice in enumerate(choices)
            ],
            "usage": generation.usage.body(),
        }
    )


async def _chunks(
    body: CompletionBody, generation: Generation, head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    encoding = generation.model.tokenizer.encoding
    include_usage = body.stream_options.include_usage
    tail = {"usage": None} if include_usage else {}
    async with aclosing(generation.pieces()) as pieces:
        async for index, piece in pieces:
            choice = _choice(body, encoding, index, piece.text, piece.tokens, piece.finish_reason)
            yield {**head, "choices": [choice], **tail}
    if include_usage:
        yield {**head, "choices": [], "usage": generation.usage.body()}


def _choice(
    body: CompletionBody,
    encoding: Encoding,
    index: int,
    text: str,
    tokens: Sequence[Placed],
    finish_reason: FinishReason | None,
) -> dict[str, Any]:
    return {
        "text": text,
        "index": index,
        "logprobs": None if body.logprobs is None else _logprobs(encoding, tokens),
        "finish_reason": finish_reason,
    }


def _logprobs(encoding: Encoding, tokens: Sequence[Placed]) -> dict[str, Any]:
    def name(token: int) -> str:
        return token_text(encoding.decode_single_token_bytes(token))

    alternatives: list[dict[str, float]] = []
    for token in (placed.token for placed in tokens):
        named: dict[str, float] = {}
        # The chosen token is always among them. Of two that read the same the likelier stays.
        for id, logprob in (*token.top, (token.id, token.logprob)):
            named.setdefault(name(id), finite(logprob))
        alternatives.append(named)
    return {
        "tokens": [name(placed.token.id) for placed in tokens],
        "token_logprobs": [finite(placed.token.logprob) for placed in tokens],
        "top_logprobs": alternatives,
        "text_offset": [placed.offset for placed in tokens],
    }


def _plan(body: CompletionBody, model: ServedModel) -> Generation:
    prompts = _prompts(body, model)
    limits = [
        room(PROMPT, model.context, len(prompt), body.max_tokens, DEFAULT_MAX_TOKENS)
        for prompt in prompts
    ]
    return Generation(model, prompts, limits, body, body.logprobs)


def _prompts(body: CompletionBody, model: ServedModel) -> list[list[int]]:
    """The prompts as token ids."""
    single = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    prompts = cast("list[str | list[int]]", [body.prompt] if single else body.prompt)
    encoded: list[list[int]] = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            refuse_hopeless(PROMPT, model.context, model.tokenizer.encoding, prompt)
            encoded.append(_encode(model.tokenizer, prompt))
        else:
            refuse_foreign_ids(body, model, "prompt")
            path = "prompt" if single else f"prompt[{number}]"
            _check_ids(prompt, model, path)
            encoded.append(prompt)
    return encoded


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    encoding = tokenizer.encoding
    ids = encoding.encode(text, allowed_special="all")
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    if ids:
        return ids
    # Between documents models of this family saw <|endoftext|>, whatever their bos is for.
    start = (encoding.special_tokens.get("<|endoftext|>"), tokenizer.bos_id, tokenizer.eos_id)
    return [next(id for id in start if id is not None)]


def _check_ids(ids: list[int], model: ServedModel, path: str) -> None:
    size = model.tokenizer.encoding.n_vocab
    for index, id in enumerate(ids):
        if not 0 <= id < size:
            raise APIError(
                400,
                f"Invalid '{path}[{index}]': {str(id)[:20]} is not a token id of `{model.id}`. "
                f"Its ids go from 0 to {size - 1}.",
                param=f"{path}[{index}]",
                code="invalid_value",
            )


def _refuse_unsupported(body: CompletionBody) -> None:
    if body.echo:
        raise unsupported("echo", body.echo, "Only false is supported so far.")
    if body.suffix:
        raise unsupported("suffix", body.suffix, "Text can only be continued at its end so far.")
    if body.best_of > 1 and body.best_of != body.n:
        raise unsupported("best_of", body.best_of, "Only 1, or the value of n, is supported.")
