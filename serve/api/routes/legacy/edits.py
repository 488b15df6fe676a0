"""POST /v1/edits: edit a text according to an instruction.

OpenAI served this endpoint from 2021 to 2023 with dedicated models. Here a chat model gets a
few-shot prompt with examples of edits, the instruction and the text. ``python -m
tests.bench.bench_edits`` measures the accuracy: with default sampling settings, Qwen2.5-Coder-0.5B
solves 16 to 18 of 21 small edits, SmolLM2-135M 5 to 8 (it often repeats the text or an example).
The length of an edit is bounded by the length of its input, because small models may not stop.
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
from serve.api.message_deltas import read_message
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
SPARE_TOKENS = 256  # the maximum length of an edit is twice its input plus this many tokens


class EditBody(GenerationBody):
    """Body of POST /v1/edits."""

    input: str = ""
    instruction: str
    n: Annotated[int, Field(ge=1, le=20)] = 1


@router.post("/edits", **route_docs(Edit, EditBody))
@router.post("/engines/{engine:path}/edits", include_in_schema=False)
async def create_edit(request: Request) -> Response:
    """Edit a text according to an instruction (OpenAI's endpoint until 2023)."""
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
                    "text": read_message(choice, None, model, generation.usage)[0]["content"],
                    "index": index,
                    "logprobs": None,
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": generation.usage.to_api(),
        }
    )


def _build_generation(
    body: EditBody, model: DecoderModel, request_context: RequestContext
) -> Generation:
    token_ids = encode_chat(EDIT_WORDING, model, edit_messages(body.instruction, body.input))
    limit = 2 * len(model.tokenizer.encoding.encode_ordinary(body.input)) + SPARE_TOKENS
    max_tokens = resolve_max_tokens(EDIT_WORDING, model.context, len(token_ids), None, limit)
    prompts = [Prompt(token_ids=token_ids, max_tokens=max_tokens)]
    return Generation(model, prompts, body, body.n, None, request_context)


def edit_messages(instruction: str, text: str) -> list[dict[str, str]]:
    """Return the few-shot conversation whose next answer is the edited text."""
    messages = [{"role": "system", "content": SYSTEM}]
    for example_instruction, example_text, edited_text in EXAMPLES:
        content = _user_prompt(example_instruction, example_text)
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": edited_text})
    return [*messages, {"role": "user", "content": _user_prompt(instruction, text)}]


def _user_prompt(instruction: str, text: str) -> str:
    return f"Text: {text}\nInstruction: {instruction}"
