"""A model without weights that decides its tokens, for the forms of responses.

Everything is real except the network: the tokenizer, the chat template, the grammars, the server.
The engine writes a wish as long as the grammar of the request allows it (a call of the first tool,
until the conversation has its result; else a greeting), then the shortest end that the grammar
allows. So every kind of request is answered at once, on any machine.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import regex

import bpe
from serve.models.decoder import DecoderModel, read_tokenizer
from transformer import checkpoint
from transformer.engine import Done, Event, GrammarMatcher, PrefillDone, SequenceRequest, Token

GREETING = "Hello! It is sunny."
# The next character where the grammar leaves a choice: first the end of a string, object or array.
PREFERRED = '"}{],: 0123456789truefalsn-[\n'


class DecidedEngine:
    """An engine without computation; see the module."""

    def __init__(self, tokenizer: bpe.Tokenizer) -> None:
        self.encoding, self.stop_ids = tokenizer.encoding, tokenizer.stop_ids
        characters = [*PREFERRED.encode(), *range(256)]
        self.order = [self.encoding.encode_single_token(bytes([byte])) for byte in characters]

    async def stream(self, request: SequenceRequest) -> AsyncIterator[Event]:
        yield PrefillDone(0)
        matcher = request.grammar.matcher() if request.grammar else None
        wish = self.wish(self.encoding.decode(request.prompt))
        for _ in range(request.max_tokens):
            if (id := self.next_token(matcher, wish)) is None:
                yield Done("stop")
                return
            if matcher is not None:
                matcher.accept(id)
            await asyncio.sleep(0)  # as other engines do: the event is sent before the next one
            yield Token(id, None, ())
        yield Done("length")

    def next_token(self, matcher: GrammarMatcher | None, wish: list[int]) -> int | None:
        """Return the next token: that of the wish, as long as it is allowed; None at the end."""
        if matcher is None:
            return wish.pop(0) if wish else None
        if matcher.is_finished:
            return None
        is_allowed = np.unpackbits(matcher.token_bitmask().view(np.uint8), bitorder="little")
        if wish and is_allowed[wish[0]]:
            return wish.pop(0)
        wish.clear()
        if any(is_allowed[id] for id in self.stop_ids):
            return None
        # A token of several characters, if the grammar allows one text only.
        return next((id for id in self.order if is_allowed[id]), int(is_allowed.argmax()))

    def wish(self, prompt: str) -> list[int]:
        """Return the tokens to write after a prompt of Qwen's template."""
        last_turn = prompt.rpartition("<|im_start|>user")[2]
        tool = regex.search(r'<tools>\n.*?"name": "([^"]+)"', prompt, regex.DOTALL)
        if tool and "<tool_response>" not in last_turn:
            text = f'<tool_call>\n{{"name": "{tool[1]}", "arguments": {{'
        else:
            text = GREETING
        return self.encoding.encode(text, allowed_special="all")


def decided_models(path: Path, *ids: str) -> list[DecoderModel]:
    """Return models that decide their tokens, with the tokenizer of a GGUF file."""
    header = checkpoint.read_header(path)
    tokenizer = read_tokenizer(path, header)
    return [
        DecoderModel(
            id=id,
            created=1_700_000_000,
            owned_by="pellucid",
            tokenizer=tokenizer,
            context=header.cfg.max_seq_len,
            engine=DecidedEngine(tokenizer),  # type: ignore[arg-type]
            fingerprint="fp_decided",
        )
        for id in ids
    ]
