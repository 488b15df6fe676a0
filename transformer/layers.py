"""The layers that every block consists of: linear maps, norms and the token embedding.

A `Linear` stores its weight as [out, in], the order of Hugging Face and GGUF files, in float32,
bfloat16 or int8. The matrix product is computed in the dtype of the weight. Activations between
layers are always float32, and products accumulate in float32 (int32 for int8). The implementations
of products and norms are in `kernels`.

`quantize` converts weights to int8 with one scale per output row. The activations are quantized
before the product with one scale per token, so the product is exact integer arithmetic (the "W8A8"
of LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339, without its separate float path for
outliers).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from transformer import kernels, quant
from transformer.kernels import linear
from transformer.weights import BlockWeight, Linear, Norm

__all__ = ["embed", "linear", "norm", "quantize"]


def quantize(p: Linear) -> Linear:
    """Return `p` in int8, with each output row scaled so that its largest magnitude is 127."""
    scale = jnp.maximum(jnp.max(jnp.abs(p.weight), axis=-1), 1e-30) / 127.0  # [..., out]
    weight = jnp.round(p.weight / scale[..., None]).astype(jnp.int8)
    return p.replace(weight=weight, scale=scale)


def embed(table: Linear, ids: jax.Array) -> jax.Array:
    """Look up rows of the token embedding: int [...] -> float32 [..., D]."""
    if isinstance(table.weight, BlockWeight):
        return quant.take_rows(table.weight, ids)
    rows = table.weight[ids].astype(jnp.float32)
    return rows if table.scale is None else rows * table.scale[ids][..., None]


def norm(x: jax.Array, p: Norm, eps: float) -> jax.Array:
    """Apply RMS norm, or layer norm if `p` has a bias, to the last axis of float32 [..., D]."""
    return kernels.norm(x, p.scale, p.bias, eps)
