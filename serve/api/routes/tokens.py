"""POST /tokenize and /detokenize, GET /tokenizer_info: direct access to the tokenizer.

OpenAI has no such routes. Evaluation harnesses and agents use them with other local servers, whose
field names differ: ``prompt`` or ``messages`` in vLLM, ``content`` in llama.cpp. Requests can use
any of these names, and responses contain all of them. Without ``model`` the default model is used.
None of these routes waits for the engine.
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
from serve.api.requests import Body, Message, read_json
from serve.api.responses import Text, TokenizerInfo, Tokens
from serve.api.routes.chat import encode_chat
from serve.api.state import get_loaded_model, state_of
from serve.api.token_ids import native_ids
from serve.api.tools import template_messages
from serve.models.decoder import DecoderModel

router = APIRouter()


class TokenizeBody(Body):
    """Body of POST /tokenize, with exactly one of prompt, content, text and messages."""

    model: str = ""
    prompt: str | None = None
    content: str | None = None
    text: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool = True  # whether to add BOS before a text, if the model has it
    add_special: bool | None = None  # llama.cpp's name of `add_special_tokens`
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] = {}
    parse_special: bool = True  # whether to encode special tokens spelled out in text as such
    return_token_strs: bool = False
    with_pieces: bool = False  # as in llama.cpp: tokens as objects with id, piece and special


class DetokenizeBody(Body):
    """Body of POST /detokenize."""

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
            {
                "id": id,
                "piece": _text_or_bytes(encoding, id),
                "special": encoding.is_special_token(id),
            }
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
    """Describe a tokenizer: its vocabulary size, special tokens and chat template."""
    loaded_model = await _model(request, model)
    tokenizer = loaded_model.tokenizer
    template = tokenizer.chat_template

    def token_name(id: int | None) -> str | None:
        return None if id is None else _token_name(tokenizer.encoding, id)

    return {
        "model": loaded_model.id,
        "tokenizer_class": type(tokenizer.encoding).__name__,
        "vocab_size": tokenizer.encoding.n_vocab,
        "model_max_length": loaded_model.context,
        "bos_token": token_name(tokenizer.bos_id),
        "eos_token": token_name(tokenizer.eos_id),
        "pad_token": token_name(tokenizer.eos_id),  # not used by this server; harnesses require it
        "add_bos_token": tokenizer.add_bos,
        "chat_template": template.source if template else None,
    }


async def _model(request: Request, name: str) -> DecoderModel:
    return await get_loaded_model(request, name or state_of(request).registry.default, DecoderModel)


def _encode(body: TokenizeBody, model: DecoderModel) -> list[int]:
    tokenizer = model.tokenizer
    names = ("prompt", "content", "text", "messages")
    present = [name for name in names if getattr(body, name) is not None]
    if len(present) != 1:
        raise APIError(
            400,
            f"Send exactly one of {', '.join(names)}; got {' and '.join(present) or 'none'}.",
            param=present[1] if present else "prompt",
            code="invalid_value" if present else "missing_required_parameter",
        )
    if body.messages is not None:
        messages = template_messages(body.messages)
        return encode_chat(
            CHAT_WORDING,
            model,
            messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            variables=body.chat_template_kwargs,
        )
    text: str = getattr(body, present[0])
    if body.parse_special:
        ids = tokenizer.encoding.encode(text, allowed_special="all")
    else:
        ids = tokenizer.encoding.encode_ordinary(text)
    add_special = body.add_special_tokens if body.add_special is None else body.add_special
    if add_special and tokenizer.add_bos and tokenizer.bos_id is not None:
        ids = ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]
    return ids


def _token_name(encoding: Encoding, id: int) -> str:
    return token_text(encoding.decode_single_token_bytes(id))


def _text_or_bytes(encoding: Encoding, id: int) -> str | list[int]:
    """Return a token's text, or its bytes if they are not UTF-8, as llama.cpp does."""
    data = encoding.decode_single_token_bytes(id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)
