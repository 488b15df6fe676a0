"""Sampling of the next token: penalties, temperature, truncation and a random draw.

Each row of a batch has its own parameters and is sampled separately (`jax.lax.map`), with a random
key derived from its seed, the index of the choice (0 to n - 1) and the number of generated tokens.
A request therefore gets the same tokens in every batch. The order is: penalties, bias, token
bitmask, temperature, top-k, top-p, min-p, typical-p, random draw.

- top-p ("nucleus sampling") is Holtzman et al. 2019, arXiv:1904.09751; min-p is Nguyen et al. 2024,
  arXiv:2407.01082; typical-p ("locally typical sampling") is Meister et al. 2022,
  arXiv:2202.00666; the repetition penalty is CTRL, Keskar et al. 2019, arXiv:1909.05858.
- The random draw is the Gumbel-max trick: the argmax of logits plus Gumbel noise is a sample of the
  softmax of the logits. It needs no cumulative sum.
- Truncation (`kernels.truncate`) needs no sort. Tokens with the same logit as the least likely
  token within top-k or top-p are not removed.

Presence and frequency penalties count generated tokens; the repetition penalty also counts the
prompt. The token bitmask of a row has a bit for each token that its grammar allows next. Reported
log-probabilities are those of the model, before all of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from transformer import kernels
from transformer.kernels.truncation import truncate_typical

MAX_TOP_LOGPROBS = 20  # maximum number of alternatives that are returned with a token


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one sequence; the defaults sample from the model's distribution.

    Raises:
        ValueError: A parameter is out of range or not a number.
    """

    temperature: float = 1.0  # 0 takes the most likely token
    top_p: float = 1.0  # keep the most likely tokens with this total probability
    top_k: int = 0  # keep this many tokens; 0 keeps all
    min_p: float = 0.0  # keep tokens of at least this probability relative to the most likely one
    # Keep the tokens whose information is nearest to the entropy, with this total probability.
    typical_p: float = 1.0
    presence_penalty: float = 0.0  # subtracted from the logits of tokens already generated
    frequency_penalty: float = 0.0  # subtracted once for each occurrence of a generated token
    # Divides positive and multiplies negative logits of tokens in the prompt or generated.
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit
    seed: int = 0  # seed of the random draws

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0.0, 1e3),
            "top_p": (0.0, 1.0),
            "top_k": (0, 2**31 - 1),
            "min_p": (0.0, 1.0),
            "typical_p": (0.0, 1.0),
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
        """Whether any penalty or bias changes the logits."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
        )


class SamplingMetadata(struct.PyTreeNode):
    """Sampling parameters, random seeds and slots of the rows of a batch; leaves are [B, ...]."""

    temperature: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    min_p: jax.Array | np.ndarray
    typical_p: jax.Array | np.ndarray
    presence_penalty: jax.Array | np.ndarray
    frequency_penalty: jax.Array | np.ndarray
    repetition_penalty: jax.Array | np.ndarray
    is_adjusted: jax.Array | np.ndarray  # bool
    seed: jax.Array | np.ndarray  # uint32 [B, 2], high and low half
    choice: jax.Array | np.ndarray  # int32, index among the n choices of a request
    step: jax.Array | np.ndarray  # int32, number of tokens the row has generated
    slot: jax.Array | np.ndarray  # int32, slot of the row in PenaltyState
    token_bitmask: jax.Array | np.ndarray | None  # uint32 [B, ceil(V/32)]; None allows all


class PenaltyState(struct.PyTreeNode):
    """Token counts and biases that `sample` needs for penalties, with one slot per sequence."""

    counts: jax.Array  # int32 [slots, V], number of times each token was generated
    is_in_prompt: jax.Array  # bool [slots, V]
    bias: jax.Array  # float32 [slots, V]


class SampleOutput(struct.PyTreeNode):
    """The sampled token of each row, its log-probability, and the most likely alternatives."""

    ids: jax.Array  # int32 [B]
    logprobs: jax.Array  # float32 [B], before penalties, bias, temperature and truncation
    top_ids: jax.Array  # int32 [B, MAX_TOP_LOGPROBS], most likely first
    top_logprobs: jax.Array  # float32 [B, MAX_TOP_LOGPROBS]


def batch_sampling_params(
    rows: Sequence[SamplingParams],
    choices: Sequence[int],
    steps: Sequence[int],
    slots: Sequence[int],
    token_bitmask: np.ndarray | None = None,
) -> SamplingMetadata:
    """Collect the sampling parameters of several sequences into NumPy arrays.

    Args:
        rows: Sampling parameters of each row, B of them.
        choices: Index of each row among the n choices of its request.
        steps: Number of tokens each row has generated.
        slots: Slot of each row in `PenaltyState`.
        token_bitmask: The tokens that can be sampled, uint32 [B, ceil(V/32)]: token i is bit i % 32
            of word i // 32. None allows all tokens.

    Returns:
        Metadata with leaves [B, ...], on the host.
    """

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], dtype)

    seeds = np.array([row.seed % 2**64 for row in rows], np.uint64)
    return SamplingMetadata(
        temperature=column("temperature", np.float32),
        top_p=column("top_p", np.float32),
        top_k=column("top_k", np.int32),
        min_p=column("min_p", np.float32),
        typical_p=column("typical_p", np.float32),
        presence_penalty=column("presence_penalty", np.float32),
        frequency_penalty=column("frequency_penalty", np.float32),
        repetition_penalty=column("repetition_penalty", np.float32),
        is_adjusted=column("is_adjusted", np.bool_),
        seed=np.stack([seeds >> np.uint64(32), seeds & np.uint64(2**32 - 1)], 1).astype(np.uint32),
        choice=np.array(choices, np.int32),
        step=np.array(steps, np.int32),
        slot=np.array(slots, np.int32),
        token_bitmask=token_bitmask,
    )


def init_penalty_state(num_slots: int, vocab_size: int) -> PenaltyState:
    """Return a penalty state with `num_slots` empty slots."""
    return PenaltyState(
        counts=jnp.zeros((num_slots, vocab_size), jnp.int32),
        is_in_prompt=jnp.zeros((num_slots, vocab_size), bool),
        bias=jnp.zeros((num_slots, vocab_size), jnp.float32),
    )


def reset_slot(
    penalty_state: PenaltyState, slot: jax.Array, is_in_prompt: jax.Array, bias: jax.Array
) -> PenaltyState:
    """Initialize a slot for a new sequence.

    Args:
        penalty_state: The state; donate it, so that it is updated in place.
        slot: Index of the slot, int32.
        is_in_prompt: Whether the prompt contains each token, bool [V].
        bias: Logit bias of each token, float32 [V].

    Returns:
        The updated state.
    """
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
    """Sample the next token of every row.

    Args:
        logits: float32 [B, V].
        penalty_state: State of the penalties; donate it. The sampled tokens are counted in it.
        sampling_metadata: Sampling parameters of the rows.
        num_ids: Number of ids of the vocabulary. Larger ids are padding of the embedding table and
            are never sampled.

    Returns:
        The sampled tokens and the updated penalty state.
    """
    is_token = jnp.arange(logits.shape[-1]) < num_ids
    logits = jnp.where(is_token, logits, -jnp.inf)

    def sample_row(args: tuple[jax.Array, SamplingMetadata]) -> tuple[jax.Array, ...]:
        logits, params = args  # [V]
        adjusted = jax.lax.cond(
            params.is_adjusted, _apply_penalties, lambda x, *_: x, logits, penalty_state, params
        )
        if params.token_bitmask is not None:
            adjusted = _apply_bitmask(adjusted, jnp.asarray(params.token_bitmask))
        token = jax.lax.cond(
            params.temperature > 0,
            _sample_token,
            lambda x, _: jnp.argmax(x).astype(jnp.int32),
            adjusted,
            params,
        )
        return token, *_logprobs(logits, token, num_ids)

    ids, logprobs, top_ids, top_logprobs = jax.lax.map(sample_row, (logits, sampling_metadata))
    counts = penalty_state.counts.at[sampling_metadata.slot, ids].add(1)
    output = SampleOutput(ids, logprobs, top_ids, top_logprobs)
    return output, penalty_state.replace(counts=counts)


def gather_logprobs(logits: jax.Array, ids: jax.Array, *, num_ids: int) -> SampleOutput:
    """Return the log-probability of a given token per row, and the most likely alternatives.

    Args:
        logits: float32 [B, V].
        ids: Token of each row, int32 [B].
        num_ids: Number of ids of the vocabulary; larger ids are padding of the embedding table.

    Returns:
        A `SampleOutput` with the given `ids` in place of sampled ones.
    """
    logits = jnp.where(jnp.arange(logits.shape[-1]) < num_ids, logits, -jnp.inf)
    return SampleOutput(
        ids, *jax.lax.map(lambda row: _logprobs(row[0], row[1], num_ids), (logits, ids))
    )


def _logprobs(logits: jax.Array, token: jax.Array, num_ids: int) -> tuple[jax.Array, ...]:
    """Return log-probabilities from the logits [V] of one row.

    Returns:
        The log-probability of `token`, float32 []; the ids of the most likely tokens, int32
        [MAX_TOP_LOGPROBS]; and their log-probabilities, float32 [MAX_TOP_LOGPROBS].
    """
    logprobs = logits - jax.nn.logsumexp(logits)
    top_logprobs, top_ids = jax.lax.top_k(logprobs, min(MAX_TOP_LOGPROBS, num_ids))
    return logprobs[token], top_ids, top_logprobs


def _apply_penalties(
    logits: jax.Array, penalty_state: PenaltyState, params: SamplingMetadata
) -> jax.Array:
    counts = penalty_state.counts[params.slot]  # [V]
    occurs = penalty_state.is_in_prompt[params.slot] | (counts > 0)
    penalty = params.repetition_penalty
    logits = jnp.where(occurs, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    return logits + penalty_state.bias[params.slot]


def _apply_bitmask(logits: jax.Array, token_bitmask: jax.Array) -> jax.Array:
    """Set logits [V] of tokens outside the bitmask, uint32 [ceil(V/32)], to minus infinity."""

    def mask() -> jax.Array:
        bits = (token_bitmask[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1  # [ceil(V/32), 32]
        return jnp.where(bits.reshape(-1)[: len(logits)] == 1, logits, -jnp.inf)

    is_unlimited = jnp.all(token_bitmask == jnp.uint32(0xFFFFFFFF))
    return jax.lax.cond(is_unlimited, lambda: logits, mask)


def _sample_token(logits: jax.Array, params: Any) -> jax.Array:
    """Sample a token [] from logits [V]; `params` is the `SamplingMetadata` of one row."""
    # Subtract the maximum first: dividing by a tiny temperature must not overflow to infinity.
    logits = (logits - logits.max()) / params.temperature
    is_truncated = (params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)
    logits = jax.lax.cond(
        is_truncated,
        lambda: kernels.truncate(logits, params.top_k, params.top_p, params.min_p),
        lambda: logits,
    )
    logits = jax.lax.cond(
        params.typical_p < 1,
        lambda: truncate_typical(logits, params.typical_p),
        lambda: logits,
    )
    key = jax.random.wrap_key_data(params.seed)
    key = jax.random.fold_in(jax.random.fold_in(key, params.choice), params.step)
    return jnp.argmax(logits + jax.random.gumbel(key, logits.shape)).astype(jnp.int32)
