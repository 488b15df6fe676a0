"""What the engine is asked, and what it answers: token ids only, never text or JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformer.sampling import Sampling


class Busy(Exception):
    """The queue of waiting requests is full; try again later."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to generate.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: the most tokens to generate; 0 only where `prompt_logprobs` are asked for.
        sampling: how to choose them.
        stop_ids: ids that end the answer.
        top_logprobs: None for no log-probabilities; k for the chosen token's and k alternatives.
        prompt_logprobs: the same for the tokens of the prompt, which then come back as `Scored`.
        choice: which of the n choices of a request this is; it varies the dice under one seed.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    choice: int = 0


@dataclass(frozen=True)
class Token:
    """One generated token. A stop id is never delivered."""

    id: int
    logprob: float | None = None  # natural logarithm, of the model's own distribution
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob), likeliest first


@dataclass(frozen=True)
class Scored:
    """The next tokens of the prompt, as the model expected them; the very first has no logprob."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Done:
    """The end of an answer."""

    reason: Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Failed:
    """The end of an answer that the engine could not finish."""

    message: str


Event = Scored | Token | Done | Failed
