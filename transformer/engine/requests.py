"""The requests and events of the engine: token ids only, never text or JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformer.sampling import SamplingParams


class Busy(Exception):
    """The queue of waiting requests has no room.

    Args:
        retry_after: seconds until there may be room again.
        num_waiting: the number of the client's own waiting requests if the client has reached its
            limit; None if the queue is full.
    """

    def __init__(self, retry_after: float = 1.0, num_waiting: int | None = None) -> None:
        super().__init__(f"the queue is full; try again in {retry_after:.0f} s")
        self.retry_after, self.num_waiting = retry_after, num_waiting


@dataclass(frozen=True, kw_only=True)
class SequenceRequest:
    """One sequence to generate.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: the maximum number of tokens to generate; 0 is allowed with `prompt_logprobs`.
        sampling_params: temperature, top-p and the other parameters of the sampler.
        stop_ids: token ids that end the sequence.
        top_logprobs: None for no log-probabilities; k for those of the sampled token and of the k
            likeliest tokens.
        prompt_logprobs: the same for the tokens of the prompt, delivered as `PromptLogprobs`.
        index: the index among the n choices of one API request; it varies the random numbers under
            one seed.
        client: the name of the client; clients are admitted in turn.
        is_accepted: whether an earlier sequence of the same API request was accepted. The queue
            limits then do not apply.
        deadline: the time at which the sequence ends, finished or not, on the engine's clock
            (`time.monotonic` by default); None for no deadline.
        use_prefix_cache: whether to use cached blocks of the same prompt and to cache this one's.
            It changes the time to the first token, never the tokens. A prompt with
            `prompt_logprobs` does not use the prefix cache.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling_params: SamplingParams
    stop_ids: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    index: int = 0
    client: str = ""
    is_accepted: bool = False
    deadline: float | None = None
    use_prefix_cache: bool = True


@dataclass(frozen=True)
class PrefillDone:
    """The prefill is complete; `cached_tokens` prompt tokens came from the prefix cache."""

    cached_tokens: int


@dataclass(frozen=True)
class Token:
    """One token with its log-probabilities. A stop id is never delivered as a token.

    Attributes:
        id: the token id.
        logprob: the natural logarithm of its probability, before temperature and penalties.
        top_logprobs: (id, logprob) of the likeliest tokens, likeliest first.
    """

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptLogprobs:
    """The log-probabilities of the next prompt tokens. The first prompt token has none."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Done:
    """The end of a sequence. With `top_logprobs`, `token` is the stop token that ended it."""

    finish_reason: Literal["stop", "length", "cancelled", "timeout"]
    token: Token | None = None


@dataclass(frozen=True)
class Failed:
    """The end of a sequence that the engine could not finish."""

    message: str


@dataclass(frozen=True)
class Completion:
    """A finished sequence of `Engine.generate_batch`.

    Attributes:
        ids: the generated token ids, without the stop id.
        finish_reason: why the sequence ended.
        tokens: the same tokens, with log-probabilities if the request has `top_logprobs`.
        prompt_logprobs: the tokens of the prompt, if the request has `prompt_logprobs`.
    """

    ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "cancelled", "timeout"]
    tokens: tuple[Token, ...] = ()
    prompt_logprobs: tuple[Token, ...] = ()


Event = PromptLogprobs | PrefillDone | Token | Done | Failed
