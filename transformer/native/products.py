"""Products of rows with a weight in blocks of 4 or 8 bits: `kernels.matmul`.

The rows are quantized first: 32 neighbouring numbers share a scale and become integers from -127 to
127. With weight = d * q + m and row = s * r, a block adds to the product

    d * s * sum(q * r) + m * s * sum(r),

an integer sum and two multiplications for 32 inputs. llama.cpp computes products in the same way.

One weight is read once for all rows: each step of the inner loop unpacks a block of eight outputs
and multiplies it with up to four rows. Every row has the same operations in the same order for any
number of rows and threads, so that its result does not depend on them.
"""

# Numba's intrinsics and the values of llvmlite have no types.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportReturnType=false, reportAssignmentType=false, reportPrivateImportUsage=false

from __future__ import annotations

import jax
import jax.numpy as jnp
import numba as nb
import numpy as np
from numba import types

from transformer import quant
from transformer.native import ffi, simd
from transformer.native.ffi import FAST, JIT
from transformer.weights import BlockWeight

_BLOCK, _GROUP = quant.BLOCK, quant.GROUP
BYTES_4BIT, BYTES_8BIT = quant.GROUP_BYTES[4], quant.GROUP_BYTES[8]
# Distance in bytes that memory is prefetched ahead of its use, a few blocks.
_AHEAD = 2560
_CHUNK_BYTES = 16384  # of the weight: about 0.6 microseconds of memory traffic
_ROWS_PER_CHUNK = 16  # of the quantization of rows
_f32, _i32 = np.float32, np.int32
# Adding and subtracting 1.5 * 2**23 rounds a small float32 to an integer.
_ROUND = _f32(12582912.0)


@nb.njit(fastmath={"nnan", "ninf", "nsz"}, **JIT)
def quantize_row(x, integers, scales, sums):
    """Quantize a row.

    Args:
        x: The row, float32 [in].
        integers: Output: integers from -127 to 127, int8 [in].
        scales: Output: the scale of each block, float32 [in/32].
        sums: Output: scale * (sum of the integers) of each block, float32 [in/32].
    """
    for k in range(len(x) // _BLOCK):
        block, out = x[_BLOCK * k : _BLOCK * (k + 1)], integers[_BLOCK * k : _BLOCK * (k + 1)]
        largest = _f32(0)
        for i in range(_BLOCK):
            largest = max(largest, abs(block[i]))
        scale = max(largest, _f32(1e-30)) / _f32(127)
        inverse = _f32(1) / scale
        total = _i32(0)
        for i in range(_BLOCK):
            integer = _i32((block[i] * inverse + _ROUND) - _ROUND)
            out[i] = np.int8(integer)
            total = _i32(total + integer)
        scales[k] = scale
        sums[k] = scale * _f32(total)


@nb.njit(**JIT)
def multiply_4bit(weight, num_blocks, first, stop, rows, scales, sums, num_rows, out, stride, adds):
    """Compute out[b, r] = rows[b] . weight[r], or add it, for the groups from `first` to `stop`.

    Args:
        weight: Address of the groups of 4-bit blocks.
        num_blocks: Number of blocks of a row.
        first: Index of the first group of eight outputs.
        stop: Index after the last group.
        rows: Address of the quantized rows, int8.
        scales: Address of their scales, float32.
        sums: Address of their sums, float32.
        num_rows: Number of rows.
        out: Address of the results, float32; row b begins at number b * stride.
        stride: Number of results between rows.
        adds: Whether to add to the results.
    """
    for group in range(first, stop):
        p, at = weight + group * num_blocks * BYTES_4BIT, out + 4 * group * _GROUP
        b = 0
        while b + 3 < num_rows:
            o = 4 * b * num_blocks
            x = rows + b * num_blocks * _BLOCK
            _four_rows_4bit(
                p, num_blocks, x, scales + o, sums + o, at + 4 * b * stride, stride, adds
            )
            b += 4
        while b < num_rows:
            o = 4 * b * num_blocks
            x = rows + b * num_blocks * _BLOCK
            _one_row_4bit(p, num_blocks, x, scales + o, sums + o, at + 4 * b * stride, adds)
            b += 1


@nb.njit(**JIT)
def _one_row_4bit(p, num_blocks, x, scales, sums, out, adds):
    """Multiply one row with one group of eight outputs."""
    y = simd.zeros()
    for _ in range(num_blocks):
        simd.prefetch(p + _AHEAD)
        simd.prefetch(p + _AHEAD + 64)
        simd.prefetch(p + _AHEAD + 128)
        q0, q1 = simd.load_bytes(p + 32), simd.load_bytes(p + 64)
        q2, q3 = simd.load_bytes(p + 96), simd.load_bytes(p + 128)
        dots = simd.dot_unsigned4(
            simd.low_bits(q0), simd.low_bits(q1), simd.low_bits(q2), simd.low_bits(q3),
            simd.high_bits(q0), simd.high_bits(q1), simd.high_bits(q2), simd.high_bits(q3), x,
        )  # fmt: skip
        y = _add_block(y, simd.load_f16(p), simd.load_f16(p + 16), dots, scales, sums)
        p += BYTES_4BIT
        x += _BLOCK
        scales += 4
        sums += 4
    _store(out, y, adds)


@nb.njit(**JIT)
def _four_rows_4bit(p, num_blocks, x, scales, sums, out, stride, adds):
    """Multiply four rows with one group: a block is unpacked once for all of them."""
    y0, y1, y2, y3 = simd.zeros(), simd.zeros(), simd.zeros(), simd.zeros()
    width, step = num_blocks * _BLOCK, 4 * num_blocks
    for _ in range(num_blocks):
        simd.prefetch(p + _AHEAD)
        simd.prefetch(p + _AHEAD + 64)
        simd.prefetch(p + _AHEAD + 128)
        scale, minimum = simd.load_f16(p), simd.load_f16(p + 16)
        q0, q1 = simd.load_bytes(p + 32), simd.load_bytes(p + 64)
        q2, q3 = simd.load_bytes(p + 96), simd.load_bytes(p + 128)
        w0, w1, w2, w3 = simd.low_bits(q0), simd.low_bits(q1), simd.low_bits(q2), simd.low_bits(q3)
        w4, w5 = simd.high_bits(q0), simd.high_bits(q1)
        w6, w7 = simd.high_bits(q2), simd.high_bits(q3)
        dots = simd.dot_unsigned4(w0, w1, w2, w3, w4, w5, w6, w7, x)
        y0 = _add_block(y0, scale, minimum, dots, scales, sums)
        dots = simd.dot_unsigned4(w0, w1, w2, w3, w4, w5, w6, w7, x + width)
        y1 = _add_block(y1, scale, minimum, dots, scales + step, sums + step)
        dots = simd.dot_unsigned4(w0, w1, w2, w3, w4, w5, w6, w7, x + 2 * width)
        y2 = _add_block(y2, scale, minimum, dots, scales + 2 * step, sums + 2 * step)
        dots = simd.dot_unsigned4(w0, w1, w2, w3, w4, w5, w6, w7, x + 3 * width)
        y3 = _add_block(y3, scale, minimum, dots, scales + 3 * step, sums + 3 * step)
        p += BYTES_4BIT
        x += _BLOCK
        scales += 4
        sums += 4
    _store(out, y0, adds)
    _store(out + 4 * stride, y1, adds)
    _store(out + 8 * stride, y2, adds)
    _store(out + 12 * stride, y3, adds)


@nb.njit(forceinline=True)
def _add_block(y, scale, minimum, dots, row_scale, row_sum):
    """Add the product of one block; the scale and the sum of the row are at the addresses."""
    y = simd.fma(simd.to_f32(dots), simd.mul(scale, simd.repeat_at(row_scale)), y)
    return simd.fma(minimum, simd.repeat_at(row_sum), y)


@nb.njit(forceinline=True)
def _store(address, y, adds):
    if adds:
        y = simd.add(y, simd.load_f32(address))
    simd.store_f32(address, y)


@nb.njit(**JIT)
def multiply_8bit(weight, num_blocks, first, stop, rows, scales, num_rows, out, stride, adds):
    """Do the same as `multiply_4bit` for 8-bit blocks, which have no minimum."""
    for group in range(first, stop):
        for b in range(num_rows):
            p, x = weight + group * num_blocks * BYTES_8BIT, rows + b * num_blocks * _BLOCK
            scale_at = scales + 4 * b * num_blocks
            y = simd.zeros()
            for _ in range(num_blocks):
                for line in range(5):
                    simd.prefetch(p + _AHEAD + 64 * line)
                dots = simd.dot_signed8(
                    simd.load_bytes(p + 16),
                    simd.load_bytes(p + 48),
                    simd.load_bytes(p + 80),
                    simd.load_bytes(p + 112),
                    simd.load_bytes(p + 144),
                    simd.load_bytes(p + 176),
                    simd.load_bytes(p + 208),
                    simd.load_bytes(p + 240),
                    x,
                )
                scale = simd.mul(simd.load_f16(p), simd.repeat_at(scale_at))
                y = simd.fma(simd.to_f32(dots), scale, y)
                p += BYTES_8BIT
                x += _BLOCK
                scale_at += 4
            _store(out + 4 * (b * stride + group * _GROUP), y, adds)


@nb.njit(**JIT)
def multiply(
    weight, group_bytes, num_blocks, first, stop, rows, scales, sums, num_rows, out, stride, adds
):
    """Call `multiply_4bit` or `multiply_8bit`, by the number of bytes of a group."""
    if group_bytes == BYTES_4BIT:
        multiply_4bit(
            weight, num_blocks, first, stop, rows, scales, sums, num_rows, out, stride, adds
        )
    else:
        multiply_8bit(weight, num_blocks, first, stop, rows, scales, num_rows, out, stride, adds)


@nb.njit(fastmath=FAST, **JIT)
def multiply_plain(weight, group_bytes, num_blocks, rows, scales, sums, num_rows, out):
    """Compute the product one number after another, the definition that tests compare with.

    The arguments are those of `multiply`, with arrays instead of addresses: weight uint8, rows int8
    [num_rows, in], out float32 [num_rows, outputs].
    """
    is_4bit = group_bytes == BYTES_4BIT
    halves = weight.view(np.uint8)
    for b in range(num_rows):
        for r in range(out.shape[1]):
            total = _f32(0)
            for i in range(num_blocks):
                start = (r // _GROUP * num_blocks + i) * group_bytes
                dot = 0
                for j in range(_BLOCK):
                    if is_4bit:
                        byte = halves[start + 32 + j % 16 // 4 * 32 + r % _GROUP * 4 + j % 4]
                        q = byte >> 4 if j >= 16 else byte & 15
                    else:
                        q = np.int8(halves[start + 16 + j // 4 * 32 + r % _GROUP * 4 + j % 4])
                    dot += np.int64(q) * np.int64(rows[b, _BLOCK * i + j])
                total += _half(halves, start, r) * scales[b, i] * _f32(dot)
                if is_4bit:
                    total += _half(halves, start + 16, r) * sums[b, i]
            out[b, r] = total


@nb.njit(**JIT)
def _half(data, start, r):
    """Return float16 number r % 8 of eight at byte `start`."""
    at = start + 2 * (r % _GROUP)
    bits = _i32(data[at]) | _i32(data[at + 1]) << 8
    sign, exponent, fraction = bits >> 15, bits >> 10 & 31, bits & 1023
    size = fraction * 2.0**-24 if exponent == 0 else (1 + fraction / 1024) * 2.0 ** (exponent - 15)
    return _f32(-size if sign else size)


# --- the job of a product -------------------------------------------------------------------------
# Words at the beginning of the job's memory, then the quantized rows.
_WORDS = 10
(
    _WEIGHT, _GROUP_BYTES, _NUM_BLOCKS, _NUM_GROUPS, _GROUPS_PER_CHUNK, _ROWS, _NUM_ROWS, _OUT,
    _SCALES, _INTEGERS,
) = range(_WORDS)  # fmt: skip
_PHASES = 2


@nb.njit(**JIT)
def _work(job):
    """Quantize the rows (phase 0), then multiply (phase 1), together with other threads."""
    memory = ffi.job_memory(job)
    num_blocks, num_rows = ffi.peek(memory + 8 * _NUM_BLOCKS), ffi.peek(memory + 8 * _NUM_ROWS)
    width = num_blocks * _BLOCK
    rows = ffi.view_f32(ffi.peek(memory + 8 * _ROWS), num_rows * width)
    scales_at = ffi.peek(memory + 8 * _SCALES)
    scales = ffi.view_f32(scales_at, num_rows * num_blocks)
    sums = ffi.view_f32(scales_at + 4 * num_rows * num_blocks, num_rows * num_blocks)
    integers_at = ffi.peek(memory + 8 * _INTEGERS)
    integers = ffi.view_i8(integers_at, num_rows * width)

    count = -(-num_rows // _ROWS_PER_CHUNK)
    chunk = ffi.claim(job, 0)
    while chunk < count:
        for b in range(chunk * _ROWS_PER_CHUNK, min((chunk + 1) * _ROWS_PER_CHUNK, num_rows)):
            quantize_row(
                rows[b * width : (b + 1) * width],
                integers[b * width : (b + 1) * width],
                scales[b * num_blocks : (b + 1) * num_blocks],
                sums[b * num_blocks : (b + 1) * num_blocks],
            )
        ffi.finish(job, 0)
        chunk = ffi.claim(job, 0)
    ffi.wait(job, 0, count)

    num_groups, per_chunk = (
        ffi.peek(memory + 8 * _NUM_GROUPS),
        ffi.peek(memory + 8 * _GROUPS_PER_CHUNK),
    )
    count = -(-num_groups // per_chunk)
    chunk = ffi.claim(job, 1)
    while chunk < count:
        multiply(
            ffi.peek(memory + 8 * _WEIGHT),
            ffi.peek(memory + 8 * _GROUP_BYTES),
            num_blocks,
            chunk * per_chunk,
            min((chunk + 1) * per_chunk, num_groups),
            integers_at,
            scales_at,
            scales_at + 4 * num_rows * num_blocks,
            num_rows,
            ffi.peek(memory + 8 * _OUT),
            num_groups * _GROUP,
            False,
        )
        ffi.finish(job, 1)
        chunk = ffi.claim(job, 1)
    ffi.wait(job, 1, count)


@nb.cfunc(types.void(types.intp), cache=ffi.CACHE)
def _help(job):
    _work(job)
    ffi.release(job)


_help_address = ffi.address_of("pellucid_matmul_blocks_help", _help)


@nb.cfunc(types.intp(types.intp), cache=ffi.CACHE)
def _matmul(frame):
    """The target of `jax.ffi.ffi_call`: operands rows [R, in], packed; result [R, 8 * groups]."""
    if ffi.is_metadata_call(frame):
        return 0
    num_rows, num_groups = ffi.operand_dim(frame, 0, 0), ffi.operand_dim(frame, 1, 0)
    num_blocks, group_bytes = ffi.operand_dim(frame, 1, 1), ffi.operand_dim(frame, 1, 2)
    num_scales = num_rows * num_blocks
    job = ffi.new_job(_PHASES, 8 * _WORDS + num_scales * (8 + _BLOCK))
    memory = ffi.job_memory(job)
    per_chunk = max(_CHUNK_BYTES // (num_blocks * group_bytes), 1)
    ffi.poke(memory + 8 * _WEIGHT, ffi.operand(frame, 1))
    ffi.poke(memory + 8 * _GROUP_BYTES, group_bytes)
    ffi.poke(memory + 8 * _NUM_BLOCKS, num_blocks)
    ffi.poke(memory + 8 * _NUM_GROUPS, num_groups)
    ffi.poke(memory + 8 * _GROUPS_PER_CHUNK, per_chunk)
    ffi.poke(memory + 8 * _ROWS, ffi.operand(frame, 0))
    ffi.poke(memory + 8 * _NUM_ROWS, num_rows)
    ffi.poke(memory + 8 * _OUT, ffi.result(frame, 0))
    ffi.poke(memory + 8 * _SCALES, memory + 8 * _WORDS)
    ffi.poke(memory + 8 * _INTEGERS, memory + 8 * _WORDS + 8 * num_scales)
    helpers = min(ffi.num_threads(frame), -(-num_groups // per_chunk)) - 1
    ffi.start_helpers(frame, job, _help_address(), helpers)
    _work(job)
    ffi.release(job)
    return 0


ffi.register("pellucid_matmul_blocks", _matmul)


def matmul(rows: jax.Array, weight: BlockWeight) -> jax.Array:
    """Compute `rows @ weight.T`: float32 [R, in] -> float32 [R, out]."""
    num_groups = weight.packed.shape[0]
    kind = jax.ShapeDtypeStruct((len(rows), num_groups * _GROUP), jnp.float32)
    y = jax.ffi.ffi_call("pellucid_matmul_blocks", kind)(rows, weight.packed)
    return y[:, : weight.num_rows]
