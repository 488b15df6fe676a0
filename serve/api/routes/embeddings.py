"""POST /v1/embeddings: a vector for each text.

The input is a text, token ids, or a list of either. If the request names the served model by its
id, the token ids are those of its vocabulary. If the request names an alias that is an OpenAI
model, the token ids are those of OpenAI's encoding, so they are decoded to text and encoded again;
clients that tokenize before they send (LangChain's default) rely on this. OpenAI's client requests
base64 by default: little-endian float32.

``dimensions`` keeps the first components of a vector and rescales it to its original norm. Models
trained for this (Matryoshka embeddings) lose less quality than others.

A model may have prompts: texts such as "query: " that stood before the inputs in its training. Its
default prompt is put before each text, as in sentence-transformers, but not before token ids;
``prompt_name``, as in Text Embeddings Inference, selects another one.

An input longer than the model's context returns 400, unless one of these extensions to OpenAI's API
handles it:

- ``long_text_mode``, as in Nomic's API: "truncate" cuts off the ends of texts, "mean" averages the
  vectors of chunks (`serve/models/long_texts.py`). ``usage`` counts the computed tokens.
- ``truncate``, as in Text Embeddings Inference: true means "truncate".
- ``truncate_prompt_tokens``, as in vLLM: the number of tokens to keep (-1: the model's context).
"""

import asyncio
import base64
from typing import Annotated, Any, Literal, cast

import numpy as np
from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import bpe
from serve.api.errors import APIError
from serve.api.openapi import route_docs
from serve.api.request_context import context_of
from serve.api.requests import Body, TokenIds, read_json, tag
from serve.api.responses import Embeddings
from serve.api.sse import cancel_on_disconnect
from serve.api.state import get_loaded_model
from serve.api.token_ids import imitated_encoding
from serve.api.unused_fields import UNUSED
from serve.models.encoder import EmbeddingModel
from serve.models.reranker import RerankModel

router = APIRouter(prefix="/v1")

MAX_TOKENS = 300_000  # in one request

Text = Annotated[str, Field(min_length=1)]
Input = Annotated[
    Annotated[Text, Tag("a string")]
    | Annotated[
        list[Text], Field(min_length=1, max_length=2048, fail_fast=True), Tag("an array of strings")
    ]
    | Annotated[TokenIds, Tag("an array of integers")]
    | Annotated[list[TokenIds], Field(max_length=2048, fail_fast=True), Tag("an array of arrays")],
    Discriminator(tag),
]


class EmbeddingsBody(Body):
    """Body of POST /v1/embeddings."""

    model: str
    input: Input
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    long_text_mode: Literal["truncate", "mean"] | None = None
    truncate: bool = False
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    prompt_name: str | None = None
    user: Annotated[str | None, UNUSED] = None


@router.post("/embeddings", **route_docs(Embeddings, EmbeddingsBody))
@router.post("/engines/{engine:path}/embeddings", include_in_schema=False)
async def create_embeddings(request: Request) -> Response:
    """Embed texts as vectors, for search, classification and comparison."""
    body = await read_json(request, EmbeddingsBody)
    model = await get_loaded_model(request, body.model, EmbeddingModel)
    width = model.cfg.embedding_width
    if body.dimensions is not None and body.dimensions > width:
        raise APIError(
            400,
            f"Invalid 'dimensions': integer above maximum value. Vectors of `{model.id}` have "
            f"{width} dimensions: expected a value <= {width}, but got {body.dimensions} instead.",
            param="dimensions",
            code="integer_above_max_value",
        )
    # Megabytes of text take seconds to encode, which would block the event loop.
    context = context_of(request.scope)
    imitated = imitated_encoding(body.model, model.id, is_pattern=context.is_pattern)
    texts = await asyncio.to_thread(_encode_inputs, body, model, imitated)
    chunks = [chunk for text in texts for chunk in text]
    num_tokens = sum(map(len, chunks))
    context.model, context.prompt_tokens = model.id, num_tokens
    vectors = await cancel_on_disconnect(request.receive, model.embed(chunks))
    vectors = model.average(vectors, texts)
    embeddings = await asyncio.to_thread(_format_vectors, body, vectors)
    return JSONResponse(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": vector}
                for index, vector in enumerate(embeddings)
            ],
            "model": model.id,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
    )


def _encode_inputs(
    body: EmbeddingsBody, model: EmbeddingModel, imitated: bpe.Encoding | None
) -> list[list[list[int]]]:
    """Return the chunks of each input (usually one chunk): token ids with special tokens."""
    limit = _truncation_length(body, model)
    check_prompt_name(body.prompt_name, model)
    is_single = isinstance(body.input, str) or isinstance(body.input[0], int)
    inputs = cast("list[str | list[int]]", [body.input] if is_single else body.input)
    encoded: list[list[list[int]]] = []
    total = 0
    for number, text_or_ids in enumerate(inputs):
        path = "input" if is_single else f"input[{number}]"
        if isinstance(text_or_ids, str):
            ids = model.encode(text_or_ids, body.prompt_name)
        elif imitated is None:
            ids = _with_special_tokens(text_or_ids, model, path)
        else:
            text = _decode(text_or_ids, imitated, body.model, path)
            ids = model.encode(text, body.prompt_name)
        check_known(ids, model, path)
        if body.long_text_mode == "mean":
            chunks = model.split(ids)
        else:
            chunks = model.truncate(ids, limit or len(ids))
        if len(chunks[0]) > model.context:
            raise APIError(
                400,
                f"This model's maximum context length is {model.context} tokens, however you "
                f"requested {len(ids)} tokens ({len(ids)} in your input; 0 for the completion). "
                'Please reduce your input, or send "long_text_mode": "truncate" to cut off its '
                'end, or "mean" to average the vectors of its chunks.',
                param=path,
                code="context_length_exceeded",
            )
        total += sum(map(len, chunks))
        check_total(total, path)
        encoded.append(chunks)
    return encoded


def _decode(ids: list[int], encoding: bpe.Encoding, name: str, path: str) -> str:
    try:
        return encoding.decode(ids)
    except (KeyError, OverflowError):
        raise APIError(
            400,
            f"Invalid '{path}': some values are not token ids of `{name}`, whose encoding is "
            f"{encoding.name}. Send text, or ids from 0 to {encoding.n_vocab - 1}.",
            param=path,
            code="invalid_value",
        ) from None


def _truncation_length(body: EmbeddingsBody, model: EmbeddingModel) -> int | None:
    """Return the number of tokens to truncate an input to; None for no truncation.

    Raises:
        APIError: 400 for fields that contradict each other, or a number out of range.
    """
    num_tokens = body.truncate_prompt_tokens
    truncates = body.truncate or body.long_text_mode == "truncate"
    if body.long_text_mode == "mean" and (body.truncate or num_tokens is not None):
        conflict = "truncate" if body.truncate else "truncate_prompt_tokens"
        raise APIError(
            400,
            f"Invalid 'long_text_mode': 'mean' cannot be combined with '{conflict}'. Leave out one "
            "of them.",
            param="long_text_mode",
            code="invalid_value",
        )
    return truncation_length(num_tokens, truncates, model.num_special + 1, model.context)


def truncation_length(
    num_tokens: int | None, truncates: bool, least: int, context: int
) -> int | None:
    """Return the number of tokens to truncate an input to; None for no truncation.

    Args:
        num_tokens: ``truncate_prompt_tokens``; -1 stands for the context.
        truncates: whether another field asks to truncate to the context.
        least: the minimum of ``num_tokens``.
        context: the maximum tokens of an input.

    Raises:
        APIError: 400 if ``num_tokens`` is out of range.
    """
    if num_tokens in (None, -1):
        return context if num_tokens == -1 or truncates else None
    if not least <= num_tokens <= context:
        raise APIError(
            400,
            f"Invalid 'truncate_prompt_tokens': expected -1 or a number from {least} to {context}, "
            f"but got {num_tokens} instead.",
            param="truncate_prompt_tokens",
            code="invalid_value",
        )
    return num_tokens


def check_total(total: int, path: str) -> None:
    """Raise APIError (400) if the texts up to ``path`` have more than `MAX_TOKENS` tokens."""
    if total > MAX_TOKENS:
        param = path.partition("[")[0]
        raise APIError(
            400,
            f"Invalid '{param}': maximum request size is {MAX_TOKENS} tokens per request, and the "
            f"texts up to '{path}' have {total}. Send them in several requests.",
            param=param,
            code="max_tokens_per_request",
        )


def check_prompt_name(name: str | None, model: EmbeddingModel) -> None:
    """Raise APIError (400) if the model has no prompt of this name."""
    if name is not None and name not in model.prompts:
        known = ", ".join(map(repr, model.prompts)) or "none"
        raise APIError(
            400,
            f"Invalid 'prompt_name': '{name[:80]}' is not a prompt of `{model.id}`. "
            f"Its prompts are: {known}.",
            param="prompt_name",
            code="invalid_value",
        )


def check_known(ids: list[int], model: EmbeddingModel | RerankModel, path: str) -> None:
    """Raise APIError (400) if a text has no tokens, or a special token that has no embedding."""
    if not ids:
        raise APIError(
            400,
            f"Invalid '{path}': expected a text with at least one token, but got a text without "
            "tokens.",
            param=path,
            code="empty_string",
        )
    if max(ids) >= model.cfg.vocab_size:
        raise APIError(
            400,
            f"Invalid '{path}': it contains a special token for which `{model.id}` has no "
            "embedding. Remove the special token.",
            param=path,
            code="invalid_value",
        )


def _with_special_tokens(ids: list[int], model: EmbeddingModel, path: str) -> list[int]:
    """Return token ids between the model's special tokens, which are added if they are missing.

    Raises:
        APIError: 400 for an id that is not in the model's vocabulary.
    """
    tokenizer = model.tokenizer
    num_ids = min(len(tokenizer), model.cfg.vocab_size)
    for index, token in enumerate(ids):
        if not 0 <= token < num_ids:
            raise APIError(
                400,
                f"Invalid '{path}[{index}]': {str(token)[:20]} is not a token id of `{model.id}`. "
                f"Use ids from 0 to {num_ids - 1}.",
                param=f"{path}[{index}]",
                code="invalid_value",
            )
    prefix, suffix = list(tokenizer.prefix_ids), list(tokenizer.suffix_ids)
    start = [] if ids[: len(prefix)] == prefix else prefix
    end = [] if suffix == ids[len(ids) - len(suffix) :] else suffix
    return [*start, *ids, *end]


def _format_vectors(body: EmbeddingsBody, vectors: np.ndarray) -> list[Any]:
    """Return the vectors [B, E] as lists of numbers or base64, with the requested dimensions."""
    if body.dimensions is not None:
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors[:, : body.dimensions]
        short_norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors * (norms / np.maximum(short_norms, 1e-12))
    if body.encoding_format == "base64":
        return [base64.b64encode(v.astype("<f4").tobytes()).decode() for v in vectors]
    return vectors.tolist()
