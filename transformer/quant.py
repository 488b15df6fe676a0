"""Block quantization: weights as small integers with a scale for every 32 inputs.

A weight [out, in] is cut into blocks of 32 neighbouring inputs of one output. In a 4-bit block

    weight = scale * integer + minimum,    integer from 0 to 15, scale and minimum float16

and in an 8-bit block weight = scale * integer, integer from -127 to 127. These are the blocks Q4_1
and Q8_0 of GGUF files, so that files in these formats (and in Q4_0) keep exactly their numbers. The
embedding and the head have 8-bit blocks, because their error reaches the logits directly.

Memory holds eight outputs side by side (`GROUP_DTYPES`): a product with AVX2 computes eight outputs
at once and reads their integers with consecutive loads. llama.cpp repacks weights in the same way.

Rounding to the nearest multiple of (largest - smallest) / 15 is not the best choice of scale and
minimum. `quantize_4bit` tries several ranges and fits scale and minimum to the integers of each by
least squares, as llama.cpp does.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer.weights import BlockWeight

BLOCK = 32  # inputs that share a scale
GROUP = 8  # outputs that are stored side by side

# One block of eight outputs, by bits. Integer 4k + j of output r is byte [k, r, j] of 8-bit blocks;
# 4-bit blocks have integer 4k + j in the lower and 16 + 4k + j in the upper half of byte [k, r, j].
GROUP_DTYPES = {
    4: np.dtype([("scale", "<f2", 8), ("minimum", "<f2", 8), ("integer", "u1", (4, 8, 4))]),
    8: np.dtype([("scale", "<f2", 8), ("integer", "i1", (8, 8, 4))]),
}
GROUP_BYTES = {bits: dtype.itemsize for bits, dtype in GROUP_DTYPES.items()}  # 160 and 272
GGUF_BITS = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q8_0": 8}  # types that `from_gguf` reads
_SHRINK_FACTORS = np.linspace(0.8, 1.0, 9)  # of the range that the 16 integers cover


class Blocks(NamedTuple):
    """Rows of a weight in blocks: scale * integer + minimum."""

    integers: np.ndarray  # [R, in/32, 32] uint8 (4 bits) or int8 (8 bits)
    scales: np.ndarray  # [R, in/32] float
    minimums: np.ndarray | None  # [R, in/32] float; None with 8 bits


def quantize_4bit(rows: np.ndarray) -> Blocks:
    """Quantize float32 rows [R, in] to 4-bit blocks with a small squared error."""
    x = rows.reshape(len(rows), -1, BLOCK)
    low, high = x.min(-1), x.max(-1)
    middle, half = (low + high) / 2, (high - low) / 2
    best = np.full(low.shape, np.inf, np.float32)
    integers = np.zeros(x.shape, np.uint8)
    scales, minimums = np.zeros_like(low), low.copy()
    for factor in _SHRINK_FACTORS:
        step = np.maximum(half * factor / 7.5, 1e-30)
        q = np.clip(np.rint((x - (middle - half * factor)[..., None]) / step[..., None]), 0, 15)
        # The scale and the minimum with the least squared error for these integers.
        mean_q, mean_x = q.mean(-1), x.mean(-1)
        variance = (q * q).mean(-1) - mean_q**2
        covariance = (q * x).mean(-1) - mean_q * mean_x
        scale = np.where(variance > 0, covariance / np.maximum(variance, 1e-9), 0.0)
        scale = scale.astype(np.float16).astype(np.float32)
        minimum = (mean_x - scale * mean_q).astype(np.float16).astype(np.float32)
        error = ((scale[..., None] * q + minimum[..., None] - x) ** 2).sum(-1)
        better = error < best
        best = np.where(better, error, best)
        integers[better] = q[better]
        scales, minimums = np.where(better, scale, scales), np.where(better, minimum, minimums)
    return Blocks(integers, scales, minimums)


def quantize_8bit(rows: np.ndarray) -> Blocks:
    """Quantize float32 rows [R, in] to 8-bit blocks; the largest magnitude of a block is 127."""
    x = rows.reshape(len(rows), -1, BLOCK)
    scales = (np.abs(x).max(-1) / 127).astype(np.float16).astype(np.float32)
    inverse = np.divide(1, scales, where=scales > 0, out=np.zeros_like(scales))
    integers = np.clip(np.rint(x * inverse[..., None]), -127, 127).astype(np.int8)
    return Blocks(integers, scales, None)


def has_blocks(shape: tuple[int, ...]) -> bool:
    """Whether a weight can be stored in blocks: a matrix whose rows are a multiple of 32 long."""
    return len(shape) == 2 and shape[1] % BLOCK == 0


def bits_of(name: str, file_dtype: str = "") -> int:
    """Return the bits of the blocks of a weight in an "int4" model.

    A weight keeps the precision of the file: 8 bits for a tensor that has 5 to 8 bits there.

    Args:
        name: The field of the weight in `Params` or `Layer`.
        file_dtype: The dtype of the tensor in the file, as in `LazyTensor`.
    """
    if file_dtype in GGUF_BITS:
        return GGUF_BITS[file_dtype]
    return 8 if name in ("embed", "head") or file_dtype.startswith(("Q5_", "Q6_")) else 4


def empty(num_rows: int, num_columns: int, bits: int) -> np.ndarray:
    """Return a zeroed array for the blocks of a weight [num_rows, num_columns]; see `pack`.

    Raises:
        ValueError: num_columns is not a multiple of 32.
    """
    if num_columns % BLOCK:
        raise ValueError(f"rows must have a multiple of {BLOCK} inputs, got {num_columns}")
    shape = -(-num_rows // GROUP), num_columns // BLOCK
    dtype = GROUP_DTYPES[bits]
    memory = np.zeros(shape[0] * shape[1] * dtype.itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64  # JAX takes an array that is aligned so without a copy
    return memory[start : start + len(memory) - 64].view(dtype).reshape(shape)


def pack(groups: np.ndarray, start: int, rows: Blocks) -> None:
    """Write rows in blocks into an array of `empty`, as rows `start`, `start` + 1, ..."""
    group, lane = np.divmod(np.arange(start, start + len(rows.integers)), GROUP)
    groups["scale"][group, :, lane] = rows.scales
    integers = rows.integers
    if rows.minimums is not None:
        groups["minimum"][group, :, lane] = rows.minimums
        integers = integers[..., :16] | integers[..., 16:] << 4
    integers = integers.reshape(*integers.shape[:2], -1, 4)  # [R, in/32, k, j]
    groups["integer"][group, :, :, lane] = integers


def from_groups(groups: np.ndarray, num_rows: int) -> BlockWeight:
    """Return the weight of an array of `empty` that `pack` has filled, without a copy on a CPU."""
    packed = groups.view(np.uint8).reshape(*groups.shape, -1)
    bits = next(bits for bits, size in GROUP_BYTES.items() if size == packed.shape[-1])
    return BlockWeight(jax.device_put(packed, may_alias=True), num_rows, bits)


def quantize(weight: np.ndarray, bits: int) -> BlockWeight:
    """Return a float32 weight [out, in] in blocks of 4 or 8 bits."""
    num_rows, num_columns = weight.shape
    groups = empty(num_rows, num_columns, bits)
    pack(groups, 0, (quantize_4bit if bits == 4 else quantize_8bit)(weight))
    return from_groups(groups, len(weight))


def dequantize(weight: BlockWeight) -> jax.Array:
    """Return a weight as float32 [out, in]."""
    rows = _widen(weight.packed, weight.bits)  # [out/8, in/32, 8, 32]
    rows = rows.swapaxes(1, 2).reshape(-1, weight.shape[1])
    return rows[: weight.num_rows]


def take_rows(weight: BlockWeight, ids: jax.Array) -> jax.Array:
    """Return rows of a weight: int [...] -> float32 [..., in]."""
    groups = _widen(weight.packed[ids // GROUP], weight.bits)  # [..., in/32, 8, 32]
    index = (ids % GROUP)[..., None, None, None]
    return jnp.take_along_axis(groups, index, axis=-2).reshape(*ids.shape, -1)


def _widen(packed: jax.Array, bits: int) -> jax.Array:
    """Return the numbers of groups: uint8 [..., bytes] -> float32 [..., 8, 32]."""
    lead = packed.shape[:-1]

    def halves(start: int) -> jax.Array:
        pairs = packed[..., start : start + 2 * GROUP].reshape(*lead, GROUP, 2)
        return jax.lax.bitcast_convert_type(pairs, jnp.float16).astype(jnp.float32)[..., None]

    first = GROUP_DTYPES[bits].fields["integer"][1]  # pyright: ignore[reportOptionalSubscript]
    integers = packed[..., first:].reshape(*lead, -1, GROUP, 4)  # [..., k, 8, j]
    integers = integers.swapaxes(-3, -2).reshape(*lead, GROUP, -1)  # [..., 8, 16 or 32]
    if bits == 8:
        return jax.lax.bitcast_convert_type(integers, jnp.int8).astype(jnp.float32) * halves(0)
    integers = jnp.concatenate([integers & 15, integers >> 4], axis=-1).astype(jnp.float32)
    return integers * halves(0) + halves(2 * GROUP)


# --- GGUF -----------------------------------------------------------------------------------------


def from_gguf(raw: np.ndarray, kind: str) -> Blocks:
    """Return the numbers of GGUF rows in blocks without rounding them.

    Args:
        raw: The bytes of rows, uint8 [R, bytes].
        kind: The type of the tensor, one of GGUF_BITS. Scales of Q4_K are products of a float16
            with an integer, which `pack` rounds to float16.
    """
    if kind == "Q4_K":
        return _q4_k(raw)
    header, body = {"Q4_0": (2, 16), "Q4_1": (4, 16), "Q8_0": (2, 32)}[kind]
    blocks = raw.reshape(len(raw), -1, header + body)
    factors = np.ascontiguousarray(blocks[..., :header]).view("<f2").astype(np.float32)
    scales, integers = factors[..., 0], blocks[..., header:]
    if kind == "Q8_0":
        # -128 does not occur in files of llama.cpp, and the product needs -127 to 127.
        integers = np.maximum(np.ascontiguousarray(integers).view(np.int8), -127)
        return Blocks(integers, scales, None)
    integers = np.concatenate([integers & 15, integers >> 4], axis=-1)
    return Blocks(integers, scales, -8 * scales if kind == "Q4_0" else factors[..., 1])


def _q4_k(raw: np.ndarray) -> Blocks:
    """Return rows of Q4_K: 256 inputs share two float16, each 32 of them two 6-bit integers."""
    blocks = raw.reshape(len(raw), -1, 144)
    factors = np.ascontiguousarray(blocks[..., :4]).view("<f2").astype(np.float32)
    packed, nibbles = blocks[..., 4:16], blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scale = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    minimum = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    integers = np.stack([nibbles & 15, nibbles >> 4], axis=-2)  # [R, in/256, 4, 2, 32]
    shape = len(raw), -1
    return Blocks(
        integers.reshape(*shape, BLOCK),
        (factors[..., :1] * scale).reshape(shape),
        (-factors[..., 1:] * minimum).reshape(shape),
    )
