"""Rotary positions (Su et al. 2021, arXiv:2104.09864): `kernels.rotate`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from transformer.kernels.registry import register


@register("rotate")
def reference(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The definition: a pair of channels is a complex number, and turning it is a product."""
    pairs = jax.lax.complex(*jnp.split(x, 2, axis=-1))  # [B, T, N, H/2]
    turned = pairs * jax.lax.complex(cos, sin)
    return jnp.concatenate([turned.real, turned.imag], axis=-1)  # [B, T, N, H]


@register("rotate")
def halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The same in real numbers, half a head at a time."""
    first, second = jnp.split(x, 2, axis=-1)  # [B, T, N, H/2] each
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
