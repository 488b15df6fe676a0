"""What the engine is asked, and what it answers: token ids only, never text or JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformer.sampling import SamplingParams


class Busy(Exception):
    """No room in the queue of waiting requests.

    Args:
        retry_after: seconds until there may be room again.
        waiting: how many of the client's own wait, if that is as many as one client's may; None if
            the queue is full.
    """

    def __init__(self, retry_after: float = 1.0, num_waiting: int | None = None) -> None:
        super().__init__(f"the queue is full; try again in {retry_after:.0f} s")
        self.retry_after, self.num_waiting = retry_after, num_waiting


@dataclass(frozen=True, kw_only=True)
class SequenceRequest:
    """One sequence to generate.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: the most tokens to generate; 0 only where `prompt_logprobs` are asked for.
        sampling: how to choose them.
        stop_ids: ids that end the answer.
        top_logprobs: None for no log-probabilities; k for the chosen token's and k alternatives.
        prompt_logprobs: the same for the tokens of the prompt, which then come back as `Scored`.
        choice: which of the n choices of a request this is; it varies the dice under one seed.
        client: who asks; requests of different clients are admitted in turn.
        is_later: it belongs to what was let in with an earlier one, so it is never turned away.
        deadline: when it ends, finished or not, on the clock of `time.monotonic`; None for no end.
        reuse: whether what others have read of the same prompt is used, and this kept for others.
            It changes how long the answer takes, never the answer. Scored prompts are read anew.
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
    """The prompt was read, `cached_tokens` of it before, for another request."""

    cached_tokens: int


@dataclass(frozen=True)
class Token:
    """One generated token. A stop id is never delivered."""

    id: int
    logprob: float | None = None  # natural logarithm, of the model's own distribution
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (id, logprob), likeliest first


@dataclass(frozen=True)
class PromptLogprobs:
    """The next tokens of the prompt, as the model expected them; the very first has no logprob."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Done:
    """The end of an answer; where logprobs are asked for, with the stop id that ended it."""

    finish_reason: Literal["stop", "length", "cancelled", "timeout"]
    token: Token | None = None


@dataclass(frozen=True)
class Failed:
    """The end of an answer that the engine could not finish."""

    message: str


@dataclass(frozen=True)
class Completion:
    """A finished answer of `Engine.generate_batch`.

    Attributes:
        ids: the generated token ids, without the stop id.
        reason: why it ended.
        tokens: the same tokens, with log-probabilities where they were asked for.
        scored: the tokens of the prompt, where `prompt_logprobs` were asked for.
    """

    ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "cancelled", "timeout"]
    tokens: tuple[Token, ...] = ()
    prompt_logprobs: tuple[Token, ...] = ()


Event = PromptLogprobs | PrefillDone | Token | Done | Failed
