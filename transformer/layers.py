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
from flax import struct

from transformer import kernels


@struct.dataclass
class Lora:
    """What a low-rank adapter adds to a linear map: `x @ a.T @ b.T * scale`; see `lora.py`."""

    a: jax.Array  # [r, in] float32 or bfloat16
    b: jax.Array  # [out, r]
    scale: float = struct.field(pytree_node=False)


@struct.dataclass
class Linear:
    """`y = x @ weight.T * scale + bias`. Also the token table: one row a token."""

    weight: jax.Array  # [out, in] float32, bfloat16 or int8
    bias: jax.Array | None = None  # [out] float32
    scale: jax.Array | None = None  # [out] float32, present exactly when weight is int8
    lora: Lora | None = None


@struct.dataclass
class Norm:
    """Scale of an RMS norm; with `bias`, of a layer norm."""

    scale: jax.Array  # [D] float32
    bias: jax.Array | None = None  # [D] float32


def linear(x: jax.Array, p: Linear) -> jax.Array:
    """Applies `p` to the last axis: float32 [..., in] -> float32 [..., out]."""
    rows = x.reshape(-1, x.shape[-1])  # [R, in]
    y = kernels.matmul(rows, p.weight, p.scale)  # [R, out]
    if p.bias is not None:
        y = y + p.bias
    if p.lora is not None:
        inner = kernels.matmul(rows, p.lora.a)  # [R, r]
        y = y + kernels.matmul(inner, p.lora.b) * p.lora.scale
    return y.reshape(*x.shape[:-1], -1)


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
