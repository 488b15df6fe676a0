"""Events of the engine become pieces of text, each with the tokens it came from.

Servers and the command line read their answers through this: see `Assembler.take`.

A token is not a unit of text: one character may take several tokens, and the last characters
of a token may be the first of a stop string. So text leaves late, and when it leaves, exactly the
tokens that spelled it leave along: a client that joins the logprob entries finds the text it got.
A token of which a stop string took only the end is kept, for its beginning was emitted.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bpe import Encoding, StopMatcher, StreamDecoder
from transformer.engine import Done, Event, PrefillDone, PromptLogprobs, Token

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenWithOffset:
    """A token and where the text it belongs to begins, in characters of the choice's text."""

    token: Token
    offset: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next text of one choice.

    Attributes:
        text: new text; never part of a character, never part of a stop string.
        tokens: the tokens that spelled it.
        finish_reason: set on the last piece of a choice.
        generated: tokens drawn so far. The token that ended the turn is not counted, tokens that
            spelled a stop string are: the model did compute them.
        end: the token that ended the turn, where logprobs are asked for. It is no part of the text.
    """

    text: str
    tokens: tuple[TokenWithOffset, ...]
    finish_reason: FinishReason | None
    num_generated: int
    end_token: TokenWithOffset | None = None


class Detokenizer:
    """Builds the pieces of one choice: first what is echoed of the prompt, then what is generated.

    Args:
        encoding: the model's vocabulary.
        stops: strings that end the choice, themselves never emitted.
        echo: tokens that the text begins with, once the engine has begun.
        unseen: how many of the tokens that the engine scores first are not echoed.
    """

    def __init__(
        self,
        encoding: Encoding,
        stop_strings: Sequence[str],
        *,
        echo_tokens: Sequence[Token] = (),
        num_unechoed: int = 0,
    ):
        self._echo_tokens, self._num_unechoed = echo_tokens, num_unechoed
        self._decoder = StreamDecoder(encoding)
        self._matcher = StopMatcher(stop_strings)
        self._pending: list[Token] = []  # tokens whose first whole character is yet to come
        self._held: deque[tuple[int, int, list[Token]]] = deque()  # start, end, tokens
        self._decoded = self._emitted = self._generated = 0  # characters, characters, tokens

    def update(self, event: Event) -> TextDelta | None:
        """Take an event of the engine.

        Returns:
            The next text, which may be empty; None where the engine gave up: it `Failed`, or is
            `Done` for another reason than "stop" and "length".
        """
        match event:
            case PromptLogprobs(tokens=tokens):
                echoed = tokens[self._num_unechoed :]
                self._num_unechoed = max(self._num_unechoed - len(tokens), 0)
                return self.echo(echoed)
            case PrefillDone():
                return self.echo(self._echo_tokens)
            case Token():
                return self.push(event)
            case Done(finish_reason="stop" | "length" as reason, token=token):
                return self.finish(reason, token)
        return None

    def echo(self, tokens: Sequence[Token]) -> TextDelta:
        """Repeats tokens of the prompt, in which no stop string is looked for.

        Text and offsets go on from there, so a character begun in the prompt is finished by what
        is generated.
        """
        text = ""
        for token in tokens:
            self._pending.append(token)
            if part := self._decoder.push(token.id):
                self._hold(part)
                text += part
        return self._delta(text, None)

    def push(self, token: Token) -> TextDelta:
        """Takes the next token. A piece with a finish_reason means that a stop string matched."""
        self._generated += 1
        self._pending.append(token)
        text, stopped = self._match(self._decoder.push(token.id))
        return self._delta(text, "stop" if stopped else None)

    def finish(self, reason: FinishReason, token: Token | None = None) -> TextDelta:
        """The last piece, when the engine has ended the choice: whatever was held back.

        Args:
            reason: the engine's.
            token: the token that ended the turn.
        """
        text, stopped = self._match(self._decoder.flush())
        if stopped:
            return self._delta(text, "stop")
        piece = self._delta(text + self._matcher.flush(), reason)
        return replace(piece, end=TokenWithOffset(token, self._emitted)) if token else piece

    def _match(self, text: str) -> tuple[str, bool]:
        if not text:
            return "", False
        self._hold(text)
        return self._matcher.push(text)

    def _hold(self, text: str) -> None:
        end = self._decoded + len(text)
        self._held.append((self._decoded, end, self._pending))
        self._decoded, self._pending = end, []

    def _delta(self, text: str, finish_reason: FinishReason | None) -> TextDelta:
        self._emitted += len(text)
        tokens: list[TokenWithOffset] = []
        while self._held:
            start, end, group = self._held[0]
            begun = finish_reason is not None and start < self._emitted
            if end > self._emitted and not begun:
                break
            tokens += [TokenWithOffset(token, start) for token in group]
            self._held.popleft()
        return TextDelta(text, tuple(tokens), finish_reason, self._generated)


def clamp_logprob(logprob: float | None) -> float:
    """A logprob as JSON can say it; -9999 is what the API says for "impossible"."""
    return logprob if logprob is not None and logprob > -9999.0 else -9999.0  # NaN is not >


def token_text(data: bytes) -> str:
    r"""How logprobs name a token; one that is no text of its own is spelled ``bytes:\xf0\x9f``.

    That is what OpenAI's completions did. It keeps two such tokens apart, as a replacement
    character would not.
    """
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
