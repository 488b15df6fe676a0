"""What every reader returns: a vocabulary with what a model file says about text."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from bpe.chat import ChatTemplate
from bpe.encoding import Encoding


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """What a model file says about text.

    Attributes:
        encoding: text to ids and back.
        chat_template: how a conversation becomes text, if the model knows conversations.
        named_templates: the model's other templates ("tool_use", "rag"), by name.
        bos_id: the token that begins a text, if there is one.
        eos_id: the token that ends a text or turn, if there is one.
        add_bos: whether plain text (not a rendered chat template, which writes its own) must be
            given to the model with `bos_id` in front.
        stop_ids: the tokens after which generation ends; `stop.py` says which.
    """

    encoding: Encoding
    chat_template: ChatTemplate | None = None
    named_templates: Mapping[str, ChatTemplate] = field(default_factory=dict)
    bos_id: int | None = None
    eos_id: int | None = None
    add_bos: bool = False
    stop_ids: frozenset[int] = frozenset()


def build_chat_templates(
    sources: Mapping[str, str],
    bos: str | None,
    eos: str | None,
    encoding: Encoding,
    stop_ids: Collection[int],
) -> tuple[ChatTemplate | None, dict[str, ChatTemplate]]:
    """The template called "default", and the others by name."""
    ends = [encoding.decode_single_token_bytes(id).decode(errors="replace") for id in stop_ids]
    make = functools.partial(
        ChatTemplate, bos_token=bos or "", eos_token=eos or "", stop_tokens=ends
    )
    named = {name: make(source) for name, source in sources.items() if source}
    if (default := named.pop("default", None)) is not None:
        default.tool_use_template = named.get("tool_use")
    return default, named
