"""POST /v1/rerank and /v1/score: the relevance of documents to a question.

OpenAI has no such routes. ``/v1/rerank`` has the fields that Cohere, Jina and vLLM share: ``query``
and ``documents`` in, the most relevant documents out, with index and ``relevance_score``. As in
vLLM, the route is also at ``/rerank`` and ``/v2/rerank``. ``/v1/score`` is vLLM's: the score of
each pair of ``text_1`` and ``text_2`` (or ``queries`` and ``documents``), in the order of the
request.

A cross-encoder reads question and document together. An embedding model is accepted as well, and
is the default if no cross-encoder is served: the score is then the cosine similarity of the two
vectors, computed with the model's prompts for queries and documents. The field ``method`` of the
response, an extension, is "cross_encoder" or "embeddings".

A pair that is longer than the model's context returns 400, unless ``truncate`` (Text Embeddings
Inference), ``truncate_prompt_tokens`` (vLLM) or ``max_tokens_per_doc`` (Cohere) cuts it.
"""

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request

from serve.api.errors import APIError
from serve.api.openapi import route_docs
from serve.api.request_context import context_of
from serve.api.requests import Body, read_json, tag
from serve.api.responses import Rerank, Scores
from serve.api.routes.embeddings import Text, check_known, check_total, truncation_length
from serve.api.sse import cancel_on_disconnect
from serve.api.state import get_loaded_model, state_of
from serve.api.unused_fields import UNUSED
from serve.exceptions import UnknownModel
from serve.models.encoder import EmbeddingModel
from serve.models.reranker import RerankModel

router = APIRouter()

MAX_DOCUMENTS = 2048  # in one request
# Prompt names that sentence-transformers looks for, in this order.
_QUERY_PROMPTS = ("query",)
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")
_ERRORS = {
    400: "A field is missing or invalid; `context_length_exceeded`: a pair is too long.",
    404: "`model_not_found`: no such model, or it does not rank documents.",
    503: "`model_not_ready`: the model cannot be loaded; or too many requests wait.",
}


class RerankText(Body):
    """A document that is sent as an object with a text."""

    text: Text


Document = Annotated[
    Annotated[Text, Tag("a string")] | Annotated[RerankText, Tag("an object")], Discriminator(tag)
]
Texts = Annotated[
    Annotated[Text, Tag("a string")]
    | Annotated[
        list[Text],
        Field(min_length=1, max_length=MAX_DOCUMENTS, fail_fast=True),
        Tag("an array of strings"),
    ],
    Discriminator(tag),
]


class Truncation(Body):
    """The fields that both routes have: the model, and how to cut texts that are too long."""

    model: str = Field(
        "", description="Empty: the first served cross-encoder, or else the first embedding model."
    )
    truncate: bool = Field(False, description="Cut pairs that exceed the model's context.")
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = Field(
        None, description="Cut pairs to this many tokens; -1: to the model's context."
    )
    max_tokens_per_doc: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Cut each document to this many tokens."
    )
    user: Annotated[str | None, UNUSED] = None


class RerankBody(Truncation):
    """Body of POST /v1/rerank."""

    query: Text
    documents: Annotated[
        list[Document], Field(min_length=1, max_length=MAX_DOCUMENTS, fail_fast=True)
    ]
    top_n: int = Field(0, ge=0, description="The number of results; 0: all documents.")
    return_documents: bool = Field(True, description="Whether results repeat the documents.")


class ScoreBody(Truncation):
    """Body of POST /v1/score, with text_1 and text_2, or with queries and documents."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None


@router.post("/v1/rerank", **route_docs(Rerank, RerankBody, errors=_ERRORS))
@router.post("/rerank", include_in_schema=False)
@router.post("/v2/rerank", include_in_schema=False)
async def rerank(request: Request) -> dict[str, Any]:
    """Sort documents by their relevance to a question."""
    body = await read_json(request, RerankBody)
    texts = [text if isinstance(text, str) else text.text for text in body.documents]
    paths = [f"documents[{i}]" for i in range(len(texts))]
    pairs = [("query", body.query, path, text) for path, text in zip(paths, texts, strict=True)]
    model, scores, num_tokens = await _score(request, body, pairs)
    order = np.argsort(-scores, kind="stable")[: body.top_n or None]
    results = [
        {"index": int(i), "relevance_score": float(scores[i])}
        | ({"document": {"text": texts[i]}} if body.return_documents else {})
        for i in order
    ]
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": model.id,
        "method": _method(model),
        "results": results,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


@router.post("/v1/score", **route_docs(Scores, ScoreBody, errors=_ERRORS))
@router.post("/score", include_in_schema=False)
async def score(request: Request) -> dict[str, Any]:
    """Return the relevance of one text to another, for each pair."""
    body = await read_json(request, ScoreBody)
    model, scores, num_tokens = await _score(request, body, _pairs(body))
    return {
        "id": f"score-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model.id,
        "method": _method(model),
        "data": [
            {"index": i, "object": "score", "score": float(value)} for i, value in enumerate(scores)
        ],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


# The question's path in the request (such as "queries[0]"), the question, and the same two strings
# of the document.
Pair = tuple[str, str, str, str]


def _pairs(body: ScoreBody) -> list[Pair]:
    """Return the pairs of a request: one question for all documents, or one for each document."""
    names = ("queries", "documents") if body.queries is not None else ("text_1", "text_2")
    others = ("text_1", "text_2") if names[0] == "queries" else ("queries", "documents")
    for name in names:
        if getattr(body, name) is None:
            raise APIError(
                400,
                f"Missing required parameter: '{name}'. Send text_1 and text_2, or queries and "
                "documents.",
                param=name,
                code="missing_required_parameter",
            )
    for name in others:
        if getattr(body, name) is not None:
            raise APIError(
                400,
                f"Invalid '{name}': it cannot be combined with '{names[0]}' and '{names[1]}'.",
                param=name,
                code="invalid_value",
            )
    sides = []
    for name in names:
        value = getattr(body, name)
        is_single = isinstance(value, str)
        sides.append(
            [(name, value)]
            if is_single
            else [(f"{name}[{i}]", text) for i, text in enumerate(value)]
        )
    first, second = sides
    if len(first) not in (1, len(second)):
        raise APIError(
            400,
            f"Invalid '{names[1]}': expected one text for each of the {len(first)} texts of "
            f"'{names[0]}', but got {len(second)} instead.",
            param=names[1],
            code="invalid_value",
        )
    first = first * len(second) if len(first) == 1 else first
    return [(*a, *b) for a, b in zip(first, second, strict=True)]


async def _score(
    request: Request, body: Truncation, pairs: Sequence[Pair]
) -> tuple[RerankModel | EmbeddingModel, np.ndarray, int]:
    """Return the model, the score of each pair, and the number of tokens."""
    model = await _get_model(request, body.model)
    context = context_of(request.scope)
    context.model = model.id
    if isinstance(model, RerankModel):
        # Megabytes of text take seconds to encode, which would block the event loop.
        encoded = await asyncio.to_thread(_encode_pairs, body, model, pairs)
        context.prompt_tokens = sum(len(ids) for ids, _ in encoded)
        scores = await cancel_on_disconnect(request.receive, model.score(encoded))
        return model, scores, context.prompt_tokens
    texts, text_indices = await asyncio.to_thread(_encode_texts, body, model, pairs)
    context.prompt_tokens = sum(map(len, texts))
    vectors = await cancel_on_disconnect(request.receive, model.embed(texts))
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    first, second = (vectors[list(side)] for side in zip(*text_indices, strict=True))
    return model, (first * second).sum(1), context.prompt_tokens


async def _get_model(request: Request, name: str) -> RerankModel | EmbeddingModel:
    registry = state_of(request).registry
    served = registry.list_models()
    rerankers = [model.id for model in served if model.kind == RerankModel.kind]
    encoders = [model.id for model in served if model.kind == EmbeddingModel.kind]
    if not name and not rerankers + encoders:
        raise UnknownModel("")
    name = name or (rerankers + encoders)[0]
    kind = registry.resolve(name).kind
    if kind == RerankModel.kind or (rerankers and kind != EmbeddingModel.kind):
        return await get_loaded_model(request, name, RerankModel)
    return await get_loaded_model(request, name, EmbeddingModel)


def _method(model: RerankModel | EmbeddingModel) -> str:
    return "cross_encoder" if isinstance(model, RerankModel) else "embeddings"


def _encode_pairs(
    body: Truncation, model: RerankModel, pairs: Sequence[Pair]
) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of each pair, special tokens included, and their token type ids."""
    tokenizer = model.tokenizer
    num_special = len(tokenizer.process_pair([], [])[0])
    limit = _limit(body, model.context, num_special + 2)
    questions: dict[str, list[int]] = {}
    encoded, total = [], 0
    for first_path, first, second_path, second in pairs:
        if first not in questions:
            questions[first] = model.encode(first, is_question=True)
            check_known(questions[first] or [0], model, first_path)
        question = questions[first]
        document = model.encode(second)[: body.max_tokens_per_doc]
        check_known(document or [0], model, second_path)
        length = len(question) + len(document) + num_special
        if limit is None and length > model.context:
            alone = len(question) + num_special
            path = first_path if alone >= model.context else second_path
            raise _too_long(path, length, model.context)
        encoded.append(tokenizer.process_pair(question, document, limit))
        total += len(encoded[-1][0])
        check_total(total, second_path)
    return encoded


def _encode_texts(
    body: Truncation, model: EmbeddingModel, pairs: Sequence[Pair]
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Return the token ids of the distinct texts, and the indices of each pair's two texts."""
    limit = _limit(body, model.context, model.num_special + 1)
    prompts = [
        next((name for name in names if name in model.prompts), None)
        for names in (_QUERY_PROMPTS, _DOCUMENT_PROMPTS)
    ]
    texts: list[list[int]] = []
    indices: dict[tuple[str | None, str], int] = {}
    total = 0

    def index_of(prompt: str | None, path: str, text: str, max_tokens: int | None) -> int:
        nonlocal total
        if (prompt, text) not in indices:
            ids = model.encode(text, prompt)
            check_known(ids, model, path)
            if max_tokens is not None:
                ids = model.truncate(ids, max_tokens + model.num_special)[0]
            if limit is not None:
                ids = model.truncate(ids, limit)[0]
            if len(ids) > model.context:
                raise _too_long(path, len(ids), model.context)
            total += len(ids)
            check_total(total, path)
            indices[prompt, text] = len(texts)
            texts.append(ids)
        return indices[prompt, text]

    text_indices = [
        (
            index_of(prompts[0], first_path, first, None),
            index_of(prompts[1], second_path, second, body.max_tokens_per_doc),
        )
        for first_path, first, second_path, second in pairs
    ]
    return texts, text_indices


def _limit(body: Truncation, context: int, least: int) -> int | None:
    return truncation_length(body.truncate_prompt_tokens, body.truncate, least, context)


def _too_long(path: str, length: int, context: int) -> APIError:
    return APIError(
        400,
        f"This model's maximum context length is {context} tokens, but with '{path}' the input has "
        f'{length}, special tokens included. Shorten it, or send "truncate": true to cut it.',
        param=path,
        code="context_length_exceeded",
    )
