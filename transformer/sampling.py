"""From logits to the next token: temperature, truncation, penalties, and the dice.

Each row of a batch has settings of its own and is sampled on its own (`jax.lax.map`), with a random
key folded from its seed, its choice and its step: a request gets the same token whatever else is in
the batch. The order is: penalties, bias, temperature, top-k, top-p, min-p, draw.

- top-p ("nucleus sampling") is Holtzman et al. 2019, arXiv:1904.09751; min-p is Nguyen et al. 2024,
  arXiv:2407.01082; the repetition penalty is CTRL, Keskar et al. 2019, arXiv:1909.05858.
- The draw is the Gumbel-max trick: the argmax of logits plus Gumbel noise is a sample of their
  softmax, with no cumulative sum.
- Truncation (`kernels.truncate`) needs no sort; ties at the cut all stay in.

Presence and frequency penalties count generated tokens; the repetition penalty counts the prompt
too. Log-probabilities are those of the model, before any of this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from transformer import kernels

MAX_TOP_LOGPROBS = 20  # alternatives reported beside a token, at most


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of one sequence.

    Raises:
        ValueError: a setting is out of range or not a number.
    """

    temperature: float = 1.0  # 0 takes the likeliest token
    top_p: float = 1.0  # keep the likeliest tokens that hold this much probability
    top_k: int = 0  # keep this many; 0 keeps all
    min_p: float = 0.0  # keep tokens at least this likely, relative to the likeliest
    presence_penalty: float = 0.0  # subtracted once from tokens already generated
    frequency_penalty: float = 0.0  # subtracted once for each time generated
    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits of seen tokens
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0.0, 1e3),
            "top_p": (0.0, 1.0),
            "top_k": (0, 2**31 - 1),
            "min_p": (0.0, 1.0),
            "presence_penalty": (-1e3, 1e3),
            "frequency_penalty": (-1e3, 1e3),
            "repetition_penalty": (1e-3, 1e3),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"{name} must be from {low} to {high}, got {value!r}")
        for token, value in self.logit_bias.items():
            if not math.isfinite(value):
                raise ValueError(f"logit_bias must be finite, got {value!r} for token {token}")

    @property
    def is_adjusted(self) -> bool:
        """Whether anything is added to the logits before the temperature."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
        )


@struct.dataclass
class SamplingMetadata:
    """The settings of the rows of a batch, and where each stands. Every leaf is [B, ...]."""

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    repetition_penalty: jax.Array
    is_adjusted: jax.Array  # bool
    seed: jax.Array  # uint32 [B, 2], high and low half
    choice: jax.Array  # int32, which of the n choices of a request
    step: jax.Array  # int32, how many tokens the row has generated
    slot: jax.Array  # int32, the row's place in History


@struct.dataclass
class PenaltyState:
    """What penalties need to remember, one slot a sequence."""

    counts: jax.Array  # int32 [slots, V], how often each token was generated
    is_in_prompt: jax.Array  # bool [slots, V]
    bias: jax.Array  # float32 [slots, V]


@struct.dataclass
class SampleOutput:
    """The outcome of one step for each row."""

    ids: jax.Array  # int32 [B]
    logprobs: jax.Array  # float32 [B], of the model's own distribution
    top_ids: jax.Array  # int32 [B, MAX_TOP], likeliest first
    top_logprobs: jax.Array  # float32 [B, MAX_TOP]


def batch_sampling_params(
    rows: Sequence[SamplingParams],
    choices: Sequence[int],
    steps: Sequence[int],
    slots: Sequence[int],
) -> SamplingMetadata:
    """Gathers the settings of several sequences into arrays, on the host."""

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], dtype)

    seeds = np.array([row.seed % 2**64 for row in rows], np.uint64)
    return SamplingMetadata(
        temperature=column("temperature", np.float32),
        top_p=column("top_p", np.float32),
        top_k=column("top_k", np.int32),
        min_p=column("min_p", np.float32),
        presence_penalty=column("presence_penalty", np.float32),
        frequency_penalty=column("frequency_penalty", np.float32),
        repetition_penalty=column("repetition_penalty", np.float32),
        is_adjusted=column("is_adjusted", np.bool_),
        seed=np.stack([seeds >> np.uint64(32), seeds & np.uint64(2**32 - 1)], 1).astype(np.uint32),
        choice=np.array(choices, np.int32),
        step=np.array(steps, np.int32),
        slot=np.array(slots, np.int32),
    )


def init_penalty_state(num_slots: int, vocab_size: int) -> PenaltyState:
    """Empty slots."""
    return PenaltyState(
        counts=jnp.zeros((num_slots, vocab_size), jnp.int32),
        is_in_prompt=jnp.zeros((num_slots, vocab_size), bool),
        bias=jnp.zeros((num_slots, vocab_size), jnp.float32),
    )


def reset_slot(
    penalty_state: PenaltyState, slot: jax.Array, is_in_prompt: jax.Array, bias: jax.Array
) -> PenaltyState:
    """Clears a slot for a new sequence: its prompt's tokens [V] and its bias [V]."""
    return PenaltyState(
        counts=penalty_state.counts.at[slot].set(0),
        is_in_prompt=penalty_state.is_in_prompt.at[slot].set(is_in_prompt),
        bias=penalty_state.bias.at[slot].set(bias),
    )


@jax.named_scope("sample")
def sample(
    logits: jax.Array,
    penalty_state: PenaltyState,
    sampling_metadata: SamplingMetadata,
    *,
    num_ids: int,
) -> tuple[SampleOutput, PenaltyState]:
    """Draws the next token of every row.

    Args:
        logits: float32 [B, V].
        past: donate it; the drawn tokens are counted in it.
        num_ids: ids from here on are padding of the table and are never drawn.
    """
    is_token = jnp.arange(logits.shape[-1]) < num_ids
    logits = jnp.where(is_token, logits, -jnp.inf)

    def row(args: tuple[jax.Array, SamplingMetadata]) -> tuple[jax.Array, ...]:
        logits, own = args  # [V]
        adjusted = jax.lax.cond(
            own.is_adjusted, _apply_penalties, lambda x, *_: x, logits, penalty_state, own
        )
        token = jax.lax.cond(
            own.temperature > 0,
            _sample_token,
            lambda x, _: jnp.argmax(x).astype(jnp.int32),
            adjusted,
            own,
        )
        return token, *_logprobs(logits, token, num_ids)

    ids, logprobs, top_ids, top = jax.lax.map(row, (logits, sampling_metadata))
    counts = penalty_state.counts.at[sampling_metadata.slot, ids].add(1)
    return SampleOutput(ids, logprobs, top_ids, top), penalty_state.replace(counts=counts)


def gather_logprobs(logits: jax.Array, ids: jax.Array, *, num_ids: int) -> SampleOutput:
    """Log-probabilities of tokens that were not drawn but given, row by row.

    Args:
        logits: float32 [B, V].
        ids: int32 [B].
        num_ids: ids from here on are padding of the table.
    """
    logits = jnp.where(jnp.arange(logits.shape[-1]) < num_ids, logits, -jnp.inf)
    return SampleOutput(ids, *jax.lax.map(lambda row: _logprobs(*row, num_ids), (logits, ids)))


def _logprobs(logits: jax.Array, token: jax.Array, num_ids: int) -> tuple[jax.Array, ...]:
    """Of `token`, and the likeliest ids with theirs: float32 [], int32 and float32 [MAX_TOP]."""
    logprobs = logits - jax.nn.logsumexp(logits)
    top, top_ids = jax.lax.top_k(logprobs, min(MAX_TOP_LOGPROBS, num_ids))
    return logprobs[token], top_ids, top


def _apply_penalties(logits: jax.Array, past: PenaltyState, own: SamplingMetadata) -> jax.Array:
    counts = past.counts[own.slot]  # [V]
    is_seen = past.is_in_prompt[own.slot] | (counts > 0)
    penalty = own.repetition_penalty
    logits = jnp.where(is_seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = logits - own.frequency_penalty * counts - own.presence_penalty * (counts > 0)
    return logits + past.bias[own.slot]


def _sample_token(logits: jax.Array, own: SamplingMetadata) -> jax.Array:
    # Differences first: a tiny temperature must not make infinities of several tokens.
    logits = (logits - logits.max()) / own.temperature
    is_cut = (own.top_k > 0) | (own.top_p < 1) | (own.min_p > 0)
    logits = jax.lax.cond(
        is_cut,
        lambda: kernels.truncate(logits, own.top_k, own.top_p, own.min_p),
        lambda: logits,
    )
    key = jax.random.wrap_key_data(own.seed)
    key = jax.random.fold_in(jax.random.fold_in(key, own.choice), own.step)
    return jnp.argmax(logits + jax.random.gumbel(key, logits.shape)).astype(jnp.int32)
