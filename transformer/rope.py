"""Rotary position embeddings (RoPE; Su et al. 2021, arXiv:2104.09864).

Each pair of channels of a query or key is turned by an angle that grows with its position, so that
the dot product of a query and a key depends on their distance alone. Pairs are (i, i + H/2), the
layout of Hugging Face checkpoints; GGUF files of the Llama family interleave them, and the loader
undoes that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for each position and channel pair.

    Args:
        positions: integer positions, [B, T].
        head_dim: H, even.
        theta: base of the geometric sequence of wavelengths.

    Returns:
        cos and sin, each float32 [B, T, 1, H/2], ready to broadcast over heads.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / jnp.power(jnp.float32(theta), exponent)  # [H/2]
    angle = positions.astype(jnp.float32)[..., None, None] * frequency  # [B, T, 1, H/2]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the channel pairs of `x` [B, T, N, H] by the given angles; same shape and dtype."""
    first, second = jnp.split(x, 2, axis=-1)  # [B, T, N, H/2] each
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
