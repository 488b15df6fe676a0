"""From token vectors to one vector per text: pooling, dense layers, normalization.

These are the modules that follow the transformer in a sentence-transformers model (Reimers &
Gurevych 2019, arXiv:1908.10084). A pooling mode turns the token vectors of a text into one vector;
several modes are concatenated:

    cls                   the vector of the first token
    lasttoken             the vector of the last token, which has seen the whole text in a decoder
    mean                  the average
    mean_sqrt_len_tokens  the sum, divided by the square root of the number of tokens
    weightedmean          the average, weighted by the position (Muennighoff 2022, arXiv:2202.08904)
    max                   the maximum of each channel

Leaves out: pooling that skips the tokens of the prompt (INSTRUCTOR).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from transformer.layers import linear
from transformer.weights import Linear

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def gelu(x: jax.Array) -> jax.Array:
    """Apply the exact GELU; `jax.nn.gelu` takes twice as long."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "identity": lambda x: x,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu": gelu,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
}


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Sizes and activation of a dense layer after the pooling.

    Raises:
        ValueError: The activation is unknown, or a width is not positive.
    """

    in_features: int
    out_features: int
    has_bias: bool = True
    activation: str = "tanh"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )
        for name in ("in_features", "out_features"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not isinstance(self.has_bias, bool):
            raise ValueError(f"bias must be True or False, got {self.has_bias!r}")


def check(
    pooling: str | tuple[str, ...], dense: Sequence[Dense], d_model: int
) -> str | tuple[str, ...]:
    """Check that pooling and dense layers fit together.

    Args:
        pooling: A mode, or several whose results are concatenated.
        dense: The dense layers after the pooling.
        d_model: D, the width of token vectors.

    Returns:
        The pooling; a tuple of one mode becomes that mode.

    Raises:
        ValueError: A mode is unknown, or `in_features` of a dense layer is not its input's width.
    """
    modes = (pooling,) if isinstance(pooling, str) else pooling
    if not isinstance(modes, tuple) or not modes or not set(map(str, modes)) <= set(MODES):
        names = ", ".join(map(repr, MODES))
        raise ValueError(f"pooling must be one or more of {names}, got {pooling!r}")
    width = d_model * len(modes)
    for layer in dense:
        if layer.in_features != width:
            raise ValueError(
                f"in_features of the dense layer must be {width}, the width of its input, got "
                f"{layer.in_features}"
            )
        width = layer.out_features
    return modes[0] if len(modes) == 1 else modes


def output_width(pooling: str | tuple[str, ...], dense: Sequence[Dense], d_model: int) -> int:
    """Return E, the width of the vectors after pooling and dense layers."""
    return dense[-1].out_features if dense else d_model * len(as_modes(pooling))


def as_modes(pooling: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the modes of a pooling as a tuple; a single mode becomes a tuple of one."""
    return (pooling,) if isinstance(pooling, str) else pooling


def pool_tokens(
    x: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    num_texts: int,
    pooling: str | tuple[str, ...],
) -> jax.Array:
    """Pool the token vectors of each text of a packed batch.

    Args:
        x: Token vectors, float32 [B, T, D].
        segments: Text number of each token within its row, int32 [B, T]; 0 is padding.
        positions: Position of each token within its text, int32 [B, T].
        num_texts: P, the maximum number of texts in a row.
        pooling: A mode, or M modes.

    Returns:
        float32 [B, P, M * D]. Index i of the second axis is segment i + 1, and zero if the row has
        no such segment.
    """
    numbers = jnp.arange(1, num_texts + 1)[:, None]  # [P, 1]
    mask = segments[:, None, :] == numbers  # [B, P, T]
    count = jnp.maximum(mask.sum(-1, keepdims=True), 1).astype(jnp.float32)  # [B, P, 1]
    position = positions[:, None, :]

    def pool(mode: str) -> jax.Array:
        if mode == "max":
            return _max_pool(x, segments, num_texts)
        if mode == "cls":
            weights = (mask & (position == 0)).astype(jnp.float32)
        elif mode == "lasttoken":
            weights = (mask & (position == count.astype(jnp.int32) - 1)).astype(jnp.float32)
        elif mode == "weightedmean":
            weights = mask * (position + 1).astype(jnp.float32)
            weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1.0)
        elif mode == "mean":
            weights = mask.astype(jnp.float32) / count
        else:
            weights = mask.astype(jnp.float32) / jnp.sqrt(count)
        return jnp.einsum("bpt,btd->bpd", weights, x, preferred_element_type=jnp.float32)

    vectors = [pool(mode) for mode in as_modes(pooling)]
    return vectors[0] if len(vectors) == 1 else jnp.concatenate(vectors, axis=-1)


def _max_pool(x: jax.Array, segments: jax.Array, num_texts: int) -> jax.Array:
    """Return the maximum of each channel over the tokens of each text, [B, P, D]."""

    def of_row(row: jax.Array, numbers: jax.Array) -> jax.Array:
        return jax.ops.segment_max(row, numbers, num_segments=num_texts + 1)[1:]

    y = jax.vmap(of_row)(x, segments)
    return jnp.where(jnp.isneginf(y), 0.0, y)  # minus infinity for segments without tokens


def project(
    y: jax.Array, weights: Sequence[Linear], dense: Sequence[Dense], normalize: bool
) -> jax.Array:
    """Apply the dense layers and the normalization to pooled vectors, float32 [..., D] -> [..., E].

    Args:
        y: Pooled vectors.
        weights: Weights of the dense layers.
        dense: The dense layers.
        normalize: Whether to scale vectors to length 1.
    """
    for p, layer in zip(weights, dense, strict=True):
        y = ACTIVATIONS[layer.activation](linear(y, p))
    if normalize:
        y = y / jnp.maximum(jnp.linalg.norm(y, axis=-1, keepdims=True), 1e-12)
    return y
