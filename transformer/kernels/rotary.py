"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864): `kernels.rotate`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from transformer.kernels.registry import register


@register("rotate")
def reference(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Multiply channel pairs, as complex numbers, with complex numbers of modulus 1."""
    pairs = jax.lax.complex(*jnp.split(x, 2, axis=-1))  # [B, T, N, H/2]
    rotated = pairs * jax.lax.complex(cos, sin)
    return jnp.concatenate([rotated.real, rotated.imag], axis=-1)  # [B, T, N, H]


@register("rotate")
def halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate channel pairs with real arithmetic on the two halves of each head."""
    first, second = jnp.split(x, 2, axis=-1)  # [B, T, N, H/2] each
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
