"""Generate the choices of a request to the completions, chat or edits route.

A request asks for one or more choices for each prompt. Each choice is one request to the engine and
one stream of events. The choices run concurrently, and their text deltas are interleaved, each with
the index of its choice. When the route stops reading the deltas (after the last one, an error or a
disconnect), all streams are closed, and the engine stops computing them.
"""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from bpe import Encoding
from serve.api.detokenize import (
    Detokenizer,
    FinishReason,
    TextDelta,
    TokenWithOffset,
    clamp_logprob,
    token_text,
)
from serve.api.errors import APIError, server_error
from serve.api.request_context import RequestContext
from serve.api.requests import ChatBody, CompletionBody, GenerationBody
from serve.api.structured_output import compile_output_grammar, grammar_error
from serve.api.token_ids import imitated_encoding, native_bias, native_token_ids
from serve.models import generation_config
from serve.models.decoder import DecoderModel
from serve.models.token_limits import TokenLimits
from transformer.engine import (
    Done,
    Event,
    Failed,
    Grammar,
    PrefillDone,
    PromptLogprobs,
    SequenceRequest,
    Token,
)
from transformer.sampling import SamplingParams

log = logging.getLogger(__name__)

# Maximum number of choices of one request that are computed concurrently, so that a long list of
# prompts neither fills the engine's queue nor delays other clients.
MAX_CONCURRENT_CHOICES = 16
MAX_CHOICES = 2048

T = TypeVar("T")


@dataclass(kw_only=True)
class Usage:
    """Token counts of a request. Each prompt counts once, even if it has several choices."""

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0  # those of `completion_tokens` that are reasoning

    def to_api(self) -> dict[str, Any]:
        """Return the `usage` object of a response."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning_tokens,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The prompt of one or more choices.

    Attributes:
        token_ids: The token ids that the engine prefills.
        max_tokens: Maximum number of tokens to generate for a choice.
        echo_ids: The token ids of the client's prompt if the choice's text repeats it (`echo`),
            else empty. They are the last ids of `token_ids`, unless the request has a suffix.
        has_prompt_logprobs: Whether echoed tokens have logprobs.
        prompt_logprobs: Number of alternatives to report per token of `token_ids`, in
            `Generation.prompt_logprobs`; None for no report.
        logprob_token_ids: As for `SequenceRequest`; if there are any, a choice is one token.
        stop_ids: Ids that end a choice, in addition to the model's.
        stop_strings: Strings that end a choice, in addition to the request's.
    """

    token_ids: Sequence[int]
    max_tokens: int
    echo_ids: Sequence[int] = ()
    has_prompt_logprobs: bool = False
    prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()


@dataclass
class Choice:
    """A finished choice of a response that is not streamed."""

    text: str = ""
    tokens: list[TokenWithOffset] = field(default_factory=list)
    end_token: TokenWithOffset | None = None
    finish_reason: FinishReason | None = None


class Generation:
    """The generation of all choices of one request.

    Args:
        model: The model.
        prompts: The prompts to continue.
        body: The request: sampling settings, n, and stop strings.
        choices_per_prompt: Number of choices to generate for each prompt.
        top_logprobs: Number of alternatives to report per generated and echoed token; None for no
            logprobs.
        request_context: The client and the timeout; receives token counts and times.
        is_likelihood_scored: Whether the choices are scored or ranked by likelihood; see
            `generation_config.resolve_params`.
        output_grammar: The field of the request that limits the output, for messages, and the
            grammar; None for the format that the body asks for.

    Raises:
        APIError: 400 for a logit_bias that does not fit the vocabulary, too many choices, or an
            output format that is not supported.
    """

    def __init__(
        self,
        model: DecoderModel,
        prompts: Sequence[Prompt],
        body: GenerationBody,
        choices_per_prompt: int,
        top_logprobs: int | None,
        request_context: RequestContext,
        is_likelihood_scored: bool = False,
        output_grammar: tuple[str, Grammar] | None = None,
    ):
        if len(prompts) * choices_per_prompt > MAX_CHOICES:
            raise APIError(
                400,
                f"Invalid 'n': {len(prompts)} prompts with {choices_per_prompt} choices each "
                f"exceed the maximum of {MAX_CHOICES} choices. Send several requests.",
                param="n",
                code="invalid_value",
            )
        imitated = imitated_encoding(body.model, model.id, is_pattern=request_context.is_pattern)
        params = sampling_params(body, model, imitated, is_likelihood_scored=is_likelihood_scored)
        output_grammar = output_grammar or compile_output_grammar(body, model)
        self.format_param = output_grammar[0] if output_grammar else None
        own_stop_ids = frozenset(
            native_token_ids(body.stop_token_ids, body.model, model, "stop_token_ids", imitated)
        )
        stop_ids = own_stop_ids.union(model.tokenizer.stop_ids, *(p.stop_ids for p in prompts))
        grammar = _limit_tokens(
            body,
            model,
            output_grammar,
            max_tokens=min(prompt.max_tokens for prompt in prompts),
            allowed_ids=native_token_ids(
                body.allowed_token_ids, body.model, model, "allowed_token_ids", imitated
            ),
            stop_ids=stop_ids,
            eos_ids=model.tokenizer.stop_ids - own_stop_ids,
        )
        self.min_tokens = body.min_tokens
        self.prompt_logprobs: list[list[Token]] = [[] for _ in prompts]
        timeout = request_context.timeout
        deadline = None if timeout is None else time.monotonic() + timeout
        self.model, self.stop_strings = model, body.stop_strings
        self.choices_per_prompt, self.request_context = choices_per_prompt, request_context
        self.usage = Usage(prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts))
        request_context.model, request_context.prompt_tokens = model.id, self.usage.prompt_tokens
        self.prompts = [
            prompt if number == 0 else replace(prompt, prompt_logprobs=None)
            for prompt in prompts
            for number in range(choices_per_prompt)
        ]
        self.requests = [
            SequenceRequest(
                prompt=tuple(prompt.token_ids),
                max_tokens=prompt.max_tokens,
                sampling_params=params,
                stop_ids=stop_ids,
                top_logprobs=len(prompt.logprob_token_ids) or top_logprobs,
                logprob_token_ids=prompt.logprob_token_ids,
                prompt_logprobs=_num_prompt_logprobs(prompt, top_logprobs),
                index=index,
                client=request_context.client,
                priority=request_context.priority,
                is_accepted=index > 0,
                deadline=deadline,
                grammar=grammar,
            )
            for index, prompt in enumerate(self.prompts)
        ]

    async def text_deltas(self) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """Yield the text deltas of all choices as they arrive, each with its choice's index.

        Every choice ends with one delta that has a finish_reason. When that delta is yielded,
        ``usage`` includes the choice.

        Raises:
            APIError: 500 when the engine fails, 503 when it shuts down, 504 after the timeout.
            transformer.engine.Busy: The queue is full.
        """
        streams = [self._stream_choice(index) for index in range(len(self.requests))]
        async with aclosing(interleave(streams, MAX_CONCURRENT_CHOICES)) as merged:
            async for index, delta in merged:
                if delta.finish_reason:
                    self.usage.completion_tokens += delta.num_generated
                yield index, delta

    async def choices(self) -> list[Choice]:
        """Wait until all choices are finished, and return them in the order of the prompts."""
        choices = [Choice() for _ in self.requests]
        async with aclosing(self.text_deltas()) as deltas:
            async for index, delta in deltas:
                choice = choices[index]
                choice.text += delta.text
                choice.tokens += delta.tokens
                choice.end_token = delta.end_token
                choice.finish_reason = delta.finish_reason
        return choices

    async def best(self, n: int) -> list[Choice]:
        """Return the n choices of each prompt with the highest mean logprob, best first."""
        choices = await self.choices()

        def mean_logprob(index: int) -> float:
            choice = choices[index]
            generated = choice.tokens[len(self.prompts[index].echo_ids) :]
            end = [choice.end_token] if choice.end_token else []
            logprobs = [clamp_logprob(item.token.logprob) for item in [*generated, *end]]
            return sum(logprobs) / len(logprobs) if logprobs else -math.inf

        groups = [
            range(start, start + self.choices_per_prompt)
            for start in range(0, len(choices), self.choices_per_prompt)
        ]
        return [
            choices[index]
            for group in groups
            for index in sorted(group, key=mean_logprob, reverse=True)[:n]
        ]

    async def _stream_choice(self, index: int) -> AsyncGenerator[TextDelta, None]:
        prompt, request = self.prompts[index], self.requests[index]
        echo = [] if prompt.has_prompt_logprobs else [Token(id) for id in prompt.echo_ids]
        detokenizer = Detokenizer(
            self.model.tokenizer.encoding,
            [*self.stop_strings, *prompt.stop_strings],
            echo_tokens=echo,
            num_unechoed=len(prompt.token_ids) - len(prompt.echo_ids),
            min_tokens=self.min_tokens,
        )
        if request.max_tokens == 0 and request.prompt_logprobs is None:  # nothing to compute
            if echo:
                yield detokenizer.echo(echo)
            yield detokenizer.finish("length")
            return
        async with aclosing(self.model.engine.stream(request)) as events:
            async for event in events:
                match event:
                    case PrefillDone(cached_tokens=cached_tokens) if (
                        index % self.choices_per_prompt == 0
                    ):
                        self.usage.cached_tokens += cached_tokens  # each prompt counts once
                        self.request_context.cached_tokens += cached_tokens
                    case PromptLogprobs(tokens=tokens):
                        if prompt.prompt_logprobs is not None:
                            self.prompt_logprobs[index // self.choices_per_prompt] += tokens
                        if not prompt.has_prompt_logprobs:
                            continue
                        event = _clip_top_logprobs(event, request.top_logprobs)
                    case Token():
                        self.request_context.record_token()
                if (delta := detokenizer.update(event)) is None:
                    raise self._failure(event)
                if delta.finish_reason:
                    break
                if delta.text:
                    yield delta
            else:
                raise RuntimeError("the engine's stream ended without Done or Failed")
        yield delta

    def _failure(self, event: Event) -> APIError:
        """Return the error for an event that ends a choice without a result."""
        match event:
            case Failed(message=message, is_grammar_error=True) if self.format_param is not None:
                return grammar_error(self.format_param, message)
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
        f"The request exceeded the server's timeout of {seconds:g} seconds. Request fewer tokens "
        "or fewer choices.",
        type="server_error",
        code="timeout",
        headers={"x-should-retry": "false"},  # a retry would take as long
    )


def refuse_streamed_prompt_logprobs(body: ChatBody | CompletionBody) -> None:
    """Raise APIError if a stream is to have the logprobs of the prompt."""
    if body.stream and body.prompt_logprobs is not None:
        raise APIError(
            400,
            "Invalid 'prompt_logprobs': they are not available in a stream. Leave out "
            "'prompt_logprobs' or 'stream'.",
            param="prompt_logprobs",
            code="invalid_value",
        )


def prompt_logprobs_to_api(
    encoding: Encoding, tokens: Sequence[Token]
) -> list[dict[str, dict[str, Any]] | None]:
    """Return the logprobs of a prompt in vLLM's form: one object by token id for each token.

    It holds the token of the prompt, and the likeliest ones. The rank of a token beyond those is
    not computed: it is null. The first token has no logprobs.
    """

    def entry(id: int, logprob: float | None, rank: int | None) -> dict[str, Any]:
        text = token_text(encoding.decode_single_token_bytes(id))
        return {"logprob": clamp_logprob(logprob), "rank": rank, "decoded_token": text}

    return [
        None
        if token.logprob is None
        else {str(token.id): entry(token.id, token.logprob, None)}
        | {
            str(id): entry(id, logprob, rank)
            for rank, (id, logprob) in enumerate(token.top_logprobs, 1)
        }
        for token in tokens
    ]


def _num_prompt_logprobs(prompt: Prompt, top_logprobs: int | None) -> int | None:
    """Return how many alternatives the engine reports for a token of a prompt; None for none."""
    counts = [prompt.prompt_logprobs, top_logprobs if prompt.has_prompt_logprobs else None]
    return max((count for count in counts if count is not None), default=None)


def _clip_top_logprobs(event: PromptLogprobs, count: int | None) -> PromptLogprobs:
    """Return the event with at most `count` alternatives per token."""
    return PromptLogprobs(
        tuple(replace(token, top_logprobs=token.top_logprobs[:count]) for token in event.tokens)
    )


def _limit_tokens(
    body: GenerationBody,
    model: DecoderModel,
    output_grammar: tuple[str, Grammar] | None,
    *,
    max_tokens: int,
    allowed_ids: Sequence[int],
    stop_ids: frozenset[int],
    eos_ids: frozenset[int],
) -> Grammar | None:
    """Return the grammar of a request together with its limits on single tokens.

    Args:
        body: The request.
        model: The model.
        output_grammar: As for `Generation`.
        max_tokens: Maximum number of tokens to generate.
        allowed_ids: The ids of `allowed_token_ids`; empty for all ids.
        stop_ids: All token ids that end a choice; they are not generated before `min_tokens`.
        eos_ids: Those that are never generated if `ignore_eos` is set.

    Raises:
        APIError: 400 for limits that contradict each other or the output format.
    """

    def bad(param: str, message: str) -> APIError:
        return APIError(400, f"Invalid '{param}': {message}", param=param, code="invalid_value")

    if body.min_tokens > max_tokens:
        raise bad(
            "min_tokens",
            f"{body.min_tokens} is more than the {max_tokens} tokens that can be generated. Lower "
            "'min_tokens', or raise the maximum.",
        )
    param, grammar = output_grammar or (None, None)
    if allowed_ids and grammar is not None:
        raise bad(
            "allowed_token_ids",
            f"'{param}' already limits the output. Leave one of the two out.",
        )
    n_vocab = model.tokenizer.encoding.n_vocab
    if body.ignore_eos:
        grammar = TokenLimits.create(
            n_vocab, stop_ids=eos_ids, min_tokens=math.inf, grammar=grammar
        )
    if body.min_tokens or allowed_ids:
        grammar = TokenLimits.create(
            n_vocab,
            allowed_ids=allowed_ids,
            stop_ids=stop_ids,
            min_tokens=body.min_tokens,
            grammar=grammar,
        )
    return grammar


def sampling_params(
    body: GenerationBody,
    model: DecoderModel,
    imitated: Encoding | None,
    *,
    is_likelihood_scored: bool,
) -> SamplingParams:
    """Return the sampling parameters of a request, with a random seed if it has none.

    Raises:
        APIError: 400 for a bias of an id that is no token, or two names of a penalty that differ.
    """
    if body.repeat_penalty not in (None, body.sampling.get("repetition_penalty")):
        raise APIError(
            400,
            "Invalid 'repeat_penalty': it is another name of 'repetition_penalty', which has "
            "another value. Send one of them.",
            param="repeat_penalty",
            code="invalid_value",
        )
    return SamplingParams(
        **generation_config.resolve_params(
            body.sampling, model.default_sampling, is_likelihood_scored=is_likelihood_scored
        ),
        logit_bias=native_bias(body.logit_bias, body.model, model, imitated),
        seed=secrets.randbits(63) if body.seed is None else body.seed,
    )


async def interleave(
    streams: Sequence[AsyncGenerator[T, None]], max_concurrent: int
) -> AsyncGenerator[tuple[int, T], None]:
    """Read up to ``max_concurrent`` streams at a time; yield each item with its stream's index.

    The consumer sets the pace (backpressure). The first error of a stream is raised here after the
    other streams are closed. Closing this iterator closes the streams.
    """
    queue: asyncio.Queue[tuple[int, T] | None] = asyncio.Queue()
    stream_slots = asyncio.Semaphore(max_concurrent)
    queue_slots = asyncio.Semaphore(max_concurrent)

    async def read(index: int, stream: AsyncGenerator[T, None]) -> None:
        async with stream_slots, aclosing(stream):
            async for item in stream:
                await queue_slots.acquire()
                queue.put_nowait((index, item))

    async def read_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for index, stream in enumerate(streams):
                    group.create_task(read(index, stream))
        finally:
            queue.put_nowait(None)

    reader = asyncio.create_task(read_all())
    try:
        while (item := await queue.get()) is not None:
            queue_slots.release()
            yield item
        try:
            await reader
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
