"""The three small parts every block is made of: linear maps, norms and the token table.

A `Linear` holds its weight as [out, in], the order of Hugging Face and GGUF files, in float32,
bfloat16 or int8. The dtype of the weight is the format of the product; activations between parts
are always float32, and every product accumulates in float32 (int32 for int8).

`quantize` makes int8 weights with one scale per output row; the activations are quantised on the
way in, one scale per token, so the product itself is exact integer arithmetic (the "W8A8" of
LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339, without its outlier path).
"""

from __future__ import annotations

import math
import os

import jax
import jax.numpy as jnp
from flax import struct

# A power of two, so that it divides the width of nearly every weight.
_CORES = 2 ** int(math.log2(min(os.cpu_count() or 1, 8)))


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
    num_rows = rows.shape[0]
    if num_rows == 1 and p.weight.dtype != jnp.float32:
        # XLA's CPU backend has no one-row kernel for narrow types: it would widen the whole weight
        # on every call. Two rows reach the fast kernel, 12 to 20 times quicker.
        rows = jnp.concatenate([rows, jnp.zeros_like(rows)])
    contract_last = (((1,), (1,)), ((), ()))
    if p.scale is not None:
        row_scale = jnp.maximum(jnp.max(jnp.abs(rows), axis=-1, keepdims=True), 1e-30) / 127.0
        narrow = jnp.round(rows / row_scale).astype(jnp.int8)  # [R, in]
        y = jax.lax.dot_general(narrow, p.weight, contract_last, preferred_element_type=jnp.int32)
        y = y.astype(jnp.float32) * row_scale * p.scale  # [R, out]
    else:
        y = _product(rows.astype(p.weight.dtype), p.weight)  # [R, out]
    if p.bias is not None:
        y = y + p.bias
    if p.lora is not None:
        inner = _product(rows.astype(p.lora.a.dtype), p.lora.a)  # [R, r]
        y = y + _product(inner.astype(p.lora.b.dtype), p.lora.b) * p.lora.scale
    return y[:num_rows].reshape(*x.shape[:-1], -1)


def _product(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """`rows @ weight.T` with float32 sums: [R, in], [out, in] -> float32 [R, out]."""
    # XLA's CPU backend reads the weight of a one-row float32 product on one core. The same product
    # as a batch of slices of the weight reads a slice a core: measured 1.3 times as fast.
    num_slices = 1
    if len(rows) == 1 and jax.default_backend() == "cpu":
        num_slices = math.gcd(weight.shape[0], _CORES)
    slices = weight.reshape(num_slices, -1, weight.shape[1])  # [P, out/P, in]
    copies = jnp.broadcast_to(rows, (num_slices, *rows.shape))  # [P, R, in]
    y = jnp.einsum("pri,poi->rpo", copies, slices, preferred_element_type=jnp.float32)
    return y.reshape(rows.shape[0], -1)


def quantize(p: Linear) -> Linear:
    """The int8 form of `p`: each output row is scaled so that its largest weight becomes 127."""
    scale = jnp.maximum(jnp.max(jnp.abs(p.weight), axis=1), 1e-30) / 127.0  # [out]
    weight = jnp.round(p.weight / scale[:, None]).astype(jnp.int8)
    return p.replace(weight=weight, scale=scale)


def embed(table: Linear, ids: jax.Array) -> jax.Array:
    """Looks up rows of the token table: int [...] -> float32 [..., D]."""
    rows = table.weight[ids].astype(jnp.float32)
    return rows if table.scale is None else rows * table.scale[ids][..., None]


def row_sum(x: jax.Array) -> jax.Array:
    """Sums the last axis, keeping it with length 1, in an order that ignores the other axes.

    A matrix product gives a row the same bits however many rows stand beside it. `jnp.sum` splits
    the work by the shape of the whole array and does not; nor does a product with a single column,
    for which XLA's CPU backend takes another path from eight rows on.
    """
    ones = jnp.ones((x.shape[-1], 8), x.dtype)
    return jax.lax.dot_general(x, ones, (((x.ndim - 1,), (0,)), ((), ())))[..., :1]


def norm(x: jax.Array, p: Norm, eps: float) -> jax.Array:
    """RMS norm (Zhang & Sennrich 2019), or layer norm where `p` has a bias; float32 [..., D]."""
    width = x.shape[-1]
    if p.bias is not None:
        x = x - row_sum(x) / width
    x = x * jax.lax.rsqrt(row_sum(x * x) / width + eps)
    return x * p.scale if p.bias is None else x * p.scale + p.bias
