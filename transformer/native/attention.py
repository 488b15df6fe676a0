"""Attention of one new token over the blocks of its KV cache, one block at a time.

Query heads that share a key-value head are computed together, so that a key is converted to float32
once for all of them. Each block gives a partial result: the largest score, the sum of exponentials
and the weighted sum of values. `combine` joins the partial results of all blocks of a row in their
order ("Flash-Decoding", Dao et al. 2023), so that threads can take blocks in any order without
changing a bit.

`transformer/cache.py` defines the layout: keys [P, K, H, 256], values [P, K, 256, H].
"""

# Numba's intrinsics and the values of llvmlite have no types.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportReturnType=false, reportAssignmentType=false, reportPrivateImportUsage=false

from __future__ import annotations

import numba as nb
import numpy as np

from transformer import cache
from transformer.native import ffi, simd
from transformer.native.ffi import FAST, JIT

BLOCK_SIZE = cache.BLOCK_SIZE
_f32, _i32 = np.float32, np.int32
_SAFE = {"nnan", "ninf", "nsz", "contract"}  # sums in any order would undo the rounding
_ROUND = _f32(12582912.0)  # 1.5 * 2**23; adding it rounds a small float32 to an integer


@nb.njit(forceinline=True)
def exp(x):
    """Return e**x for x from -87 to 87, with an error of about 2e-7 (Cephes' expf)."""
    k = x * _f32(1.44269504) + _ROUND
    n = k - _ROUND  # x = n * log(2) + r
    r = x - n * _f32(0.693359375) - n * _f32(-2.12194440e-4)
    p = _f32(1.9875691500e-4)
    p = p * r + _f32(1.3981999507e-3)
    p = p * r + _f32(8.3334519073e-3)
    p = p * r + _f32(4.1665795894e-2)
    p = p * r + _f32(1.6666665459e-1)
    p = p * r + _f32(5.0000001201e-1)
    p = p * r * r + r + _f32(1)
    exponent = _i32((simd.float_bits(k) - _i32(0x4B400000) + _i32(127)) << _i32(23))
    return p * simd.float_from_bits(exponent)


@nb.njit(fastmath=_SAFE, **JIT)
def _exponentials(scores, largest):
    """Replace scores by exp(score - largest)."""
    for i in range(len(scores)):
        scores[i] = exp(max(scores[i] - largest, _f32(-87)))


@nb.njit(fastmath=FAST, **JIT)
def _sum(x):
    total = _f32(0)
    for i in range(len(x)):
        total += x[i]
    return total


@nb.njit(fastmath=FAST, **JIT)
def _largest(x):
    largest = _f32(-1e30)
    for i in range(len(x)):
        largest = max(largest, x[i])
    return largest


@nb.njit(forceinline=True)
def to_bfloat16(x):
    """Return the bits of a float32 rounded to bfloat16, uint16."""
    bits = simd.float_bits(x)
    return np.uint16((bits + _i32(0x7FFF) + ((bits >> _i32(16)) & _i32(1))) >> _i32(16))


@nb.njit(fastmath=_SAFE, **JIT)
def rotate(x, cos, sin, factor, out):
    """Rotate the channel pairs (i, i + R/2) of one head, as `kernels.rotate`, times a factor."""
    half = len(cos)
    for i in range(half):
        a, b = x[i], x[half + i]
        out[i] = (a * cos[i] - b * sin[i]) * factor
        out[half + i] = (b * cos[i] + a * sin[i]) * factor
    for i in range(2 * half, len(x)):
        out[i] = x[i] * factor


@nb.njit(**JIT)
def _widen_rows(source, num_rows, row_size, first, stop, is_bfloat16, out):
    """Copy columns `first` to `stop` of rows to `out` as float32, eight columns at a time.

    Args:
        source: Address of the first row.
        num_rows: Number of rows.
        row_size: Number of columns of a row, also in `out`.
        first: First column, a multiple of 8.
        stop: Column after the last, a multiple of 8.
        is_bfloat16: Whether the source is bfloat16 instead of float32.
        out: Address of the copy.
    """
    for row in range(num_rows):
        at = row * row_size
        if is_bfloat16:
            for i in range(first, stop, 8):
                simd.store_f32(out + 4 * (at + i), simd.load_bf16(source + 2 * (at + i)))
        else:
            for i in range(first, stop, 8):
                simd.store_f32(out + 4 * (at + i), simd.load_f32(source + 4 * (at + i)))


@nb.njit(**JIT)
def _add_eight_rows(factors, rows, row_size, first, stop, out):
    """Add factor[j] * row[j] of eight float32 rows to `out`, for columns `first` to `stop`."""
    f0, f1 = simd.repeat(factors[0]), simd.repeat(factors[1])
    f2, f3 = simd.repeat(factors[2]), simd.repeat(factors[3])
    f4, f5 = simd.repeat(factors[4]), simd.repeat(factors[5])
    f6, f7 = simd.repeat(factors[6]), simd.repeat(factors[7])
    size = 4 * row_size
    for i in range(first, stop, 8):
        p = rows + 4 * i
        y = simd.load_f32(out + 4 * i)
        z = simd.mul(f1, simd.load_f32(p + size))
        y = simd.fma(f0, simd.load_f32(p), y)
        z = simd.fma(f3, simd.load_f32(p + 3 * size), z)
        y = simd.fma(f2, simd.load_f32(p + 2 * size), y)
        z = simd.fma(f5, simd.load_f32(p + 5 * size), z)
        y = simd.fma(f4, simd.load_f32(p + 4 * size), y)
        z = simd.fma(f7, simd.load_f32(p + 7 * size), z)
        y = simd.fma(f6, simd.load_f32(p + 6 * size), y)
        simd.store_f32(out + 4 * i, simd.add(y, z))


@nb.njit(**JIT)
def scratch_size(group, head_dim):
    """Return the number of float32 that `attend_block` needs as scratch."""
    return group * BLOCK_SIZE + 8 * max(BLOCK_SIZE, head_dim)


@nb.njit(**JIT)
def partial_size(head_dim):
    """Return the number of float32 of a partial result of one head: largest, sum, weighted sum."""
    return head_dim + 8  # a multiple of 8 numbers, so that the weighted sum is aligned


@nb.njit(**JIT)
def attend_block(queries, group, head_dim, keys, values, is_bfloat16, first, stop, scratch, out):
    """Attend to the positions `first` to `stop` of one block, for the heads of a group.

    Args:
        queries: Rotated queries, divided by the square root of H, float32 [G * H].
        group: Number of heads G.
        head_dim: H, a multiple of 8.
        keys: Address of the block's keys [H, 256].
        values: Address of the block's values [256, H].
        is_bfloat16: Whether keys and values are bfloat16 instead of float32.
        first: First visible position in the block.
        stop: Position after the last visible one.
        scratch: Address of `scratch_size` float32.
        out: Address of the partial results of the group, each of `partial_size` float32.
    """
    itemsize = 2 if is_bfloat16 else 4
    rows = scratch + 4 * group * BLOCK_SIZE
    scores = ffi.view_f32(scratch, group * BLOCK_SIZE)
    low, high = first // 8 * 8, (stop + 7) // 8 * 8
    scores[:] = _f32(0)
    for h in range(0, head_dim, 8):
        at = keys + itemsize * h * BLOCK_SIZE
        _widen_rows(at, 8, BLOCK_SIZE, low, high, is_bfloat16, rows)
        for g in range(group):
            start = g * head_dim + h
            factors = queries[start : start + 8]
            _add_eight_rows(factors, rows, BLOCK_SIZE, low, high, scratch + 4 * g * BLOCK_SIZE)
    size = partial_size(head_dim)
    for g in range(group):
        visible = scores[g * BLOCK_SIZE + first : g * BLOCK_SIZE + stop]
        partial = ffi.view_f32(out + 4 * g * size, size)
        largest = _largest(visible)
        _exponentials(visible, largest)
        partial[0], partial[1] = largest, _sum(visible)
        partial[8:] = _f32(0)
    position = first
    while position + 8 <= stop:
        _widen_rows(
            values + itemsize * position * head_dim, 8, head_dim, 0, head_dim, is_bfloat16, rows
        )
        for g in range(group):
            start = g * BLOCK_SIZE + position
            factors = scores[start : start + 8]
            _add_eight_rows(factors, rows, head_dim, 0, head_dim, out + 4 * (g * size + 8))
        position += 8
    while position < stop:
        _widen_rows(
            values + itemsize * position * head_dim, 1, head_dim, 0, head_dim, is_bfloat16, rows
        )
        for g in range(group):
            factor = simd.repeat(scores[g * BLOCK_SIZE + position])
            for i in range(0, head_dim, 8):
                at = out + 4 * (g * size + 8 + i)
                value = simd.load_f32(rows + 4 * i)
                simd.store_f32(at, simd.fma(factor, value, simd.load_f32(at)))
        position += 1


@nb.njit(**JIT)
def combine(partials, num_blocks, stride, head_dim, factor, out):
    """Join the partial results of one head.

    Args:
        partials: Address of the first partial result.
        num_blocks: Number of partial results.
        stride: Number of float32 from one to the next.
        head_dim: H.
        factor: The result is multiplied by this.
        out: The attention output of the head, float32 [H].
    """
    largest = _f32(-1e30)
    for i in range(num_blocks):
        largest = max(largest, ffi.view_f32(partials + 4 * i * stride, 1)[0])
    total = _f32(0)
    out[:] = _f32(0)
    for i in range(num_blocks):
        partial = ffi.view_f32(partials + 4 * i * stride, 8 + head_dim)
        weight = exp(max(partial[0] - largest, _f32(-87)))
        total += weight * partial[1]
        for h in range(head_dim):
            out[h] += weight * partial[8 + h]
    for h in range(head_dim):
        out[h] = out[h] / total * factor
