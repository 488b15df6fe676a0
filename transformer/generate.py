"""Generate token ids: prefill the prompt in chunks, then decode one token at a time.

`prefill` and `decode` are compiled functions. `transformer.engine`, which batches many sequences,
calls them directly; `generate` calls them for one sequence. They are compiled for a few fixed
shapes: a prompt is prefilled in chunks, the last chunk is padded, and later tokens overwrite the
padding in the cache.
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

CHUNK_SIZES = (256, 64)  # prompt tokens per prefill step; the largest that fits is used first


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
    """Process one chunk of one prompt, and return the logits of the chunk's last token.

    Args:
        params: Weights of the decoder.
        cfg: Config of the decoder.
        kv_cache: The cache; donated.
        ids: The chunk, padded at its end, int32 [1, T].
        tables: The cache blocks of the row, int32 [1, S/BLOCK_SIZE].
        starts: Number of tokens before the chunk, int32 [1]; a multiple of min(T, BLOCK_SIZE).
        last: Index of the last token of the chunk that is not padding, int32.

    Returns:
        The logits of that token, float32 [1, V], and the updated cache.
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
    """Process one chunk of one prompt and return the log-probability of each next token.

    Args:
        params: As in `prefill`.
        cfg: As in `prefill`.
        kv_cache: As in `prefill`.
        ids: As in `prefill`.
        next_ids: The token that follows each of `ids`, int32 [T].
        tables: As in `prefill`.
        starts: As in `prefill`.
        last: As in `prefill`.
        num_ids: Number of ids of the vocabulary; the embedding table may be padded beyond it.

    Returns:
        The logits that `prefill` returns (bitwise identical); the log-probabilities of `next_ids`
        and of the most likely alternatives, with leaves [T, ...]; and the updated cache.
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
    """Process the last token of every row, and sample the next token of every row.

    Args:
        params: Weights of the decoder.
        cfg: Config of the decoder.
        kv_cache: The cache; donated.
        penalty_state: The penalty state; donated.
        ids: The last token of each row, int32 [B].
        tables: The cache blocks of each row, int32 [B, S/BLOCK_SIZE].
        starts: Number of tokens of each row before this one, int32 [B].
        sampling_metadata: Sampling parameters of each row.
        num_ids: Number of ids of the vocabulary; the embedding table may be padded beyond it.

    Returns:
        The sampled tokens with their log-probabilities, the updated cache and the updated penalty
        state.
    """
    x, kv_cache = forward_cached(params, cfg, kv_cache, ids[:, None], tables, starts)
    logits = unembed(params, cfg, x[:, 0])  # [B, V]
    output, penalty_state = sampling.sample(
        logits, penalty_state, sampling_metadata, num_ids=num_ids
    )
    return output, kv_cache, penalty_state


sample = jax.jit(sampling.sample, static_argnames="num_ids", donate_argnames="penalty_state")
reset_slot = jax.jit(sampling.reset_slot, donate_argnames="penalty_state")


def chunks(
    prompt: Sequence[int], sizes: Sequence[int] = CHUNK_SIZES
) -> Iterator[tuple[int, np.ndarray, int]]:
    """Split a prompt into chunks for `prefill`.

    Args:
        prompt: Token ids.
        sizes: Chunk sizes in descending order. Only a chunk of the last size is padded.

    Yields:
        (start, ids, last): number of tokens before the chunk; its ids, int32 [1, size], padded with
        zeros; and the index of its last token that is not padding.
    """
    start = 0
    for size in sizes:
        while len(prompt) - start >= size or (size == sizes[-1] and start < len(prompt)):
            chunk = prompt[start : start + size]
            ids = np.zeros((1, size), np.int32)
            ids[0, : len(chunk)] = chunk
            yield start, ids, len(chunk) - 1
            start += size


def prompt_mask_and_bias(
    prompt: Sequence[int], sampling_params: SamplingParams, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the arguments of `reset_slot` for a new sequence.

    Args:
        prompt: Token ids.
        sampling_params: Sampling parameters of the sequence; only logit_bias is used.
        vocab_size: V, the number of rows of the embedding table.

    Returns:
        (is_in_prompt, bias): whether the prompt contains each token, bool [V], and the logit bias
        of each token, float32 [V].

    Raises:
        ValueError: logit_bias has an id outside the vocabulary.
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
    cache_dtype: jnp.dtype | str | type = jnp.float32,
    num_ids: int | None = None,
) -> Iterator[int]:
    """Generate the tokens that follow a prompt, one sequence at a time.

    Args:
        params: Weights of the decoder.
        cfg: Config of the decoder.
        prompt: Token ids.
        max_new_tokens: Maximum number of tokens to generate.
        sampling_params: Sampling parameters; greedy by default.
        stop_ids: Token ids that end the generation; they are not yielded.
        cache_dtype: Dtype of the key-value cache, float32 or bfloat16.
        num_ids: Number of ids of the vocabulary, if the embedding table is padded beyond it; None
            means cfg.vocab_size.

    Yields:
        Token ids.

    Raises:
        ValueError: The prompt is empty, an id is outside the vocabulary, or prompt and new tokens
            exceed the positions of the model.
    """
    if not prompt:
        raise ValueError("the prompt must have at least one token")
    if invalid := [i for i in prompt if not 0 <= i < cfg.vocab_size]:
        raise ValueError(f"prompt ids must be from 0 to {cfg.vocab_size - 1}, got {invalid[0]}")
    if len(prompt) + max_new_tokens > cfg.max_seq_len:
        raise ValueError(
            f"{len(prompt)} prompt tokens and {max_new_tokens} new tokens exceed the "
            f"{cfg.max_seq_len} positions of the model"
        )
    num_ids = num_ids or cfg.vocab_size
    num_blocks = cache.blocks_for(len(prompt) + max_new_tokens + CHUNK_SIZES[-1])
    kv_cache = cache.init(cfg, num_blocks, cache_dtype)
    tables = np.arange(1, num_blocks + 1, dtype=np.int32)[None]
    for start, ids, last in chunks(prompt):
        logits, kv_cache = prefill(
            params, cfg, kv_cache, ids, tables, np.array([start], np.int32), last
        )

    def metadata(step: int) -> SamplingMetadata:
        return sampling.batch_sampling_params([sampling_params], [0], [step], [0])

    penalty_state = reset_slot(
        sampling.init_penalty_state(1, cfg.vocab_size),
        0,
        *prompt_mask_and_bias(prompt, sampling_params, cfg.vocab_size),
    )
    output, penalty_state = sample(
        logits,  # pyright: ignore[reportPossiblyUnboundVariable]  # a prompt has at least one chunk
        penalty_state,
        metadata(0),
        num_ids=num_ids,
    )
    for step in range(1, max_new_tokens + 1):
        previous = output
        if step < max_new_tokens:
            # Dispatch the next step before reading the last token, so that an accelerator does not
            # wait for the host. On a CPU the call computes before it returns.
            starts = np.array([len(prompt) + step - 1], np.int32)
            output, kv_cache, penalty_state = decode(
                params,
                cfg,
                kv_cache,
                penalty_state,
                previous.ids,
                tables,
                starts,
                metadata(step),
                num_ids=num_ids,
            )
        token = int(previous.ids[0])
        if token in stop_ids:
            return
        yield token
