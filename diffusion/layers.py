"""Layers of both networks: embedding of time and prompt, norms, patches, attention."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from diffusion.text import PromptEmbeds
from transformer.decoder import ArrayInfo
from transformer.layers import linear
from transformer.weights import Linear

EPS = 1e-6
_FREQUENCIES = 32  # number of frequencies in the time features
_MAX_FREQUENCY = 50.0  # highest frequency: periods between t = 0 and t = 1


@struct.dataclass
class Condition:
    """Weights of the layers that embed the timestep and the prompt."""

    time: Linear  # [d_cond, 2 x 32]
    prompt: Linear  # [d_cond, E]
    mix: Linear  # [d_cond, d_cond]
    null: jax.Array  # [E], replaces a dropped prompt


def array_info(shape: tuple[int, ...], axes: tuple[str, ...], initializer: Any) -> Any:
    """Return an `ArrayInfo`, typed as `Any` so that it can be the value of an array field.

    Args:
        shape: the shape of the array.
        axes: the names of its axes.
        initializer: an initializer of `jax.nn.initializers`.
    """
    return ArrayInfo(shape, axes, initializer)


def abstract_linear(
    out_dim: int, in_dim: int, *, bias: bool = True, is_zero: bool = False
) -> Linear:
    """Return a `Linear` with an `ArrayInfo` at each leaf; the weight is [out_dim, in_dim].

    Args:
        out_dim: output channels.
        in_dim: input channels.
        bias: whether the layer has a bias.
        is_zero: initialize the weight to zero, so that a residual branch ending in the layer
            initially adds nothing.
    """
    fan_in = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)
    zeros = jax.nn.initializers.zeros
    return Linear(
        weight=array_info((out_dim, in_dim), ("out", "in"), zeros if is_zero else fan_in),
        bias=array_info((out_dim,), ("out",), zeros) if bias else None,
    )


def abstract_condition(d_cond: int, text_dim: int) -> Condition:
    """Return a `Condition` with an `ArrayInfo` at each leaf.

    Args:
        d_cond: width of the embedding.
        text_dim: E, width of the text encoder's states.
    """
    return Condition(
        time=abstract_linear(d_cond, 2 * _FREQUENCIES),
        prompt=abstract_linear(d_cond, text_dim),
        mix=abstract_linear(d_cond, d_cond),
        null=array_info((text_dim,), ("text",), jax.nn.initializers.normal(1.0)),
    )


def init(key: jax.Array, tree: Any) -> Any:
    """Return randomly initialized float32 weights for a tree of `ArrayInfo`.

    Args:
        key: a PRNG key.
        tree: a pytree of `ArrayInfo`; the result has the same structure.
    """
    infos, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(infos))
    arrays = [
        info.initializer(key, info.shape, jnp.float32)
        for key, info in zip(keys, infos, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)


def condition(
    p: Condition, t: jax.Array, text: PromptEmbeds, keep: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Embed timesteps and prompts, as the conditioning of every block.

    Args:
        p: the weights.
        t: float32 [B], timesteps as flow times: 0 is noise, 1 the clean image.
        text: the encoded prompts.
        keep: bool [B]; where False, the prompt is replaced by the single token `p.null`.

    Returns:
        The embedding of timestep and prompt, float32 [B, d_cond]; the normalized states of the
        prompt tokens, [B, S, E]; and their mask, bool [B, S].
    """
    keep = keep[:, None]
    words = jnp.where(keep[..., None], text.states.astype(jnp.float32), p.null)
    pooled = jnp.where(keep, text.pooled.astype(jnp.float32), p.null)
    mask = jnp.where(keep, text.mask, jnp.arange(text.mask.shape[1]) == 0)
    y = linear(time_features(t), p.time) + linear(rms_norm(pooled), p.prompt)
    cond = jax.nn.silu(linear(jax.nn.silu(y), p.mix))  # [B, d_cond]
    return cond, rms_norm(words), mask


def time_features(t: jax.Array) -> jax.Array:
    """Return cosines and sines of t at 32 frequencies, scaled to variance 1: [B] -> [B, 2 x 32]."""
    frequencies = jnp.exp(jnp.linspace(math.log(0.5), math.log(_MAX_FREQUENCY), _FREQUENCIES))
    angle = 2 * math.pi * t[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1) * math.sqrt(2)


def rms_norm(x: jax.Array) -> jax.Array:
    """Apply an RMS norm over the last axis (Zhang & Sennrich 2019), without a learned scale."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + EPS)


def attend(query: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """Apply multi-head attention.

    Args:
        query: [B, T, N, H].
        keys: [B, S, N, H].
        values: [B, S, N, H].
        mask: bool [B, S], True for keys to attend to.

    Returns:
        [B, T, N, H].
    """
    scores = jnp.einsum("btnh,bsnh->bnts", query, keys) / math.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), -1)
    return jnp.einsum("bnts,bsnh->btnh", weights, values)


def space_to_depth(x: jax.Array, block: int = 2) -> jax.Array:
    """Move blocks of pixels to channels: [B, Y, X, C] -> [B, Y/block, X/block, block**2 * C]."""
    b, height, width, c = x.shape
    x = x.reshape(b, height // block, block, width // block, block, c)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, height // block, width // block, block * block * c)


def depth_to_space(x: jax.Array, block: int = 2) -> jax.Array:
    """Move channels to blocks of pixels, the inverse of `space_to_depth`."""
    b, height, width, c = x.shape
    x = x.reshape(b, height, width, block, block, c // block**2)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, height * block, width * block, c // block**2)
