"""Looking inside a decoder: what each head looks at, what each layer would say, what heads do.

Plain functions from weights and ids to arrays, built on `decoder.forward(..., taps=...)`;
`pictures.py` draws what they return.

- `attention`: where each head of each layer looks (Vaswani et al. 2017, section 5 and appendix).
- `lens`: what the model would say if it stopped after each layer, by giving the stream there to
  the final norm and the head: the logit lens (nostalgebraist 2020).
- `alternatives`: what could have stood in each token's place, and how open the choice was.
- `ablate` and `head_effects`: the model without some heads, and what each head is worth on a text
  (Michel, Levy & Neubig 2019, arXiv:1905.10650).

A sequence is read whole and without a cache: memory grows with the square of its length.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer.config import Config
from transformer.decoder import Params, forward, unembed


class LogitLens(NamedTuple):
    """What would be said after each layer; row 0 is before the first, the last is the model's."""

    ids: jax.Array  # [L + 1, T, k] int32, the likeliest next tokens, the likeliest first
    logprobs: jax.Array  # [L + 1, T, k] float32, theirs
    entropy: jax.Array  # [L + 1, T] float32, bits


class Alternatives(NamedTuple):
    """What was likely in the place of each token but the first."""

    top_ids: jax.Array  # [T - 1, k] int32, the likeliest first
    top_logprobs: jax.Array  # [T - 1, k] float32, natural logarithms
    token_logprobs: jax.Array  # [T - 1] float32, those of the tokens that are there
    rank: jax.Array  # [T - 1] int32, how many were likelier than the token that is there
    entropy: jax.Array  # [T - 1] float32, bits: log2 of how many equal choices it was like


def attention(params: Params, cfg: Config, ids: Sequence[int]) -> jax.Array:
    """Where each head looks: float32 [L, N, T, T], rows sum to 1 over the last axis.

    Args:
        ids: of one sequence, T of them.

    Raises:
        ValueError: there are no ids, too many, or one is not in the vocabulary.
    """
    return _attention(params, cfg, _checked_ids(ids, cfg, 1))


def logit_lens(params: Params, cfg: Config, ids: Sequence[int], k: int = 1) -> LogitLens:
    """What the model would say next if it stopped after each layer.

    Args:
        ids: of one sequence, T of them.
        k: how many tokens to name.

    Raises:
        ValueError: as `attention`; or k is not between 1 and the vocabulary's size.
    """
    _check_k(k, cfg)
    return _logit_lens(params, cfg, _checked_ids(ids, cfg, 1), k)


def alternatives(params: Params, cfg: Config, ids: Sequence[int], k: int = 5) -> Alternatives:
    """What the model held for likely in the place of each token, having read those before it.

    Args:
        ids: of one sequence, two or more.
        k: how many tokens to name.

    Raises:
        ValueError: as `lens`; or there are fewer than two ids.
    """
    _check_k(k, cfg)
    return _alternatives(params, cfg, _checked_ids(ids, cfg, 2), k)


def ablate(params: Params, cfg: Config, heads: Collection[tuple[int, int]]) -> Params:
    """The weights of the same model without some heads: what they write is nothing.

    Args:
        heads: layer and head of each, from 0.

    Raises:
        ValueError: there is no such head.
    """
    kept = np.ones((cfg.num_layers, cfg.num_heads), np.float32)
    for layer, head in heads:
        if not (0 <= layer < cfg.num_layers and 0 <= head < cfg.num_heads):
            raise ValueError(
                f"there is no head {head} in layer {layer}: layers go from 0 to "
                f"{cfg.num_layers - 1}, heads from 0 to {cfg.num_heads - 1}"
            )
        kept[layer, head] = 0
    return _scale_heads(params, cfg, jnp.asarray(kept))


def loss(params: Params, cfg: Config, ids: Sequence[int]) -> jax.Array:
    """How surprised the model is by a sequence: nats a token, float32 [].

    Raises:
        ValueError: as `alternatives`.
    """
    return _loss(params, cfg, _checked_ids(ids, cfg, 2))


def head_effects(params: Params, cfg: Config, ids: Sequence[int]) -> jax.Array:
    """How much more surprised the model is without each of its heads, one at a time.

    The sequence is read L * N + 1 times.

    Returns:
        float32 [L, N], nats a token. Negative where the model does better without the head.

    Raises:
        ValueError: as `alternatives`.
    """
    return _head_effects(params, cfg, _checked_ids(ids, cfg, 2))


def _checked_ids(ids: Sequence[int], cfg: Config, least: int) -> np.ndarray:
    """The ids as a batch of one, [1, T]."""
    if not least <= len(ids) <= cfg.max_seq_len:
        raise ValueError(
            f"a sequence must have from {least} to {cfg.max_seq_len} tokens, got {len(ids)}"
        )
    for id in ids:
        if not 0 <= id < cfg.vocab_size:
            raise ValueError(f"ids go from 0 to {cfg.vocab_size - 1}, got {id}")
    return np.array([ids], np.int32)


def _check_k(k: int, cfg: Config) -> None:
    if not 1 <= k <= cfg.vocab_size:
        raise ValueError(f"k must be between 1 and {cfg.vocab_size}, got {k}")


@partial(jax.jit, static_argnames="cfg")
def _attention(params: Params, cfg: Config, ids: jax.Array) -> jax.Array:
    _, found = forward(params, cfg, ids, taps=("attention",))
    return found["attention"][:, 0]


@partial(jax.jit, static_argnames=("cfg", "k"))
def _logit_lens(params: Params, cfg: Config, ids: jax.Array, k: int) -> LogitLens:
    _, found = forward(params, cfg, ids, taps=("residual",))

    def look(x: jax.Array) -> LogitLens:  # layer by layer: all logits at once would be gigabytes
        logprobs = jax.nn.log_softmax(unembed(params, cfg, x))  # [T, V]
        best, ids = jax.lax.top_k(logprobs, k)
        return LogitLens(ids, best, _entropy(logprobs))

    return jax.lax.map(look, found["residual"][:, 0])


@partial(jax.jit, static_argnames=("cfg", "k"))
def _alternatives(params: Params, cfg: Config, ids: jax.Array, k: int) -> Alternatives:
    logits, _ = forward(params, cfg, ids)
    logprobs = jax.nn.log_softmax(logits[0, :-1])  # [T - 1, V]
    best, likely = jax.lax.top_k(logprobs, k)
    chosen = jnp.take_along_axis(logprobs, ids[0, 1:, None], axis=-1)  # [T - 1, 1]
    rank = jnp.sum(logprobs > chosen, axis=-1)
    return Alternatives(likely, best, chosen[:, 0], rank, _entropy(logprobs))


@partial(jax.jit, static_argnames="cfg")
def _loss(params: Params, cfg: Config, ids: jax.Array) -> jax.Array:
    logits, _ = forward(params, cfg, ids)
    logprobs = jax.nn.log_softmax(logits[0, :-1])
    return -jnp.take_along_axis(logprobs, ids[0, 1:, None], axis=-1).mean()


@partial(jax.jit, static_argnames="cfg")
def _head_effects(params: Params, cfg: Config, ids: jax.Array) -> jax.Array:
    count = cfg.num_layers * cfg.num_heads

    def without(head: jax.Array) -> jax.Array:
        kept = 1 - jax.nn.one_hot(head, count).reshape(cfg.num_layers, cfg.num_heads)
        return _loss(_scale_heads(params, cfg, kept), cfg, ids)

    losses = jax.lax.map(without, jnp.arange(count))
    return losses.reshape(cfg.num_layers, cfg.num_heads) - _loss(params, cfg, ids)


def _scale_heads(params: Params, cfg: Config, weights: jax.Array) -> Params:
    """What each head writes, times its weight: [L, N]. Done to the map that reads the heads."""
    layers = []
    for layer, row in zip(params.layers, weights, strict=True):
        columns = jnp.repeat(row, cfg.head_dim)  # [N * H]
        out = layer.out.replace(weight=layer.out.weight * columns.astype(layer.out.weight.dtype))
        if (lora := out.lora) is not None:  # it reads the heads too
            out = out.replace(lora=lora.replace(a=lora.a * columns.astype(lora.a.dtype)))
        layers.append(layer.replace(out=out))
    return params.replace(layers=tuple(layers))


def _entropy(logprobs: jax.Array) -> jax.Array:
    """Of distributions, in bits: float32 [..., V] -> [...]."""
    return -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1) / jnp.log(2.0)
