"""Incremental detokenization: turn engine events into text deltas with their tokens.

The server and the command line both read generated text through `Detokenizer.update`.

A token is not a unit of text: one character may take several tokens, and the last characters of a
token may be the first of a stop string. So text is held back until it is a whole character and
cannot begin a stop string. Text is emitted together with exactly the tokens that encode it, so that
the joined logprob entries give the text. A token that is cut by a stop string is emitted if some of
its characters are.
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
    """A token and the offset of its text, in characters from the start of the choice's text."""

    token: Token
    offset: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next part of the text of one choice, with its tokens.

    Attributes:
        text: New text, in whole characters and without any part of a stop string.
        tokens: The tokens that encode the text.
        finish_reason: Set on the last delta of a choice.
        num_generated: Number of tokens generated so far. Tokens of a stop string count, the
            end-of-turn token does not.
        end_token: The end-of-turn token, if logprobs were requested. It is not part of the text.
    """

    text: str
    tokens: tuple[TokenWithOffset, ...]
    finish_reason: FinishReason | None
    num_generated: int
    end_token: TokenWithOffset | None = None


class Detokenizer:
    """Build the text deltas of one choice: first the echoed prompt, then the generated text.

    Args:
        encoding: The model's vocabulary.
        stop_strings: Strings that end the choice. They are not emitted.
        echo_tokens: Prompt tokens to emit when the prefill is done.
        num_unechoed: Number of leading prompt tokens that get a logprob but are not echoed.
        min_tokens: Number of generated tokens in which stop strings do not count.
    """

    def __init__(
        self,
        encoding: Encoding,
        stop_strings: Sequence[str],
        *,
        echo_tokens: Sequence[Token] = (),
        num_unechoed: int = 0,
        min_tokens: int = 0,
    ):
        self._min_tokens = min_tokens
        self._echo_tokens, self._num_unechoed = echo_tokens, num_unechoed
        self._encoding, self._decoder = encoding, StreamDecoder(encoding, after_prompt=True)
        self._matcher = StopMatcher(stop_strings)
        self._pending: list[Token] = []  # tokens that do not complete a character yet
        # Decoded text that is not emitted yet: start and end in characters, and its tokens.
        self._held: deque[tuple[int, int, list[Token]]] = deque()
        # Numbers of decoded characters, emitted characters, and generated tokens.
        self._decoded = self._emitted = self._generated = 0

    def update(self, event: Event) -> TextDelta | None:
        """Process an engine event and return the next delta, whose text may be empty.

        Returns:
            The delta, or None if the event is `Failed`, or `Done` with a finish reason other than
            "stop" and "length".
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
        """Return a delta that repeats tokens of the prompt, without looking for stop strings.

        Generated text continues from the echo: its first tokens may complete a character that the
        prompt began.
        """
        if tokens and not self._decoded and not self._pending:  # the start of the prompt
            self._decoder = StreamDecoder(self._encoding)
        text = ""
        for token in tokens:
            self._pending.append(token)
            if decoded := self._decoder.push(token.id):
                self._hold(decoded)
                text += decoded
        return self._delta(text, None)

    def push(self, token: Token) -> TextDelta:
        """Add a generated token. The delta has a finish_reason if a stop string matched."""
        self._generated += 1
        self._pending.append(token)
        text, stopped = self._match(self._decoder.push(token.id))
        return self._delta(text, "stop" if stopped else None)

    def finish(self, reason: FinishReason, token: Token | None = None) -> TextDelta:
        """Return the last delta of the choice, with all text that was held back.

        Args:
            reason: The engine's finish reason.
            token: The end-of-turn token, if the engine reports it.
        """
        text, stopped = self._match(self._decoder.flush())
        if stopped:
            return self._delta(text, "stop")
        delta = self._delta(text + self._matcher.flush(), reason)
        return replace(delta, end_token=TokenWithOffset(token, self._emitted)) if token else delta

    def _match(self, text: str) -> tuple[str, bool]:
        if not text:
            return "", False
        self._hold(text)
        return (text, False) if self._generated <= self._min_tokens else self._matcher.push(text)

    def _hold(self, text: str) -> None:
        end = self._decoded + len(text)
        self._held.append((self._decoded, end, self._pending))
        self._decoded, self._pending = end, []

    def _delta(self, text: str, finish_reason: FinishReason | None) -> TextDelta:
        self._emitted += len(text)
        tokens: list[TokenWithOffset] = []
        while self._held:
            start, end, group = self._held[0]
            is_cut = finish_reason is not None and start < self._emitted
            if end > self._emitted and not is_cut:
                break
            tokens += [TokenWithOffset(token, start) for token in group]
            self._held.popleft()
        return TextDelta(text, tuple(tokens), finish_reason, self._generated)


def clamp_logprob(logprob: float | None) -> float:
    """Return a logprob for JSON: -9999, as in OpenAI's API, for None, -inf and NaN."""
    return logprob if logprob is not None and logprob > -9999.0 else -9999.0  # False for NaN


def token_text(data: bytes) -> str:
    r"""Return the name of a token in logprobs: its text, or ``bytes:\xf0\x9f`` for invalid UTF-8.

    OpenAI's completions use this notation. With a replacement character, different tokens would
    have the same name.
    """
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
