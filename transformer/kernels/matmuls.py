"""Products of rows with a weight: `kernels.matmul`.

A decoding step with one row is limited by memory bandwidth, because it reads every weight once. A
prefill step has many rows and is limited by arithmetic. The implementations work around the cases
in which XLA's CPU backend reaches neither limit.

`int8` is the "W8A8" of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) without its outlier
path. It also quantizes the rows, with one scale per row; this rounding is its error against the
reference.
"""

from __future__ import annotations

import math
import os

import jax
import jax.numpy as jnp

from transformer import quant
from transformer.kernels import registry
from transformer.kernels.registry import Unavailable, register
from transformer.weights import BlockWeight

# A power of two, so that it divides the width of nearly every weight.
_CORES = 2 ** int(math.log2(min(os.cpu_count() or 1, 8)))
_CONTRACT_LAST = (((1,), (1,)), ((), ()))


@register("matmul")
def reference(rows: jax.Array, weight: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """Convert the weight to the dtype of the rows and multiply with the highest precision."""
    if isinstance(weight, BlockWeight):
        weight = quant.dequantize(weight)
    widened = weight.astype(rows.dtype)
    if scale is not None:
        widened = widened * scale[:, None]
    return jnp.matmul(rows, widened.T, precision=jax.lax.Precision.HIGHEST)


@register("matmul")
def dot(rows: jax.Array, weight: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """Multiply in the dtype of the weight, in the forward and the backward pass."""
    _reject_int8("dot", weight)
    return _dot(rows, weight)


@jax.custom_vjp
def _dot(rows: jax.Array, weight: jax.Array) -> jax.Array:
    rows = rows.astype(weight.dtype)
    return jax.lax.dot_general(rows, weight, _CONTRACT_LAST, preferred_element_type=jnp.float32)


def _dot_forward(rows: jax.Array, weight: jax.Array):
    narrow = rows.astype(weight.dtype)  # the residuals take no more memory than the product needs
    return _dot(narrow, weight), (narrow, weight, jnp.zeros((), rows.dtype))


def _dot_backward(residuals, gradient: jax.Array):
    rows, weight, like = residuals
    # By default JAX multiplies the float32 gradient with the widened weight, which is 4 times
    # slower on a CPU with bfloat16 instructions.
    rows_gradient = jnp.matmul(
        gradient.astype(weight.dtype), weight, preferred_element_type=jnp.float32
    )
    # XLA's CPU backend has no bfloat16 kernel that sums over the first axis of both operands, so
    # converting the gradient to bfloat16 would not help here.
    weight_gradient = jnp.einsum("ro,ri->oi", gradient, rows.astype(gradient.dtype))
    return rows_gradient.astype(like.dtype), weight_gradient.astype(weight.dtype)


_dot.defvjp(_dot_forward, _dot_backward)


@register("matmul")
def batched(rows: jax.Array, weight: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """Multiply as a batch of one, which makes XLA's CPU backend transpose the output layout.

    With few rows it is up to 2.4 times as fast as `dot`. From a hundred rows on it is slower: a
    prefill step of 256 tokens took 1.3 times as long in float32 and 1.5 times in bfloat16.
    """
    _reject_int8("batched", weight)
    return _split_matmul(rows, weight, 1)


@register("matmul")
def split_weight(rows: jax.Array, weight: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """Multiply as a batch of products, each with a slice of the weight's rows.

    XLA's CPU backend reads the weight of a one-row float32 product on one core. In a batch, each
    core reads one slice (measured 1.3 times as fast).
    """
    _reject_int8("split_weight", weight)
    return _split_matmul(rows, weight, math.gcd(weight.shape[0], _CORES))


def _split_matmul(rows: jax.Array, weight: jax.Array, num_slices: int) -> jax.Array:
    slices = weight.reshape(num_slices, -1, weight.shape[1])  # [P, out/P, in]
    copies = jnp.broadcast_to(rows.astype(weight.dtype), (num_slices, *rows.shape))  # [P, R, in]
    y = jnp.einsum("pri,poi->rpo", copies, slices, preferred_element_type=jnp.float32)
    return y.reshape(rows.shape[0], -1)


@register("matmul")
def pad_to_two_rows(
    rows: jax.Array, weight: jax.Array, scale: jax.Array | None = None
) -> jax.Array:
    """Multiply one row, padded with a row of zeros.

    XLA's CPU backend has no one-row kernel for narrow dtypes: it widens the whole weight on every
    call. Two rows use the fast kernel, which is 12 to 20 times as fast.
    """
    if len(rows) != 1:
        raise Unavailable(
            f"the implementation matmul pad_to_two_rows takes one row, got {len(rows)}"
        )
    _reject_int8("pad_to_two_rows", weight)
    return batched(_pad_to_two(rows), weight)[:1]


@register("matmul")
def int8(rows: jax.Array, weight: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """Quantize the rows to int8 with one scale per row, then multiply in exact integer math."""
    if scale is None or isinstance(weight, BlockWeight) or weight.dtype != jnp.int8:
        raise Unavailable(
            f"the implementation matmul int8 takes int8 weights with scales, got {_dtype(weight)}"
        )
    num_rows = len(rows)
    if num_rows == 1:
        rows = _pad_to_two(rows)
    row_scale = jnp.maximum(jnp.max(jnp.abs(rows), axis=-1, keepdims=True), 1e-30) / 127.0
    narrow = jnp.round(rows / row_scale).astype(jnp.int8)  # [R, in]
    y = jax.lax.dot_general(narrow, weight, _CONTRACT_LAST, preferred_element_type=jnp.int32)
    return (y.astype(jnp.float32) * row_scale * scale)[:num_rows]  # [R, out]


@register("matmul")
def dequantized(rows: jax.Array, weight: BlockWeight, scale: jax.Array | None = None) -> jax.Array:
    """Convert a weight in blocks to float32 on each call, then multiply."""
    _require_blocks("dequantized", weight)
    return batched(rows, quant.dequantize(weight))


@register("matmul")
def native(rows: jax.Array, weight: BlockWeight, scale: jax.Array | None = None) -> jax.Array:
    """Multiply with a weight in blocks by a Numba kernel; see `native/products.py`."""
    _require_blocks("native", weight)
    return registry.native_module("products").matmul(rows, weight)


def _require_blocks(impl: str, weight: jax.Array | BlockWeight) -> None:
    if not isinstance(weight, BlockWeight):
        raise Unavailable(
            f"the implementation matmul {impl} takes weights in blocks, got {weight.dtype}"
        )


def _pad_to_two(row: jax.Array) -> jax.Array:
    return jnp.concatenate([row, jnp.zeros_like(row)])


def _reject_int8(impl: str, weight: jax.Array) -> None:
    if isinstance(weight, BlockWeight) or weight.dtype == jnp.int8:
        raise Unavailable(
            f"the implementation matmul {impl} takes float weights, got {_dtype(weight)}"
        )


def _dtype(weight: jax.Array | BlockWeight) -> str:
    return "blocks" if isinstance(weight, BlockWeight) else str(weight.dtype)
