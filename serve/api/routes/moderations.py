"""POST /v1/moderations, and the field `moderation` of chats and responses.

The categories are OpenAI's. The model assesses some of them; the others are false with the score 0,
no input type applies to them, and the header `x-pellucid-not-assessed` lists them. The card of the
model (GET /v1/models/{model}) has precision and recall of each category.
"""

import asyncio
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request

from serve.api.errors import APIError, as_api_error
from serve.api.openapi import route_docs
from serve.api.request_context import context_of
from serve.api.requests import Body, ModerationSettings, read_json, tag
from serve.api.responses import Moderations
from serve.api.routes.embeddings import check_total
from serve.api.sse import cancel_on_disconnect
from serve.api.state import get_loaded_model, state_of
from serve.exceptions import UnknownModel
from serve.models.moderation import ModerationModel
from transformer.engine.requests import Busy

router = APIRouter(prefix="/v1")

CATEGORIES = (
    *("harassment", "harassment/threatening", "hate", "hate/threatening", "illicit"),
    *("illicit/violent", "self-harm", "self-harm/intent", "self-harm/instructions", "sexual"),
    *("sexual/minors", "violence", "violence/graphic"),
)


class ModerationPart(Body):
    """A part of an input: a text, or an image, which no model here reads."""

    type: Literal["text", "image_url"]
    text: str = ""
    image_url: dict[str, Any] | None = None


Input = Annotated[
    Annotated[str, Tag("a string")]
    | Annotated[
        list[str], Field(min_length=1, max_length=2048, fail_fast=True), Tag("an array of strings")
    ]
    | Annotated[
        list[ModerationPart],
        Field(min_length=1, max_length=2048, fail_fast=True),
        Tag("an array of objects"),
    ],
    Discriminator(tag),
]


class ModerationsBody(Body):
    """Body of POST /v1/moderations."""

    input: Input
    model: str = "omni-moderation-latest"


@router.post("/moderations", **route_docs(Moderations, ModerationsBody))
async def create_moderation(request: Request) -> dict[str, Any]:
    """Score texts in the categories of harmful content."""
    body = await read_json(request, ModerationsBody)
    model = await _load(request, body.model)
    if isinstance(body.input, str):
        texts = [body.input]
    elif isinstance(body.input[0], str):
        texts = cast("list[str]", body.input)
    else:
        texts = [_join(cast("list[ModerationPart]", body.input))]
    results = await cancel_on_disconnect(request.receive, moderate(request, model, texts))
    return {"id": f"modr-{uuid.uuid4().hex}", "model": model.id, "results": results}


async def _load(request: Request, name: str) -> ModerationModel:
    """Return a model, and list in a header of the response what it does not assess."""
    model = await get_loaded_model(request, name, ModerationModel)
    context = context_of(request.scope)
    context.not_assessed = tuple(name for name in CATEGORIES if name not in model.thresholds)
    return model


def _join(parts: Sequence[ModerationPart]) -> str:
    """Return the text of an input in parts."""
    for index, part in enumerate(parts):
        if part.type != "text":
            raise APIError(
                400,
                f"Invalid 'input[{index}].type': the models of this server read text only: send "
                "parts of the type 'text'.",
                param=f"input[{index}].type",
                code="unsupported_value",
            )
    return "\n".join(part.text for part in parts)


async def moderate(
    request: Request, model: ModerationModel, texts: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the result of each text in OpenAI's shape.

    Raises:
        APIError: 400 if the texts are too long.
    """

    def encode() -> list[list[list[int]]]:
        encoded, total = [], 0
        for index, text in enumerate(texts):
            encoded.append(sentences := model.encode(text))
            check_total(total := total + sum(map(len, sentences)), f"input[{index}]")
        return encoded

    sentences = await asyncio.to_thread(encode)
    context = context_of(request.scope)
    context.model = context.model or model.id
    scores = await model.score(sentences)
    return [_result(model, row) for row in scores.tolist()]


def _result(model: ModerationModel, scores: Sequence[float]) -> dict[str, Any]:
    by_category = dict(zip(model.thresholds, scores, strict=True))
    categories = {
        name: by_category.get(name, 0) >= model.thresholds.get(name, 1) for name in CATEGORIES
    }
    return {
        "flagged": any(categories.values()),
        "categories": categories,
        "category_scores": {name: by_category.get(name, 0.0) for name in CATEGORIES},
        "category_applied_input_types": {
            name: ["text"] if name in by_category else [] for name in CATEGORIES
        },
    }


# --- chats and responses ----------------------------------------------------------------------


async def load_moderator(
    request: Request, settings: ModerationSettings | None
) -> ModerationModel | None:
    """Return the moderation model that a chat or response names; None if it names none.

    Raises:
        APIError: 404 if there is no such model.
        CannotLoad: The model cannot be loaded now.
    """
    if settings is None:
        return None
    registry = state_of(request).registry
    try:
        is_moderator = registry.resolve(settings.model).kind == ModerationModel.kind
    except UnknownModel:
        is_moderator = False
    if not is_moderator:
        raise APIError(
            404,
            f"The model `{settings.model[:80]}` does not exist on this server, or does not "
            "moderate texts.",
            param="moderation.model",
            code="model_not_found",
        )
    return await _load(request, settings.model)


async def moderate_chat(
    request: Request, model: ModerationModel, prompt: str, answers: Sequence[str]
) -> dict[str, Any]:
    """Return the field `moderation` of a chat completion.

    Args:
        request: The request.
        model: The moderation model.
        prompt: The texts of the messages; they have one result together.
        answers: The text of each choice.
    """
    first, *rest = await _moderate_finished(request, model, [prompt, *answers])
    if first["type"] == "error":
        return {"input": first, "output": first}
    head = {"type": "moderation_results", "model": model.id}
    return {"input": {**head, "results": [first]}, "output": {**head, "results": rest}}


async def moderate_response(
    request: Request, model: ModerationModel, prompt: str, answer: str
) -> dict[str, Any]:
    """Return the field `moderation` of a response, which has one result for its output."""
    results = await _moderate_finished(request, model, [prompt, answer])
    return dict(zip(("input", "output"), results, strict=True))


async def _moderate_finished(
    request: Request, model: ModerationModel, texts: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the result of each text, or an error for each: a finished answer is not lost."""
    try:
        results = await moderate(request, model, texts)
    except (APIError, Busy, FloatingPointError) as error:
        reason = as_api_error(error)
        fields = {"type": "error", "code": reason.code or reason.type, "message": reason.message}
        return [fields] * len(texts)
    return [{"type": "moderation_result", "model": model.id, **result} for result in results]
