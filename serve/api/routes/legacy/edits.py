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

from serve.api.context_window import EDIT, room
from serve.api.generation import Generation, Prompt
from serve.api.openapi import described
from serve.api.request_context import Call, call_of
from serve.api.requests import GenerationBody, read_json
from serve.api.responses import Edit
from serve.api.routes.chat import encode_chat
from serve.api.sse import unless_disconnected
from serve.api.state import loaded
from serve.models.decoder import ServedModel

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


@router.post("/edits", **described(Edit, EditBody))
@router.post("/engines/{engine:path}/edits", include_in_schema=False)
async def create_edit(request: Request) -> Response:
    """Change a text as an instruction says (the endpoint of 2023)."""
    body = await read_json(request, EditBody)
    model = await loaded(request, body.model, ServedModel)
    generation = await asyncio.to_thread(_plan, body, model, call_of(request.scope))
    choices = await unless_disconnected(request.receive, generation.choices())
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
            "usage": generation.usage.body(),
        }
    )


def _plan(body: EditBody, model: ServedModel, call: Call) -> Generation:
    prompt = encode_chat(EDIT, model, messages(body.instruction, body.input))
    most = 2 * len(model.tokenizer.encoding.encode_ordinary(body.input)) + SPARE_TOKENS
    limit = room(EDIT, model.context, len(prompt), None, most)
    return Generation(model, [Prompt(ids=prompt, max_tokens=limit)], body, body.n, None, call)


def messages(instruction: str, text: str) -> list[dict[str, str]]:
    """The conversation in which the next answer is the edited text."""
    turns = [{"role": "system", "content": SYSTEM}]
    for told, given, edited in EXAMPLES:
        turns.append({"role": "user", "content": _ask(told, given)})
        turns.append({"role": "assistant", "content": edited})
    return [*turns, {"role": "user", "content": _ask(instruction, text)}]


def _ask(instruction: str, text: str) -> str:
    return f"Text: {text}\nInstruction: {instruction}"
