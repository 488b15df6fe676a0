"""The three small parts every block is made of: linear maps, norms and the token table.

A `Linear` holds its weight as [out, in], the order of Hugging Face and GGUF files, in float32,
bfloat16 or int8. The dtype of the weight is the format of the product; activations between parts
are always float32, and every product accumulates in float32 (int32 for int8). How products and
norms are computed, and how fast, is in `kernels`.

`quantize` makes int8 weights with one scale per output row; the activations are quantised on the
way in, one scale per token, so the product itself is exact integer arithmetic (the "W8A8" of
LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339, without its outlier path).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from transformer import kernels
from transformer.kernels import linear
from transformer.weights import Linear, Norm

__all__ = ["embed", "linear", "norm", "quantize"]


def quantize(p: Linear) -> Linear:
    """The int8 form of `p`: each output row is scaled so that its largest weight becomes 127."""
    scale = jnp.maximum(jnp.max(jnp.abs(p.weight), axis=1), 1e-30) / 127.0  # [out]
    weight = jnp.round(p.weight / scale[:, None]).astype(jnp.int8)
    return p.replace(weight=weight, scale=scale)


def embed(table: Linear, ids: jax.Array) -> jax.Array:
    """Looks up rows of the token table: int [...] -> float32 [..., D]."""
    rows = table.weight[ids].astype(jnp.float32)
    return rows if table.scale is None else rows * table.scale[ids][..., None]


def norm(x: jax.Array, p: Norm, eps: float) -> jax.Array:
    """RMS norm (Zhang & Sennrich 2019), or layer norm where `p` has a bias; float32 [..., D]."""
    return kernels.norm(x, p.scale, p.bias, eps)
