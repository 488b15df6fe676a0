"""The requests and events of the engine: token ids only, never text or JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from transformer.sampling import SamplingParams


class Busy(Exception):
    """Raised when the queue of waiting requests is full.

    Args:
        retry_after: estimated seconds until the queue has room again.
        num_waiting: the number of waiting requests of this client if the client has reached its
            limit; None if the whole queue is full.
    """

    def __init__(self, retry_after: float = 1.0, num_waiting: int | None = None) -> None:
        super().__init__(f"the queue is full; try again in {retry_after:.0f} s")
        self.retry_after, self.num_waiting = retry_after, num_waiting


class GrammarError(Exception):
    """Raised when a grammar cannot be continued, for example because it exceeds a limit."""


class GrammarMatcher(Protocol):
    """The state of a grammar after the tokens generated so far."""

    @property
    def is_finished(self) -> bool:
        """Whether no token can follow: the sequence is complete."""
        ...

    def token_bitmask(self) -> np.ndarray:
        """Return which tokens can come next, uint32 [ceil(n/32)]; see `sampling.SamplingMetadata`.

        Raises:
            GrammarError: the grammar exceeds a limit.
        """
        ...

    def accept(self, token: int) -> None:
        """Append a token, which `token_bitmask` must allow, to the text of the sequence.

        Raises:
            GrammarError: the token is not allowed, or the grammar exceeds a limit.
        """
        ...


class Grammar(Protocol):
    """A compiled grammar, which limits the tokens of any number of sequences."""

    def matcher(self) -> GrammarMatcher:
        """Return a new matcher, in the state before the first token."""
        ...


@dataclass(frozen=True, kw_only=True)
class SequenceRequest:
    """A request to generate one sequence.

    Attributes:
        prompt: token ids of the prompt, at least one.
        max_tokens: the maximum number of tokens to generate; 0 is allowed with `prompt_logprobs`.
        sampling_params: temperature, top-p and the other parameters of the sampler.
        stop_ids: token ids that end the sequence.
        top_logprobs: k, to get the log-probabilities of the sampled token and of the k likeliest
            tokens; None for no log-probabilities.
        logprob_token_ids: token ids whose log-probabilities the first generated token has in place
            of the likeliest ones, to score given labels; `top_logprobs` must be their number.
        prompt_logprobs: like `top_logprobs`, for the tokens of the prompt; delivered as
            `PromptLogprobs`.
        index: the index among the n choices of one API request, so that choices with the same seed
            get different random numbers.
        client: the name of the client; clients are admitted in turn.
        priority: 0 for interactive requests, more for work that can wait. A sequence is admitted
            and prefilled before those with a greater value, and preempts them if it needs their
            slot or blocks.
        is_accepted: whether an earlier sequence of the same API request was accepted. Then the
            queue limits do not apply to this sequence.
        deadline: the time at which the sequence is ended even if it is unfinished, on the clock of
            the engine (`time.monotonic` by default); None for no deadline.
        use_prefix_cache: whether to use cached blocks of prompts with the same beginning, and to
            cache the blocks of this prompt. It affects the time to the first token, never the
            tokens. A request with `prompt_logprobs` does not use the prefix cache.
        grammar: limits the generated tokens; None for no limit. The sequence ends with "stop" when
            the grammar is complete.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling_params: SamplingParams
    stop_ids: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    index: int = 0
    client: str = ""
    priority: int = 0
    is_accepted: bool = False
    deadline: float | None = None
    use_prefix_cache: bool = True
    grammar: Grammar | None = None


@dataclass(frozen=True)
class PrefillDone:
    """The event that the prefill is complete; `cached_tokens` came from the prefix cache."""

    cached_tokens: int


@dataclass(frozen=True)
class Token:
    """The event of one generated token. Tokens in `stop_ids` are not delivered as this event.

    Attributes:
        id: the token id.
        logprob: the natural logarithm of the probability of the token before temperature and
            penalties; None if not requested.
        top_logprobs: pairs (id, logprob) of the likeliest tokens, likeliest first.
    """

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptLogprobs:
    """The event with the prompt tokens of one chunk and their log-probabilities.

    The first token of the prompt has no log-probability.
    """

    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Done:
    """The event that a sequence ended.

    `token` is the sampled stop token if a stop token ended the sequence and the request has
    `top_logprobs`; else None.
    """

    finish_reason: Literal["stop", "length", "cancelled", "timeout"]
    token: Token | None = None


@dataclass(frozen=True)
class Failed:
    """The event that a sequence ended because of an error.

    `is_grammar_error` is set if the cause is the grammar of the request.
    """

    message: str
    is_grammar_error: bool = False


@dataclass(frozen=True)
class Completion:
    """A finished sequence of `Engine.generate_batch`.

    Attributes:
        ids: the generated token ids, without the stop id.
        finish_reason: why the sequence ended.
        tokens: the generated tokens, with log-probabilities if the request has `top_logprobs`.
        prompt_logprobs: the tokens of the prompt with log-probabilities, if the request has
            `prompt_logprobs`; otherwise empty.
    """

    ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "cancelled", "timeout"]
    tokens: tuple[Token, ...] = ()
    prompt_logprobs: tuple[Token, ...] = ()


Event = PromptLogprobs | PrefillDone | Token | Done | Failed
