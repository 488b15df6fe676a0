"""What both networks are made of: the condition of time and prompt, norms, patches, attention."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import struct

from diffusion.text import PromptEmbeds
from transformer.decoder import ArrayInfo
from transformer.layers import linear
from transformer.weights import Linear

EPS = 1e-6
_FREQUENCIES = 32  # of the features of time
_MAX_FREQUENCY = 50.0  # turns of the fastest of them, from noise to picture


@struct.dataclass
class Condition:
    """Weights that condense time and prompt to a vector."""

    time: Linear  # [d_cond, 2 x 32]
    prompt: Linear  # [d_cond, E]
    mix: Linear  # [d_cond, d_cond]
    null: jax.Array  # [E], stands for the prompt where there is none


def abstract_linear(out: int, inner: int, *, bias: bool = True, is_zero: bool = False) -> Linear:
    """A linear map to be, [out, in]; a branch that begins with zeros adds nothing at first."""
    fan_in = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)
    zeros = jax.nn.initializers.zeros
    return Linear(
        weight=ArrayInfo((out, inner), ("out", "in"), zeros if is_zero else fan_in),
        bias=ArrayInfo((out,), ("out",), zeros) if bias else None,
    )


def abstract_condition(d_cond: int, text_dim: int) -> Condition:
    """The tree of `Condition` with an `ArrayInfo` at each leaf."""
    return Condition(
        time=abstract_linear(d_cond, 2 * _FREQUENCIES),
        prompt=abstract_linear(d_cond, text_dim),
        mix=abstract_linear(d_cond, d_cond),
        null=ArrayInfo((text_dim,), ("text",), jax.nn.initializers.normal(1.0)),
    )


def init(key: jax.Array, tree):
    """Fresh float32 weights for a tree of `ArrayInfo`."""
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
    """What every block is told.

    Args:
        t: float32 [B], times of a flow.
        text: the prompts.
        keep: bool [B], False where the prompt is not to be seen.

    Returns:
        float32 [B, d_cond]; the states of the words, [B, S, E]; bool [B, S], which of them are
        there. A prompt that is not seen is a single word, the same for all.
    """
    seen = keep[:, None]
    words = jnp.where(seen[..., None], text.states.astype(jnp.float32), p.null)
    whole = jnp.where(seen, text.pooled.astype(jnp.float32), p.null)
    mask = jnp.where(seen, text.mask, jnp.arange(text.mask.shape[1]) == 0)
    y = linear(time_features(t), p.time) + linear(rms_norm(whole), p.prompt)
    cond = jax.nn.silu(linear(jax.nn.silu(y), p.mix))  # [B, d_cond]
    return cond, rms_norm(words), mask


def time_features(t: jax.Array) -> jax.Array:
    """Sines and cosines of the time at many frequencies, of variance 1: [B] -> [B, 2 x 32]."""
    turns = jnp.exp(jnp.linspace(math.log(0.5), math.log(_MAX_FREQUENCY), _FREQUENCIES))
    angle = 2 * math.pi * t[:, None] * turns
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1) * math.sqrt(2)


def rms_norm(x: jax.Array) -> jax.Array:
    """RMS norm over the last axis (Zhang & Sennrich 2019), without a scale of its own."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + EPS)


def attend(query: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array) -> jax.Array:
    """Attention: [B, T, N, H] over [B, S, N, H] twice, where `seen` [B, S]: [B, T, N, H]."""
    scores = jnp.einsum("btnh,bsnh->bnts", query, keys) / math.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30), -1)
    return jnp.einsum("bnts,bsnh->btnh", weights, values)


def space_to_depth(x: jax.Array, by: int = 2) -> jax.Array:
    """Blocks of pixels to channels: [B, Y, X, C] -> [B, Y/by, X/by, by * by * C]."""
    b, height, width, c = x.shape
    x = x.reshape(b, height // by, by, width // by, by, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height // by, width // by, by * by * c)


def depth_to_space(x: jax.Array, by: int = 2) -> jax.Array:
    """The inverse of `fold`."""
    b, height, width, c = x.shape
    x = x.reshape(b, height, width, by, by, c // by**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height * by, width * by, c // by**2)
