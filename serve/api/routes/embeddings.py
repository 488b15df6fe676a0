"""POST /v1/embeddings: a vector for each text.

The input is a text, token ids, or a list of either. Ids under a model's own name are its own; under
an alias they belong to the encoding of the model that the alias imitates, so they are decoded with
it and encoded again: that is how clients work that count tokens before they send (LangChain's
default). Every official client asks for base64 when its user says nothing: little-endian float32.

``dimensions`` keeps the first so many numbers of a vector and scales it to its old length. Models
that were not trained for that (Matryoshka) lose more by it than those that were.

An input that is longer than the model reads is a 400 that says so, unless the request says what to
do with it; OpenAI has none of these parameters:

- ``long_text_mode``, as in Nomic's API: "truncate" cuts the ends of texts off, "mean" averages the
  vectors of chunks (`serve/models/long_texts.py`). ``usage`` counts the tokens that were computed.
- ``truncate``: true, as in Text Embeddings Inference, is "truncate".
- ``truncate_prompt_tokens``, as in vLLM, says how many tokens to keep (-1: as many as the model
  reads).
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
from bpe import WordPiece
from serve.api.errors import APIError
from serve.api.openapi import route_docs
from serve.api.request_context import context_of
from serve.api.requests import Body, TokenIds, read_json, tag
from serve.api.responses import Embeddings
from serve.api.sse import cancel_on_disconnect
from serve.api.state import get_loaded_model
from serve.models import long_texts
from serve.models.encoder import EmbeddingModel

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
    """POST /v1/embeddings."""

    model: str
    input: Input
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    long_text_mode: Literal["truncate", "mean"] | None = None
    truncate: bool = False
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None


@router.post("/embeddings", **route_docs(Embeddings, EmbeddingsBody))
@router.post("/engines/{engine:path}/embeddings", include_in_schema=False)
async def create_embeddings(request: Request) -> Response:
    """Turn texts into vectors, to be searched, sorted and compared."""
    body = await read_json(request, EmbeddingsBody)
    model = await get_loaded_model(request, body.model, EmbeddingModel)
    width = model.cfg.d_model
    if body.dimensions is not None and body.dimensions > width:
        raise APIError(
            400,
            f"Invalid 'dimensions': integer above maximum value. `{model.id}` makes vectors of "
            f"{width} numbers: expected a value <= {width}, but got {body.dimensions} instead.",
            param="dimensions",
            code="integer_above_max_value",
        )
    # Megabytes of text take seconds to encode: not on the loop that serves everybody.
    texts = await asyncio.to_thread(_encoded, body, model)
    chunks = [chunk for text in texts for chunk in text]
    tokens = sum(map(len, chunks))
    call = context_of(request.scope)
    call.model, call.prompt_tokens = model.id, tokens
    vectors = await cancel_on_disconnect(request.receive, model.embed(chunks))
    vectors = long_texts.average(vectors, texts, normalize=model.cfg.normalize)
    found = await asyncio.to_thread(_format_vectors, body, vectors)
    return JSONResponse(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": vector}
                for index, vector in enumerate(found)
            ],
            "model": model.id,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


def _encoded(body: EmbeddingsBody, model: EmbeddingModel) -> list[list[list[int]]]:
    """The chunks of each input, mostly one: the model's token ids between [CLS] and [SEP]."""
    words, limit = model.tokenizer, _truncation_length(body, model)
    single = isinstance(body.input, str) or isinstance(body.input[0], int)
    inputs = cast("list[str | list[int]]", [body.input] if single else body.input)
    foreign = _encoding_of(body.model, model)
    encoded: list[list[list[int]]] = []
    total = 0
    for number, given in enumerate(inputs):
        path = "input" if single else f"input[{number}]"
        if isinstance(given, str):
            ids = words.encode(given)
        elif foreign is None:
            ids = _with_special_tokens(given, words, model.id, path)
        else:
            ids = words.encode(_decoded(given, foreign, body.model, path))
        if body.long_text_mode == "mean":
            chunks = long_texts.split(ids, model.context)
        else:
            chunks = long_texts.truncated(ids, limit or len(ids))
        if len(chunks[0]) > model.context:
            raise APIError(
                400,
                f"This model's maximum context length is {model.context} tokens, however you "
                f"requested {len(ids)} tokens ({len(ids)} in your input; 0 for the completion). "
                'Please reduce your input, or send "long_text_mode": "truncate" to have its end '
                'cut off, or "mean" to average the vectors of its chunks.',
                param=path,
                code="context_length_exceeded",
            )
        total += sum(map(len, chunks))
        if total > MAX_TOKENS:
            raise APIError(
                400,
                f"Invalid 'input': maximum request size is {MAX_TOKENS} tokens per request, and "
                f"inputs 0 to {number} have {total}. Send them in several requests.",
                param="input",
                code="max_tokens_per_request",
            )
        encoded.append(chunks)
    return encoded


def _encoding_of(name: str, model: EmbeddingModel) -> bpe.Encoding | None:
    """The encoding of the model that an alias imitates; None for the model's own."""
    if name == model.id:
        return None
    try:
        return bpe.encoding_for_model(name)
    except KeyError:  # an alias of the user's own imitates nobody
        return None


def _decoded(ids: list[int], encoding: bpe.Encoding, name: str, path: str) -> str:
    try:
        return encoding.decode(ids)
    except (KeyError, OverflowError):
        raise APIError(
            400,
            f"Invalid '{path}': not all of them are token ids of `{name}`, whose encoding is "
            f"{encoding.name}.",
            param=path,
            code="invalid_value",
        ) from None


def _truncation_length(body: EmbeddingsBody, model: EmbeddingModel) -> int | None:
    """To how many tokens an input is to be cut; None for not at all."""
    asked = body.truncate_prompt_tokens
    truncates = body.truncate or body.long_text_mode == "truncate"
    if body.long_text_mode == "mean" and (body.truncate or asked is not None):
        other = "truncate" if body.truncate else "truncate_prompt_tokens"
        raise APIError(
            400,
            f"Invalid 'long_text_mode': 'mean' and '{other}' exclude each other.",
            param="long_text_mode",
            code="invalid_value",
        )
    if asked in (None, -1):
        return model.context if asked == -1 or truncates else None
    if not 3 <= asked <= model.context:
        raise APIError(
            400,
            f"Invalid 'truncate_prompt_tokens': expected -1, or from 3 to {model.context}, but "
            f"got {asked} instead.",
            param="truncate_prompt_tokens",
            code="invalid_value",
        )
    return asked


def _with_special_tokens(ids: list[int], words: WordPiece, id: str, path: str) -> list[int]:
    """The model's own ids, with [CLS] and [SEP] around them if they came without."""
    for index, token in enumerate(ids):
        try:
            words.convert_ids_to_tokens([token])
        except KeyError:
            raise APIError(
                400,
                f"Invalid '{path}[{index}]': {str(token)[:20]} is not a token id of `{id}`. "
                f"Its ids go from 0 to {len(words) - 1}.",
                param=f"{path}[{index}]",
                code="invalid_value",
            ) from None
    start = [] if ids[0] == words.cls_id else [words.cls_id]
    end = [] if ids[-1] == words.sep_id else [words.sep_id]
    return [*start, *ids, *end]


def _format_vectors(body: EmbeddingsBody, vectors: np.ndarray) -> list[Any]:
    """The vectors as the client wants to have them."""
    if body.dimensions is not None:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors[:, : body.dimensions]
        kept = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors * (lengths / np.maximum(kept, 1e-12))
    if body.encoding_format == "base64":
        return [base64.b64encode(v.astype("<f4").tobytes()).decode() for v in vectors]
    return vectors.tolist()
