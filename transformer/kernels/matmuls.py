"""Products of rows with a weight: `kernels.matmul`.

A decoding step with one row reads every weight once and computes little, so what counts is how
well a form reads; a prompt brings many rows, and what counts is arithmetic. The forms differ in
what they make of the few cases in which XLA's CPU backend does neither well.

`integers` is the "W8A8" of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) without its outlier
path: it rounds the rows too, one scale a row, so its error against the reference is that rounding.
"""

from __future__ import annotations

import math
import os

import jax
import jax.numpy as jnp

from transformer.kernels.registry import Unavailable, register

# A power of two, so that it divides the width of nearly every weight.
_CORES = 2 ** int(math.log2(min(os.cpu_count() or 1, 8)))
_CONTRACT_LAST = (((1,), (1,)), ((), ()))


@register("matmul")
def reference(rows: jax.Array, weight: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """The definition: the weight widened to the precision of the rows, then one exact product."""
    wide = weight.astype(rows.dtype)
    if scale is not None:
        wide = wide * scale[:, None]
    return jnp.matmul(rows, wide.T, precision=jax.lax.Precision.HIGHEST)


@register("matmul")
def dot(rows: jax.Array, weight: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """One product in the dtype of the weight, forwards and backwards."""
    _reject_int8("dot", weight)
    return _dot(rows, weight)


@jax.custom_vjp
def _dot(rows: jax.Array, weight: jax.Array) -> jax.Array:
    rows = rows.astype(weight.dtype)
    return jax.lax.dot_general(rows, weight, _CONTRACT_LAST, preferred_element_type=jnp.float32)


def _dot_forward(rows: jax.Array, weight: jax.Array):
    narrow = rows.astype(weight.dtype)  # what is remembered is as narrow
    return _dot(narrow, weight), (narrow, weight, jnp.zeros((), rows.dtype))


def _dot_backward(kept, slope: jax.Array):
    rows, weight, like = kept
    # Left to itself, JAX would multiply the float32 slope with the widened weight: on a CPU with
    # bfloat16 instructions 4 times as slow.
    change = jnp.matmul(slope.astype(weight.dtype), weight, preferred_element_type=jnp.float32)
    # XLA's CPU backend has no bfloat16 kernel that sums over the first axis of both; nothing would
    # be won by narrowing the slope here.
    grown = jnp.einsum("ro,ri->oi", slope, rows.astype(slope.dtype))
    return change.astype(like.dtype), grown.astype(weight.dtype)


_dot.defvjp(_dot_forward, _dot_backward)


@register("matmul")
def batched(rows: jax.Array, weight: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """The same as a batch of one, whose result XLA's CPU backend lays out the other way round.

    For few rows up to 2.4 times as fast as `dot`; from a hundred on slower, by 1.3 times in float32
    and 1.5 in bfloat16 where a whole prompt of 256 tokens was read.
    """
    _reject_int8("batched", weight)
    return _split_matmul(rows, weight, 1)


@register("matmul")
def split_weight(rows: jax.Array, weight: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """A batch of products, each with a slice of the weight's rows.

    XLA's CPU backend reads the weight of a one-row float32 product on one core. The same product as
    a batch reads a slice a core: measured 1.3 times as fast.
    """
    _reject_int8("slices", weight)
    return _split_matmul(rows, weight, math.gcd(weight.shape[0], _CORES))


def _split_matmul(rows: jax.Array, weight: jax.Array, num_slices: int) -> jax.Array:
    cut = weight.reshape(num_slices, -1, weight.shape[1])  # [P, out/P, in]
    copies = jnp.broadcast_to(rows.astype(weight.dtype), (num_slices, *rows.shape))  # [P, R, in]
    y = jnp.einsum("pri,poi->rpo", copies, cut, preferred_element_type=jnp.float32)
    return y.reshape(rows.shape[0], -1)


@register("matmul")
def pad_to_two_rows(
    rows: jax.Array, weight: jax.Array, scale: jax.Array | None = None
) -> jax.Array:
    """One row beside a row of zeros.

    XLA's CPU backend has no one-row kernel for narrow types: it would widen the whole weight on
    every call. Two rows reach the fast kernel, 12 to 20 times quicker.
    """
    if len(rows) != 1:
        raise Unavailable(f"matmul pair is for one row, not {len(rows)}")
    _reject_int8("pair", weight)
    return batched(_pad_to_two(rows), weight)[:1]


@register("matmul")
def int8(rows: jax.Array, weight: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """int8 rows, rounded with one scale each, by int8 weights: exact integer arithmetic between."""
    if weight.dtype != jnp.int8 or scale is None:
        raise Unavailable(f"matmul integers needs int8 weights and scales, not {weight.dtype}")
    num_rows = len(rows)
    if num_rows == 1:
        rows = _pad_to_two(rows)
    row_scale = jnp.maximum(jnp.max(jnp.abs(rows), axis=-1, keepdims=True), 1e-30) / 127.0
    narrow = jnp.round(rows / row_scale).astype(jnp.int8)  # [R, in]
    y = jax.lax.dot_general(narrow, weight, _CONTRACT_LAST, preferred_element_type=jnp.int32)
    return (y.astype(jnp.float32) * row_scale * scale)[:num_rows]  # [R, out]


def _pad_to_two(row: jax.Array) -> jax.Array:
    return jnp.concatenate([row, jnp.zeros_like(row)])


def _reject_int8(form: str, weight: jax.Array) -> None:
    if weight.dtype == jnp.int8:
        raise Unavailable(f"matmul {form} is for float weights, not int8")
