"""POST /tokenize and /detokenize, GET /tokenizer_info: the tokenizer by itself.

OpenAI has no such routes; evaluation harnesses and agents call them at other local servers, under
names that differ: vLLM's ``prompt`` or ``messages``, llama.cpp's ``content``. All of them are
understood, and answers carry every name. ``model`` may be left out: it is the default model then.
Nothing here waits for the engine.
"""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request

from bpe import Encoding
from serve.api.context_window import CHAT_WORDING
from serve.api.detokenize import token_text
from serve.api.errors import APIError
from serve.api.openapi import route_docs
from serve.api.requests import Body, read_json
from serve.api.responses import Text, TokenizerInfo, Tokens
from serve.api.routes.chat import Message, encode_chat, template_message
from serve.api.state import get_loaded_model, state_of
from serve.api.token_ids import native_ids
from serve.models.decoder import DecoderModel

router = APIRouter()


class TokenizeBody(Body):
    """POST /tokenize: one of the four kinds of input."""

    model: str = ""
    prompt: str | None = None
    content: str | None = None
    text: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool = True  # whether text gets the token the model expects before it
    add_special: bool | None = None  # llama.cpp's name for it
    add_generation_prompt: bool = True
    parse_special: bool = True  # whether special tokens spelled out in text are special
    return_token_strs: bool = False
    with_pieces: bool = False  # llama.cpp: tokens as objects of id and piece; here with special


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str = ""
    tokens: Annotated[list[int], Field(fail_fast=True)]


@router.post("/tokenize", **route_docs(Tokens, TokenizeBody))
async def tokenize(request: Request) -> dict[str, Any]:
    """Turn text or messages into token ids."""
    body = await read_json(request, TokenizeBody)
    model = await _model(request, body.model)
    ids = await asyncio.to_thread(_encode, body, model)
    encoding = model.tokenizer.encoding
    tokens: list[Any] = ids
    if body.with_pieces:
        tokens = [
            {"id": id, "piece": _piece(encoding, id), "special": encoding.is_special_token(id)}
            for id in ids
        ]
    return {
        "tokens": tokens,
        "count": len(ids),
        "max_model_len": model.context,
        "token_strs": [_token_name(encoding, id) for id in ids] if body.return_token_strs else None,
    }


@router.post("/detokenize", **route_docs(Text, DetokenizeBody))
async def detokenize(request: Request) -> dict[str, str]:
    """Turn token ids into text."""
    body = await read_json(request, DetokenizeBody)
    model = await _model(request, body.model)
    ids = native_ids(body.tokens, model.id, model, "tokens")
    text = await asyncio.to_thread(model.tokenizer.encoding.decode, ids)
    return {"prompt": text, "content": text, "text": text}


@router.get("/tokenizer_info", **route_docs(TokenizerInfo))
async def tokenizer_info(request: Request, model: str = "") -> dict[str, Any]:
    """Say what a tokenizer is and which special tokens it has."""
    served = await _model(request, model)
    tokenizer = served.tokenizer
    template = tokenizer.chat_template

    def spelled(id: int | None) -> str | None:
        return None if id is None else _token_name(tokenizer.encoding, id)

    return {
        "model": served.id,
        "tokenizer_class": type(tokenizer.encoding).__name__,
        "vocab_size": tokenizer.encoding.n_vocab,
        "model_max_length": served.context,
        "bos_token": spelled(tokenizer.bos_id),
        "eos_token": spelled(tokenizer.eos_id),
        "pad_token": spelled(tokenizer.eos_id),  # nothing here is ever padded; harnesses ask
        "add_bos_token": tokenizer.add_bos,
        "chat_template": template.source if template else None,
    }


async def _model(request: Request, name: str) -> DecoderModel:
    return await get_loaded_model(request, name or state_of(request).registry.default, DecoderModel)


def _encode(body: TokenizeBody, model: DecoderModel) -> list[int]:
    tokenizer = model.tokenizer
    names = ("prompt", "content", "text", "messages")
    given = [name for name in names if getattr(body, name) is not None]
    if len(given) != 1:
        raise APIError(
            400,
            f"Give one of {', '.join(names)}; {' and '.join(given) or 'none'} was given.",
            param=given[1] if given else "prompt",
            code="invalid_value" if given else "missing_required_parameter",
        )
    if body.messages is not None:
        messages = [template_message(message, index) for index, message in enumerate(body.messages)]
        return encode_chat(
            CHAT_WORDING, model, messages, add_generation_prompt=body.add_generation_prompt
        )
    text: str = getattr(body, given[0])
    if body.parse_special:
        ids = tokenizer.encoding.encode(text, allowed_special="all")
    else:
        ids = tokenizer.encoding.encode_ordinary(text)
    begun = body.add_special_tokens if body.add_special is None else body.add_special
    if begun and tokenizer.add_bos and tokenizer.bos_id is not None:
        ids = ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]
    return ids


def _token_name(encoding: Encoding, id: int) -> str:
    return token_text(encoding.decode_single_token_bytes(id))


def _piece(encoding: Encoding, id: int) -> str | list[int]:
    """A token's text, or its bytes where it is no text, as llama.cpp says it."""
    data = encoding.decode_single_token_bytes(id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)
