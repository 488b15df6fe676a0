"""Generating token ids: prefill the prompt in chunks, then decode one token at a time.

`prefill` and `decode` are the two compiled programs of every step; a server that batches many
sequences calls them directly, and `generate` strings them together for one sequence. Shapes are few
and fixed, so each program is compiled once: prompts are read in chunks, the last of them padded,
and the padding is overwritten by the tokens that follow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from transformer import cache, sampling
from transformer.config import Config
from transformer.decoder import Params, forward_cached, unembed
from transformer.sampling import PenaltyState, SampleOutput, SamplingMetadata, SamplingParams

CHUNK_SIZES = (256, 64)  # prompt tokens read at once, the longest that still fits first


@partial(jax.jit, static_argnames="cfg", donate_argnames="kv_cache")
def prefill(
    params: Params,
    cfg: Config,
    kv_cache: cache.KVCache,
    ids: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
    last: jax.Array,
) -> tuple[jax.Array, cache.KVCache]:
    """Reads one chunk of one prompt.

    Args:
        ids: int32 [1, T], the chunk, padded behind its end.
        tables: int32 [1, S/BLOCK], the row's cache blocks.
        starts: int32 [1], how many tokens came before, a multiple of T (or of BLOCK if T is more).
        last: int32, index of the chunk's last real token.

    Returns:
        Logits behind that token, float32 [1, V], and the cache.
    """
    x, kv_cache = forward_cached(params, cfg, kv_cache, ids, tables, starts)
    return unembed(params, cfg, x[:, last]), kv_cache


@partial(jax.jit, static_argnames=("cfg", "num_ids"), donate_argnames="kv_cache")
def prefill_with_logprobs(
    params: Params,
    cfg: Config,
    kv_cache: cache.KVCache,
    ids: jax.Array,
    next_ids: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
    last: jax.Array,
    *,
    num_ids: int,
) -> tuple[jax.Array, SampleOutput, cache.KVCache]:
    """Reads one chunk of one prompt, as `prefill` does, and says how likely each next token was.

    Args:
        following: int32 [T], the token that came after each of `ids`.
        num_ids: how many ids the vocabulary has; the table may be padded beyond.

    Returns:
        What `prefill` returns, bit for bit, and between them the log-probabilities of `following`
        with the likeliest alternatives, every leaf [T, ...].
    """
    x, kv_cache = forward_cached(params, cfg, kv_cache, ids, tables, starts)
    scores = sampling.gather_logprobs(unembed(params, cfg, x[0]), next_ids, num_ids=num_ids)
    return unembed(params, cfg, x[:, last]), scores, kv_cache


@partial(jax.jit, static_argnames=("cfg", "num_ids"), donate_argnames=("kv_cache", "penalty_state"))
def decode(
    params: Params,
    cfg: Config,
    kv_cache: cache.KVCache,
    penalty_state: PenaltyState,
    ids: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
    sampling_metadata: SamplingMetadata,
    *,
    num_ids: int,
) -> tuple[SampleOutput, cache.KVCache, PenaltyState]:
    """Reads one token of every row and draws the next.

    Args:
        ids: int32 [B], the last token of each row.
        tables: int32 [B, S/BLOCK].
        starts: int32 [B], how many tokens each row holds before this one.
        rows: how each row is sampled.
        num_ids: how many ids the vocabulary has; the table may be padded beyond.
    """
    x, kv_cache = forward_cached(params, cfg, kv_cache, ids[:, None], tables, starts)
    logits = unembed(params, cfg, x[:, 0])  # [B, V]
    drawn, penalty_state = sampling.sample(
        logits, penalty_state, sampling_metadata, num_ids=num_ids
    )
    return drawn, kv_cache, penalty_state


sample = jax.jit(sampling.sample, static_argnames="num_ids", donate_argnames="penalty_state")
reset_slot = jax.jit(sampling.reset_slot, donate_argnames="penalty_state")


def chunks(
    prompt: Sequence[int], sizes: Sequence[int] = CHUNK_SIZES
) -> Iterator[tuple[int, np.ndarray, int]]:
    """Cuts a prompt into chunks of the given sizes, longest first.

    Yields:
        (start, ids int32 [1, size] padded with zeros, index of the last real id).
    """
    start = 0
    for size in sizes:
        while len(prompt) - start >= size or (size == sizes[-1] and start < len(prompt)):
            real = prompt[start : start + size]
            ids = np.zeros((1, size), np.int32)
            ids[0, : len(real)] = real
            yield start, ids, len(real) - 1
            start += size


def prompt_mask_and_bias(prompt: Sequence[int], sampling_params: SamplingParams, vocab_size: int):
    """What `begin` is told of a new sequence: (is_in_prompt bool [V], bias float32 [V]).

    Raises:
        ValueError: a logit_bias is for an id outside the vocabulary.
    """
    is_in_prompt, bias = np.zeros(vocab_size, bool), np.zeros(vocab_size, np.float32)
    is_in_prompt[list(prompt)] = True
    for token, value in sampling_params.logit_bias.items():
        if not 0 <= token < vocab_size:
            raise ValueError(f"logit_bias ids must be from 0 to {vocab_size - 1}, got {token}")
        bias[token] = value
    return is_in_prompt, bias


def generate(
    params: Params,
    cfg: Config,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling_params: SamplingParams = SamplingParams(temperature=0.0),  # noqa: B008 (frozen)
    stop_ids: Collection[int] = (),
    cache_dtype: jnp.dtype = jnp.float32,
    num_ids: int | None = None,
) -> Iterator[int]:
    """Yields the ids that follow `prompt`, until a stop id (not yielded) or the limit.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, or more positions than the model
            has.
    """
    if not prompt:
        raise ValueError("the prompt must hold at least one token")
    if bad := [i for i in prompt if not 0 <= i < cfg.vocab_size]:
        raise ValueError(f"prompt ids must be from 0 to {cfg.vocab_size - 1}, got {bad[0]}")
    if len(prompt) + max_new_tokens > cfg.max_seq_len:
        raise ValueError(
            f"{len(prompt)} prompt tokens and {max_new_tokens} new ones are more than the "
            f"{cfg.max_seq_len} positions of the model"
        )
    num_ids = num_ids or cfg.vocab_size
    num_blocks = cache.blocks_for(len(prompt) + max_new_tokens + CHUNK_SIZES[-1])
    memory = cache.init(cfg, num_blocks, cache_dtype)
    tables = np.arange(1, num_blocks + 1, dtype=np.int32)[None]
    for start, ids, last in chunks(prompt):
        logits, memory = prefill(
            params, cfg, memory, ids, tables, np.array([start], np.int32), last
        )

    def rows(step: int) -> SamplingMetadata:
        return sampling.batch_sampling_params([sampling_params], [0], [step], [0])

    past = reset_slot(
        sampling.init_penalty_state(1, cfg.vocab_size),
        0,
        *prompt_mask_and_bias(prompt, sampling_params, cfg.vocab_size),
    )
    drawn, past = sample(logits, past, rows(0), num_ids=num_ids)
    for step in range(1, max_new_tokens + 1):
        previous = drawn
        if step < max_new_tokens:
            # Started before the last token is looked at, so that an accelerator need not wait for
            # us. On a CPU the call computes before it returns, and hides nothing.
            start = np.array([len(prompt) + step - 1], np.int32)
            drawn, memory, past = decode(
                params, cfg, memory, past, previous.ids, tables, start, rows(step), num_ids=num_ids
            )
        token = int(previous.ids[0])
        if token in stop_ids:
            return
        yield token
