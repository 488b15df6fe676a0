"""From a validated request to pieces of text: what completions and chat share.

A request asks for one or more choices: some for each prompt. Each choice is one request to the
engine and one stream of events; they run side by side and their pieces come out interleaved, with
the index of the choice. Whatever ends the reading (the last piece, an error, a client that left)
closes every stream, and closing a stream is what tells the engine to stop computing.
"""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from serve.api.detokenize import (
    Detokenizer,
    FinishReason,
    TextDelta,
    TokenWithOffset,
    clamp_logprob,
)
from serve.api.errors import APIError, server_error
from serve.api.request_context import RequestContext
from serve.api.requests import GenerationBody
from serve.api.token_ids import native_bias
from serve.models import generation_config
from serve.models.decoder import DecoderModel
from transformer.engine import Done, Event, Failed, PrefillDone, SequenceRequest, Token
from transformer.sampling import SamplingParams

log = logging.getLogger(__name__)

# Choices of one request that compute at a time: one client with a long list of prompts neither
# fills the engine's queue nor crowds out the others.
MAX_CONCURRENT_CHOICES = 16
MAX_CHOICES = 2048

T = TypeVar("T")


@dataclass(kw_only=True)
class Usage:
    """The tokens of a request; each prompt counts once, however many choices it has."""

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0

    def to_api(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What one or more choices continue.

    Attributes:
        ids: what the model reads.
        max_tokens: the most tokens a choice may have.
        echo: ids the choice's text begins with: the last of `ids`, or with a suffix, others.
        is_scored: whether echoed tokens come with logprobs.
        stop_ids: ids that end a choice, beside the model's own.
        stops: strings that end a choice, beside the request's own.
    """

    token_ids: Sequence[int]
    max_tokens: int
    echo_ids: Sequence[int] = ()
    has_prompt_logprobs: bool = False
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()


@dataclass
class Choice:
    """One finished choice, for an answer that is not streamed."""

    text: str = ""
    tokens: list[TokenWithOffset] = field(default_factory=list)
    end_token: TokenWithOffset | None = None
    finish_reason: FinishReason | None = None


class Generation:
    """The choices of one request.

    Args:
        model: what generates.
        prompts: what it continues.
        body: sampling settings, n, and stop strings.
        copies: choices to generate for each prompt.
        top_logprobs: alternatives to report per token, echoed ones too; None for no logprobs.
        call: who asks; told what comes of it.
        is_judged: whether answers are scored or ranked; see `sampling.resolve`.

    Raises:
        APIError: 400 for a logit_bias that does not fit the vocabulary, or too many choices.
    """

    def __init__(
        self,
        model: DecoderModel,
        prompts: Sequence[Prompt],
        body: GenerationBody,
        choices_per_prompt: int,
        top_logprobs: int | None,
        request_context: RequestContext,
        is_judged: bool = False,
    ):
        if len(prompts) * choices_per_prompt > MAX_CHOICES:
            raise APIError(
                400,
                f"Invalid 'n': {len(prompts)} prompts of {choices_per_prompt} choices each are more than "
                f"{MAX_CHOICES} choices in one request.",
                param="n",
                code="invalid_value",
            )
        settings = sampling_params(body, model, is_judged=is_judged)
        deadline = (
            None if request_context.timeout is None else time.monotonic() + request_context.timeout
        )
        self.model, self.stop_strings, self.choices_per_prompt, self.request_context = (
            model,
            body.stop_strings,
            choices_per_prompt,
            request_context,
        )
        self.usage = Usage(prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts))
        request_context.model, request_context.prompt_tokens = model.id, self.usage.prompt_tokens
        self.prompts = [prompt for prompt in prompts for _ in range(choices_per_prompt)]
        self.requests = [
            SequenceRequest(
                prompt=tuple(prompt.token_ids),
                max_tokens=prompt.max_tokens,
                sampling_params=settings,
                stop_ids=model.tokenizer.stop_ids | prompt.stop_ids,
                top_logprobs=top_logprobs,
                prompt_logprobs=top_logprobs if prompt.has_prompt_logprobs else None,
                index=index,
                client=request_context.client,
                is_accepted=index > 0,
                deadline=deadline,
            )
            for index, prompt in enumerate(self.prompts)
        ]

    async def text_deltas(self) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """The pieces of all choices as they come, each with its choice's index.

        Every choice ends in one piece with a finish_reason, and ``usage`` counts it by then.

        Raises:
            APIError: 500 when the engine fails, 503 when it is shutting down.
            transformer.engine.Busy: the queue is full.
        """
        streams = [self._stream_choice(index) for index in range(len(self.requests))]
        async with aclosing(interleave(streams, MAX_CONCURRENT_CHOICES)) as merged:
            async for index, piece in merged:
                if piece.finish_reason:
                    self.usage.completion_tokens += piece.num_generated
                yield index, piece

    async def choices(self) -> list[Choice]:
        """All choices whole, in order."""
        choices = [Choice() for _ in self.requests]
        async with aclosing(self.text_deltas()) as pieces:
            async for index, piece in pieces:
                choice = choices[index]
                choice.text += piece.text
                choice.tokens += piece.tokens
                choice.end_token = piece.end_token
                choice.finish_reason = piece.finish_reason
        return choices

    async def best(self, n: int) -> list[Choice]:
        """The n choices of each prompt whose tokens are likeliest on average, best first."""
        choices = await self.choices()

        def mean(index: int) -> float:
            choice = choices[index]
            own = choice.tokens[len(self.prompts[index].echo_ids) :]
            ended = [choice.end_token] if choice.end_token else []
            logprobs = [clamp_logprob(placed.token.logprob) for placed in [*own, *ended]]
            return sum(logprobs) / len(logprobs) if logprobs else -math.inf

        groups = [
            range(start, start + self.choices_per_prompt)
            for start in range(0, len(choices), self.choices_per_prompt)
        ]
        return [
            choices[index]
            for group in groups
            for index in sorted(group, key=mean, reverse=True)[:n]
        ]

    async def _stream_choice(self, index: int) -> AsyncGenerator[TextDelta, None]:
        prompt, request = self.prompts[index], self.requests[index]
        echo = [] if request.prompt_logprobs is not None else [Token(id) for id in prompt.echo_ids]
        assembler = Detokenizer(
            self.model.tokenizer.encoding,
            [*self.stop_strings, *prompt.stop_strings],
            echo_tokens=echo,
            num_unechoed=len(prompt.token_ids) - len(prompt.echo_ids),
        )
        if request.max_tokens == 0 and request.prompt_logprobs is None:  # nothing to compute
            if echo:
                yield assembler.echo(echo)
            yield assembler.finish("length")
            return
        async with aclosing(self.model.engine.stream(request)) as events:
            async for event in events:
                match event:
                    case PrefillDone(cached_tokens=cached_tokens) if (
                        index % self.choices_per_prompt == 0
                    ):
                        self.usage.cached_tokens += cached_tokens  # each prompt counts once
                        self.request_context.cached_tokens += cached_tokens
                    case Token():
                        self.request_context.record_token()
                if (piece := assembler.update(event)) is None:
                    raise self._failure(event)
                if piece.finish_reason:
                    break
                if piece.text:
                    yield piece
            else:
                raise RuntimeError("the engine's stream ended without Done or Failed")
        yield piece

    def _failure(self, event: Event) -> APIError:
        """The error for an event with which the engine gave up."""
        match event:
            case Failed(message=message):
                log.error("%s: generation failed: %s", self.model.id, message)
                return server_error(message)
            case Done(finish_reason="timeout"):
                return _timeout_error(self.request_context.timeout)
        return APIError(
            503, "The server is shutting down. Please try again later.", type="server_error"
        )


def _timeout_error(seconds: float | None) -> APIError:
    return APIError(
        504,
        f"The answer took longer than the {seconds:g} seconds this server allows. Ask for fewer "
        "tokens or fewer choices.",
        type="server_error",
        code="timeout",
        headers={"x-should-retry": "false"},  # it would take as long again
    )


def sampling_params(
    body: GenerationBody, model: DecoderModel, *, is_judged: bool
) -> SamplingParams:
    """The sampling settings of a request; without a seed, one is drawn."""
    return SamplingParams(
        **generation_config.resolve_params(
            body.sampling, model.default_sampling, is_likelihood_scored=is_judged
        ),
        logit_bias=native_bias(body.logit_bias, body.model, model),
        seed=secrets.randbits(63) if body.seed is None else body.seed,
    )


async def interleave(
    streams: Sequence[AsyncGenerator[T, None]], at_a_time: int
) -> AsyncGenerator[tuple[int, T], None]:
    """Reads ``at_a_time`` of ``streams`` at once; yields items with their stream's index.

    They are read no faster than this is. The first error of any stream is raised here after the
    others are closed; closing this iterator closes them too.
    """
    queue: asyncio.Queue[tuple[int, T] | None] = asyncio.Queue()
    gate, room = asyncio.Semaphore(at_a_time), asyncio.Semaphore(at_a_time)

    async def read(index: int, stream: AsyncGenerator[T, None]) -> None:
        async with gate, aclosing(stream):
            async for item in stream:
                await room.acquire()
                queue.put_nowait((index, item))

    async def read_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for index, stream in enumerate(streams):
                    group.create_task(read(index, stream))
        finally:
            queue.put_nowait(None)

    reading = asyncio.create_task(read_all())
    try:
        while (item := await queue.get()) is not None:
            room.release()
            yield item
        try:
            await reading
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
