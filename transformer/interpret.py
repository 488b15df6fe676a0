"""Interpretability of decoders: attention maps, logit lens, alternative tokens, head ablation.

The functions take weights and token ids and return arrays, computed with
`decoder.forward(..., taps=...)`. `plots.py` draws these arrays.

- `attention`: the attention weights of every head (Vaswani et al. 2017, appendix).
- `logit_lens`: the prediction after each layer, computed by applying the final norm and the head to
  the residual stream after that layer (nostalgebraist 2020).
- `alternatives`: the most likely tokens at each position, and the entropy of the prediction.
- `ablate` and `head_effects`: the model without some heads, and the increase of the loss without
  each head (Michel, Levy & Neubig 2019, arXiv:1905.10650).

A sequence is processed without a cache, so memory grows with the square of its length.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer import quant
from transformer.config import Config
from transformer.decoder import Params, forward, unembed
from transformer.weights import BlockWeight


class LogitLens(NamedTuple):
    """Predictions from the residual stream: index 0 before the first layer, i after layer i."""

    ids: jax.Array  # [L + 1, T, k] int32, most likely next tokens, most likely first
    logprobs: jax.Array  # [L + 1, T, k] float32, natural logarithms
    entropy: jax.Array  # [L + 1, T] float32, bits


class Alternatives(NamedTuple):
    """Most likely tokens at each position but the first, and statistics of the actual tokens."""

    top_ids: jax.Array  # [T - 1, k] int32, most likely first
    top_logprobs: jax.Array  # [T - 1, k] float32, natural logarithms
    token_logprobs: jax.Array  # [T - 1] float32, of the actual tokens
    rank: jax.Array  # [T - 1] int32, number of tokens more likely than the actual one
    entropy: jax.Array  # [T - 1] float32, bits


def attention(params: Params, cfg: Config, ids: Sequence[int]) -> jax.Array:
    """Return the attention weights of every head.

    Args:
        params: Weights of the decoder.
        cfg: Config of the decoder.
        ids: Token ids of one sequence, T of them.

    Returns:
        The weight of each key (last axis) for each query, float32 [L, N, T, T]; the last axis sums
        to 1, or less with attention sinks.

    Raises:
        ValueError: There are no ids or too many, or an id is not in the vocabulary.
    """
    return _attention(params, cfg, _checked_ids(ids, cfg, 1))


def logit_lens(params: Params, cfg: Config, ids: Sequence[int], k: int = 1) -> LogitLens:
    """Return the most likely next tokens at each position, predicted after each layer.

    Args:
        params: Weights of the decoder.
        cfg: Config of the decoder.
        ids: Token ids of one sequence, T of them.
        k: Number of tokens to return per position.

    Returns:
        Tokens, log-probabilities and entropies.

    Raises:
        ValueError: As `attention`, or k is not between 1 and the vocabulary size.
    """
    _check_k(k, cfg)
    return _logit_lens(params, cfg, _checked_ids(ids, cfg, 1), k)


def alternatives(params: Params, cfg: Config, ids: Sequence[int], k: int = 5) -> Alternatives:
    """Return the most likely tokens at each position, given the tokens before it.

    Args:
        params: Weights of the decoder.
        cfg: Config of the decoder.
        ids: Token ids of one sequence, two or more.
        k: Number of tokens to return per position.

    Returns:
        The alternatives, and rank and log-probability of the actual tokens.

    Raises:
        ValueError: As `logit_lens`, or there are fewer than two ids.
    """
    _check_k(k, cfg)
    return _alternatives(params, cfg, _checked_ids(ids, cfg, 2), k)


def ablate(params: Params, cfg: Config, heads: Collection[tuple[int, int]]) -> Params:
    """Return the weights with the output of some heads set to zero.

    Args:
        params: Weights of the decoder.
        cfg: Config of the decoder.
        heads: (layer, head) of each head to remove, counted from 0.

    Returns:
        The weights with zeros in the columns of the output projections that read these heads.

    Raises:
        ValueError: A head does not exist.
    """
    mask = np.ones((cfg.num_layers, cfg.num_heads), np.float32)
    for layer, head in heads:
        if not (0 <= layer < cfg.num_layers and 0 <= head < cfg.num_heads):
            raise ValueError(
                f"expected layers from 0 to {cfg.num_layers - 1} and heads from 0 to "
                f"{cfg.num_heads - 1}, got layer {layer}, head {head}"
            )
        mask[layer, head] = 0
    return _scale_heads(params, cfg, jnp.asarray(mask))


def loss(params: Params, cfg: Config, ids: Sequence[int]) -> jax.Array:
    """Return the mean cross-entropy of a sequence in nats per token, float32 [].

    Raises:
        ValueError: As `alternatives`.
    """
    return _loss(params, cfg, _checked_ids(ids, cfg, 2))


def head_effects(params: Params, cfg: Config, ids: Sequence[int]) -> jax.Array:
    """Return the increase of the loss when each head is removed, one at a time.

    This takes L * N + 1 forward passes.

    Returns:
        Nats per token, float32 [L, N]; negative if the loss is lower without the head.

    Raises:
        ValueError: As `alternatives`.
    """
    return _head_effects(params, cfg, _checked_ids(ids, cfg, 2))


def _checked_ids(ids: Sequence[int], cfg: Config, min_length: int) -> np.ndarray:
    """Return the ids as a batch of one sequence, int32 [1, T]."""
    if not min_length <= len(ids) <= cfg.max_seq_len:
        raise ValueError(
            f"a sequence must have from {min_length} to {cfg.max_seq_len} tokens, got {len(ids)}"
        )
    for id in ids:
        if not 0 <= id < cfg.vocab_size:
            raise ValueError(f"token ids must be from 0 to {cfg.vocab_size - 1}, got {id}")
    return np.array([ids], np.int32)


def _check_k(k: int, cfg: Config) -> None:
    if not 1 <= k <= cfg.vocab_size:
        raise ValueError(f"k must be between 1 and {cfg.vocab_size}, got {k}")


@partial(jax.jit, static_argnames="cfg")
def _attention(params: Params, cfg: Config, ids: jax.Array) -> jax.Array:
    _, taps = forward(params, cfg, ids, taps=("attention",))
    return taps["attention"][:, 0]


@partial(jax.jit, static_argnames=("cfg", "k"))
def _logit_lens(params: Params, cfg: Config, ids: jax.Array, k: int) -> LogitLens:
    _, taps = forward(params, cfg, ids, taps=("residual",))

    # One layer at a time, because the logits of all layers would take gigabytes.
    def predict(x: jax.Array) -> LogitLens:
        logprobs = jax.nn.log_softmax(unembed(params, cfg, x))  # [T, V]
        top_logprobs, ids = jax.lax.top_k(logprobs, k)
        return LogitLens(ids, top_logprobs, _entropy(logprobs))

    return jax.lax.map(predict, taps["residual"][:, 0])


@partial(jax.jit, static_argnames=("cfg", "k"))
def _alternatives(params: Params, cfg: Config, ids: jax.Array, k: int) -> Alternatives:
    logits, _ = forward(params, cfg, ids)
    logprobs = jax.nn.log_softmax(logits[0, :-1])  # [T - 1, V]
    top_logprobs, top_ids = jax.lax.top_k(logprobs, k)
    token_logprobs = jnp.take_along_axis(logprobs, ids[0, 1:, None], axis=-1)  # [T - 1, 1]
    rank = jnp.sum(logprobs > token_logprobs, axis=-1)
    return Alternatives(top_ids, top_logprobs, token_logprobs[:, 0], rank, _entropy(logprobs))


@partial(jax.jit, static_argnames="cfg")
def _loss(params: Params, cfg: Config, ids: jax.Array) -> jax.Array:
    logits, _ = forward(params, cfg, ids)
    logprobs = jax.nn.log_softmax(logits[0, :-1])
    return -jnp.take_along_axis(logprobs, ids[0, 1:, None], axis=-1).mean()


@partial(jax.jit, static_argnames="cfg")
def _head_effects(params: Params, cfg: Config, ids: jax.Array) -> jax.Array:
    total_heads = cfg.num_layers * cfg.num_heads

    def loss_without(head: jax.Array) -> jax.Array:
        mask = 1 - jax.nn.one_hot(head, total_heads).reshape(cfg.num_layers, cfg.num_heads)
        return _loss(_scale_heads(params, cfg, mask), cfg, ids)

    losses = jax.lax.map(loss_without, jnp.arange(total_heads))
    return losses.reshape(cfg.num_layers, cfg.num_heads) - _loss(params, cfg, ids)


def _scale_heads(params: Params, cfg: Config, weights: jax.Array) -> Params:
    """Multiply the output of each head by its weight [L, N], in the columns of `out`."""
    layers = []
    for layer, row in zip(params.layers, weights, strict=True):
        columns = jnp.repeat(row, cfg.head_dim)  # [N * H]
        weight = layer.out.weight
        if isinstance(weight, BlockWeight):
            weight = quant.dequantize(weight)
        out = layer.out.replace(weight=weight * columns.astype(weight.dtype))
        if (lora := out.lora) is not None:  # the input of the adapter is the same
            out = out.replace(lora=lora.replace(a=lora.a * columns.astype(lora.a.dtype)))
        layers.append(layer.replace(out=out))
    return params.replace(layers=tuple(layers))


def _entropy(logprobs: jax.Array) -> jax.Array:
    """Return the entropy of distributions in bits: float32 [..., V] -> float32 [...]."""
    return -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1) / jnp.log(2.0)
