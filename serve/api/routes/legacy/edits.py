"""POST /v1/edits: change a text as an instruction says.

The endpoint of 2021 to 2023, when models of their own stood behind it. Here the chat model is shown
how editing goes, then given the instruction and the text. ``python -m tests.bench.bench_edits``
prints how well that goes: at their sampling defaults, Qwen2.5-Coder-0.5B gets 16 to 18 of 21 small
edits right, SmolLM2-135M 5 to 8 (it often repeats the text or an example). The edited text is about
as long as the text, and a small model that loses its thread writes on: so an edit is bounded by its
input's length.
"""

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve.api.context_window import EDIT_WORDING, resolve_max_tokens
from serve.api.generation import Generation, Prompt
from serve.api.openapi import route_docs
from serve.api.request_context import RequestContext, context_of
from serve.api.requests import GenerationBody, read_json
from serve.api.responses import Edit
from serve.api.routes.chat import encode_chat
from serve.api.sse import cancel_on_disconnect
from serve.api.state import get_loaded_model
from serve.models.decoder import DecoderModel

router = APIRouter(prefix="/v1")

SYSTEM = "You edit texts. Follow the instruction and answer with the edited text only."
EXAMPLES = (  # instruction, text, edited text
    ("Fix the grammar", "I has a apple.", "I have an apple."),
    ("Replace Anna with Tom", "Anna lives in Rome.", "Tom lives in Rome."),
    ("Correct the spelling", "i saw a bigg house", "I saw a big house."),
)
SPARE_TOKENS = 256  # that an edit may have beyond twice its input


class EditBody(GenerationBody):
    """POST /v1/edits."""

    input: str = ""
    instruction: str
    n: Annotated[int, Field(ge=1, le=20)] = 1


@router.post("/edits", **route_docs(Edit, EditBody))
@router.post("/engines/{engine:path}/edits", include_in_schema=False)
async def create_edit(request: Request) -> Response:
    """Change a text as an instruction says (the endpoint of 2023)."""
    body = await read_json(request, EditBody)
    model = await get_loaded_model(request, body.model, DecoderModel)
    generation = await asyncio.to_thread(_build_generation, body, model, context_of(request.scope))
    choices = await cancel_on_disconnect(request.receive, generation.choices())
    return JSONResponse(
        {
            "object": "edit",
            "created": int(time.time()),
            "choices": [
                {
                    "text": choice.text,
                    "index": index,
                    "logprobs": None,
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": generation.usage.to_api(),
        }
    )


def _build_generation(body: EditBody, model: DecoderModel, call: RequestContext) -> Generation:
    prompt = encode_chat(EDIT_WORDING, model, edit_messages(body.instruction, body.input))
    most = 2 * len(model.tokenizer.encoding.encode_ordinary(body.input)) + SPARE_TOKENS
    limit = resolve_max_tokens(EDIT_WORDING, model.context, len(prompt), None, most)
    return Generation(model, [Prompt(token_ids=prompt, max_tokens=limit)], body, body.n, None, call)


def edit_messages(instruction: str, text: str) -> list[dict[str, str]]:
    """The conversation in which the next answer is the edited text."""
    turns = [{"role": "system", "content": SYSTEM}]
    for told, given, edited in EXAMPLES:
        turns.append({"role": "user", "content": _user_prompt(told, given)})
        turns.append({"role": "assistant", "content": edited})
    return [*turns, {"role": "user", "content": _user_prompt(instruction, text)}]


def _user_prompt(instruction: str, text: str) -> str:
    return f"Text: {text}\nInstruction: {instruction}"
