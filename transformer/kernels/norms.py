"""RMS norm and layer norm: `kernels.norm`.

RMS norm is Zhang & Sennrich 2019, arXiv:1910.07467; layer norm is Ba et al. 2016, arXiv:1607.06450.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from transformer.kernels.registry import register


@register("norm")
def reference(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """Compute the norm by the definition, with means."""
    if bias is not None:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * scale if bias is None else x * scale + bias


@register("norm")
def sum_by_matmul(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """Compute the norm with sums that are bitwise equal in every batch size; see `row_sum`."""
    width = x.shape[-1]
    if bias is not None:
        x = x - row_sum(x) / width
    x = x * jax.lax.rsqrt(row_sum(x * x) / width + eps)
    return x * scale if bias is None else x * scale + bias


def row_sum(x: jax.Array) -> jax.Array:
    """Sum over the last axis: [..., D] -> [..., 1], in an order that ignores the other axes.

    A matrix product is batch-invariant: the result of a row is bitwise identical for every number
    of rows. `jnp.sum` is not, because it splits the work by the shape of the whole array. Neither
    is a product with a single column: XLA's CPU backend uses another kernel from eight rows on.
    """
    ones = jnp.ones((x.shape[-1], 8), x.dtype)
    return jax.lax.dot_general(x, ones, (((x.ndim - 1,), (0,)), ((), ())))[..., :1]
