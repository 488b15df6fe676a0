"""All layers of a decoder for one new token of each row, as one call.

XLA runs a decoding step as hundreds of small programs, and each of them starts its threads anew.
Here a few threads walk through the layers together. A layer has five phases:

    queries, keys, values    norm, quantize; chunks of the outputs
    attention                chunks are (row, key-value head, block of the cache)
    output projection        join the blocks of a head, quantize; chunks of the outputs
    gate and up              norm, quantize; chunks of the hidden units
    down                     quantize; chunks of the outputs

A thread claims chunks until there are none, then waits until those of the other threads are
finished. Norms and quantization are computed by every thread that works on a phase: this costs less
than one more phase.

Covers decoders with RMS norms before each sublayer, a gated MLP, and weights in blocks, with or
without biases, norms of queries and keys, windows and rotary positions; see `is_supported`.
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

from transformer import cache, quant
from transformer.config import Config
from transformer.decoder import Layer
from transformer.native import attention, ffi, products
from transformer.native.ffi import FAST, JIT
from transformer.weights import BlockWeight, Linear

_BLOCK, _GROUP, _BLOCK_SIZE = quant.BLOCK, quant.GROUP, cache.BLOCK_SIZE
_CHUNK = 8  # groups of eight outputs in a chunk of a product
_f32 = np.float32
_ACTIVATIONS = {"swiglu": 0, "geglu": 1}

# Operands: sizes, factors, x, tables, starts, and then the arrays of the layers.
_SIZES = 9
_D, _N, _K, _H, _F, _HALF, _IS_BFLOAT16, _ACTIVATION, _L = range(_SIZES)
_EPS, _QUERY_FACTOR, _RESIDUAL_FACTOR = range(3)
_FIRST_LAYER_OPERAND = 6
# Arrays of a layer. The operand `slots` has the number of each among the operands, or -1.
_NAMES = (
    "attn_norm", "q", "q_bias", "k", "k_bias", "v", "v_bias", "q_norm", "k_norm", "cos", "sin",
    "out", "out_bias", "mlp_norm", "gate", "gate_bias", "up", "up_bias", "down", "down_bias",
    "keys", "values",
)  # fmt: skip
_NUM_SLOTS = len(_NAMES)
(
    _ATTN_NORM, _Q, _Q_BIAS, _KEY, _K_BIAS, _V, _V_BIAS, _Q_NORM, _K_NORM, _COS, _SIN,
    _OUT, _OUT_BIAS, _MLP_NORM, _GATE, _GATE_BIAS, _UP, _UP_BIAS, _DOWN, _DOWN_BIAS,
    _KEYS, _VALUES,
) = range(_NUM_SLOTS)  # fmt: skip
_WINDOW = _NUM_SLOTS  # the last column of `slots`
_PHASES = 5  # of a layer


# --- pieces of a layer ----------------------------------------------------------------------------


@nb.njit(fastmath=FAST, **JIT)
def rms_norm(x, scale, eps, out):
    """Write the RMS norm of x, float32 [n], to out."""
    total = _f32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    factor = _f32(1) / _f32(np.sqrt(total / _f32(len(x)) + eps))
    for i in range(len(x)):
        out[i] = x[i] * factor * scale[i]


@nb.njit(fastmath={"nnan", "ninf", "nsz", "contract"}, **JIT)
def _activate(gate, up, kind):
    """Write silu(gate) * up, or gelu(gate) * up with the tanh approximation, to gate."""
    for i in range(len(gate)):
        x = gate[i]
        z = x
        if kind == 1:  # gelu(x) = x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x**3))
            z = _f32(1.5957691216) * (x + _f32(0.044715) * x * x * x)
        z = min(max(-z, _f32(-87)), _f32(87))
        gate[i] = x / (_f32(1) + attention.exp(z)) * up[i]


@nb.njit(**JIT)
def _add_bias(out, stride, bias, first, count, num_rows, factor):
    """Add numbers `first`, `first` + 1, ... of a bias to each row of `out`; 0 is no bias."""
    if bias == 0:
        return
    numbers = ffi.view_f32(bias + 4 * first, count)
    for b in range(num_rows):
        row = ffi.view_f32(out + 4 * b * stride, count)
        for i in range(count):
            row[i] += numbers[i] * factor


# --- memory ---------------------------------------------------------------------------------------
# The job has the addresses of all arrays, and a copy of the sizes and factors: a helper that starts
# after the call has ended finds no chunk, and must not read memory that XLA may have freed. The
# numbers that threads exchange, and the scratch of each thread, are in a result of the call, which
# XLA allocates.
_WORDS = 32  # at the beginning of the job's memory
(
    _X, _TABLES, _STARTS, _NUM_ROWS, _TABLE_WIDTH, _NUM_BLOCKS, _WINDOWS, _SHARED, _PRIVATE,
    _PRIVATE_SIZE,
) = range(10)  # fmt: skip
_SIZES_AT, _FACTORS_AT = 8 * 16, 8 * 24  # offsets of the copies
_SLOT_WORDS = 3  # of each array of a layer: address, groups, bytes of a group


@nb.njit(**JIT)
def _private_size(num_rows, sizes):
    """Return the bytes of the scratch of one thread, a multiple of 64."""
    width = max(sizes[_D], sizes[_N] * sizes[_H], sizes[_F])
    group = sizes[_N] // sizes[_K]
    size = num_rows * (width + 8 * (width // _BLOCK))  # quantized rows, scales and sums
    size += 4 * width  # a row before its quantization
    size += 2 * 4 * num_rows * _CHUNK * _GROUP  # gate and up of a chunk
    size += 4 * (attention.scratch_size(group, sizes[_H]) + (group + 1) * sizes[_H])
    return (size + 63) // 64 * 64


@nb.njit(**JIT)
def _shared_size(num_rows, table_width, sizes):
    """Return the bytes of the numbers that threads exchange, a multiple of 64."""
    heads, kv_heads = sizes[_N] * sizes[_H], sizes[_K] * sizes[_H]
    size = num_rows * (heads + 2 * kv_heads + sizes[_F])
    size += num_rows * sizes[_N] * table_width * attention.partial_size(sizes[_H])
    return (4 * size + 63) // 64 * 64


@nb.njit(**JIT)
def _slot(memory, layer, name):
    """Return the address of the three words of an array of a layer."""
    return memory + 8 * (_WORDS + _SLOT_WORDS * (layer * _NUM_SLOTS + name))


@nb.njit(**JIT)
def _address(memory, layer, name):
    return ffi.peek(_slot(memory, layer, name))


@nb.njit(**JIT)
def _chunks(memory, layer, name):
    """Return the number of chunks of a product."""
    return -(-ffi.peek(_slot(memory, layer, name) + 8) // _CHUNK)


@nb.njit(**JIT)
def _multiply(memory, layer, name, chunk, width, rows, scales, sums, num_rows, out, stride, adds):
    """Multiply quantized rows with one chunk of a weight; return its number of outputs.

    `scales` and `sums` are arrays here, and addresses in `products.multiply`.
    """
    slot = _slot(memory, layer, name)
    first = chunk * _CHUNK
    stop = min(first + _CHUNK, ffi.peek(slot + 8))
    products.multiply(
        ffi.peek(slot), ffi.peek(slot + 16), width // _BLOCK, first, stop, rows,
        scales.ctypes.data, sums.ctypes.data, num_rows, out, stride, adds,
    )  # fmt: skip
    return (stop - first) * _GROUP


# --- the step -------------------------------------------------------------------------------------


@nb.njit(**JIT)
def _attend(memory, layer, chunk, num_blocks, sizes, factors, q_at, k_at, v_at, partials, scratch):
    """Attend to one block of the cache of one row, for the heads of one key-value head.

    The last block also gets the new key and value.
    """
    num_heads, kv_heads, head_dim, half = sizes[_N], sizes[_K], sizes[_H], sizes[_HALF]
    group = num_heads // kv_heads
    row, rest = chunk // (kv_heads * num_blocks), chunk % (kv_heads * num_blocks)
    head, index = rest // num_blocks, rest % num_blocks
    start = np.int64(ffi.view_i32(ffi.peek(memory + 8 * _STARTS), row + 1)[row])
    window = np.int64(ffi.view_i32(ffi.peek(memory + 8 * _WINDOWS), layer + 1)[layer])
    lowest = max(start - window + 1, 0) if window > 0 else 0
    last = start // _BLOCK_SIZE
    if index > last or (index + 1) * _BLOCK_SIZE <= lowest:
        return
    cos_at, sin_at = _address(memory, layer, _COS), _address(memory, layer, _SIN)
    half = half if cos_at else 0
    cos = ffi.view_f32(cos_at + 4 * row * half, half)
    sin = ffi.view_f32(sin_at + 4 * row * half, half)
    eps = factors[_EPS]

    queries = ffi.view_f32(scratch, group * head_dim)
    normed = ffi.view_f32(scratch + 4 * group * head_dim, head_dim)
    factor = factors[_QUERY_FACTOR] / _f32(np.sqrt(_f32(head_dim)))
    for g in range(group):
        at = q_at + 4 * (row * num_heads + head * group + g) * head_dim
        query = ffi.view_f32(at, head_dim)
        norm = _address(memory, layer, _Q_NORM)
        if norm != 0:
            rms_norm(query, ffi.view_f32(norm, head_dim), eps, normed)
            query = normed
        attention.rotate(query, cos, sin, factor, queries[g * head_dim : (g + 1) * head_dim])

    is_bfloat16 = sizes[_IS_BFLOAT16] != 0
    itemsize = 2 if is_bfloat16 else 4
    width = np.int64(ffi.peek(memory + 8 * _TABLE_WIDTH))
    table = ffi.view_i32(ffi.peek(memory + 8 * _TABLES) + 4 * row * width, width)
    offset = itemsize * (np.int64(table[index]) * kv_heads + head) * head_dim * _BLOCK_SIZE
    keys = _address(memory, layer, _KEYS) + offset
    values = _address(memory, layer, _VALUES) + offset
    if index == last:
        at = 4 * (row * kv_heads + head) * head_dim
        key, value = ffi.view_f32(k_at + at, head_dim), ffi.view_f32(v_at + at, head_dim)
        rotated = normed
        norm = _address(memory, layer, _K_NORM)
        if norm != 0:
            rms_norm(key, ffi.view_f32(norm, head_dim), eps, key)
        attention.rotate(key, cos, sin, _f32(1), rotated)
        place = start % _BLOCK_SIZE
        if is_bfloat16:
            key_block = ffi.view_u16(keys, head_dim * _BLOCK_SIZE)
            value_block = ffi.view_u16(values, head_dim * _BLOCK_SIZE)
            for h in range(head_dim):
                key_block[h * _BLOCK_SIZE + place] = attention.to_bfloat16(rotated[h])
                value_block[place * head_dim + h] = attention.to_bfloat16(value[h])
        else:
            key_block_f32 = ffi.view_f32(keys, head_dim * _BLOCK_SIZE)
            value_block_f32 = ffi.view_f32(values, head_dim * _BLOCK_SIZE)
            for h in range(head_dim):
                key_block_f32[h * _BLOCK_SIZE + place] = rotated[h]
                value_block_f32[place * head_dim + h] = value[h]
    size = attention.partial_size(head_dim)
    attention.attend_block(
        queries, group, head_dim, keys, values, is_bfloat16,
        max(lowest - index * _BLOCK_SIZE, 0), min(start - index * _BLOCK_SIZE + 1, _BLOCK_SIZE),
        scratch + 4 * (group + 1) * head_dim,
        partials + 4 * ((row * num_blocks + index) * num_heads + head * group) * size,
    )  # fmt: skip


@nb.njit(**JIT)
def _combine(memory, layer, row, num_blocks, sizes, factor, partials, out):
    """Write the attention output of all heads of a row, times a factor."""
    num_heads, head_dim = sizes[_N], sizes[_H]
    size = attention.partial_size(head_dim)
    start = np.int64(ffi.view_i32(ffi.peek(memory + 8 * _STARTS), row + 1)[row])
    window = np.int64(ffi.view_i32(ffi.peek(memory + 8 * _WINDOWS), layer + 1)[layer])
    first = max(start - window + 1, 0) // _BLOCK_SIZE if window > 0 else 0
    count = start // _BLOCK_SIZE - first + 1
    for n in range(num_heads):
        at = partials + 4 * ((row * num_blocks + first) * num_heads + n) * size
        head = out[n * head_dim : (n + 1) * head_dim]
        attention.combine(at, count, num_heads * size, head_dim, factor, head)


@nb.njit(**JIT)
def _quantize(row, b, integers_at, scales, sums):
    """Write row b of the quantized rows."""
    width, count = len(row), len(row) // _BLOCK
    products.quantize_row(
        row,
        ffi.view_i8(integers_at + b * width, width),
        scales[b * count : (b + 1) * count],
        sums[b * count : (b + 1) * count],
    )


@nb.njit(**JIT)
def _norm_and_quantize(x_at, num_rows, scale_at, eps, row, integers_at, scales, sums):
    width = len(row)
    for b in range(num_rows):
        x = ffi.view_f32(x_at + 4 * b * width, width)
        rms_norm(x, ffi.view_f32(scale_at, width), eps, row)
        _quantize(row, b, integers_at, scales, sums)


@nb.njit(**JIT)
def _work(job):
    """Compute the chunks of this thread."""
    memory = ffi.job_memory(job)
    sizes = ffi.view_i32(memory + _SIZES_AT, _SIZES)
    num_layers = np.int64(sizes[_L])
    factors = ffi.view_f32(memory + _FACTORS_AT, 3)
    num_rows, num_blocks = ffi.peek(memory + 8 * _NUM_ROWS), ffi.peek(memory + 8 * _NUM_BLOCKS)
    d_model, d_ff = np.int64(sizes[_D]), np.int64(sizes[_F])
    heads, kv_heads = np.int64(sizes[_N] * sizes[_H]), np.int64(sizes[_K] * sizes[_H])
    eps, residual = factors[_EPS], factors[_RESIDUAL_FACTOR]
    x_at = ffi.peek(memory + 8 * _X)
    q_at = ffi.peek(memory + 8 * _SHARED)
    k_at = q_at + 4 * num_rows * heads
    v_at = k_at + 4 * num_rows * kv_heads
    hidden_at = v_at + 4 * num_rows * kv_heads
    partials = hidden_at + 4 * num_rows * d_ff

    mine = ffi.peek(memory + 8 * _PRIVATE)
    mine += ffi.thread_index(job) * ffi.peek(memory + 8 * _PRIVATE_SIZE)
    width = max(d_model, heads, d_ff)
    row_at = mine
    scales_at = row_at + 4 * width
    num_scales = num_rows * (width // _BLOCK)
    scales, sums = (
        ffi.view_f32(scales_at, num_scales),
        ffi.view_f32(scales_at + 4 * num_scales, num_scales),
    )
    gate_at = scales_at + 8 * num_scales
    up_at = gate_at + 4 * num_rows * _CHUNK * _GROUP
    scratch = up_at + 4 * num_rows * _CHUNK * _GROUP
    group = np.int64(sizes[_N] // sizes[_K])
    integers_at = scratch + 4 * (
        attention.scratch_size(group, np.int64(sizes[_H])) + (group + 1) * sizes[_H]
    )

    for layer in range(num_layers):
        # Queries, keys and values.
        phase = _PHASES * layer
        q_chunks, k_chunks = _chunks(memory, layer, _Q), _chunks(memory, layer, _KEY)
        count = q_chunks + k_chunks + _chunks(memory, layer, _V)
        is_quantized = False
        chunk = ffi.claim(job, phase)
        while chunk < count:
            if not is_quantized:
                norm = _address(memory, layer, _ATTN_NORM)
                row = ffi.view_f32(row_at, d_model)
                _norm_and_quantize(x_at, num_rows, norm, eps, row, integers_at, scales, sums)
                is_quantized = True
            name, bias, out, stride, index = _Q, _Q_BIAS, q_at, heads, chunk
            if chunk >= q_chunks + k_chunks:
                name, bias, out, stride, index = (
                    _V,
                    _V_BIAS,
                    v_at,
                    kv_heads,
                    chunk - q_chunks - k_chunks,
                )
            elif chunk >= q_chunks:
                name, bias, out, stride, index = _KEY, _K_BIAS, k_at, kv_heads, chunk - q_chunks
            size = _multiply(
                memory,
                layer,
                name,
                index,
                d_model,
                integers_at,
                scales,
                sums,
                num_rows,
                out,
                stride,
                False,
            )
            first = index * _CHUNK * _GROUP
            bias_at = _address(memory, layer, bias)
            _add_bias(out + 4 * first, stride, bias_at, first, size, num_rows, _f32(1))
            ffi.finish(job, phase)
            chunk = ffi.claim(job, phase)
        ffi.wait(job, phase, count)

        # Attention.
        phase += 1
        count = num_rows * sizes[_K] * num_blocks
        chunk = ffi.claim(job, phase)
        while chunk < count:
            _attend(
                memory,
                layer,
                chunk,
                num_blocks,
                sizes,
                factors,
                q_at,
                k_at,
                v_at,
                partials,
                scratch,
            )
            ffi.finish(job, phase)
            chunk = ffi.claim(job, phase)
        ffi.wait(job, phase, count)

        # Output projection, added to the residual stream.
        phase += 1
        count = _chunks(memory, layer, _OUT)
        is_quantized = False
        chunk = ffi.claim(job, phase)
        while chunk < count:
            if not is_quantized:
                row = ffi.view_f32(row_at, heads)
                for b in range(num_rows):
                    _combine(memory, layer, b, num_blocks, sizes, residual, partials, row)
                    _quantize(row, b, integers_at, scales, sums)
                is_quantized = True
            size = _multiply(
                memory,
                layer,
                _OUT,
                chunk,
                heads,
                integers_at,
                scales,
                sums,
                num_rows,
                x_at,
                d_model,
                True,
            )
            first = chunk * _CHUNK * _GROUP
            bias_at = _address(memory, layer, _OUT_BIAS)
            _add_bias(x_at + 4 * first, d_model, bias_at, first, size, num_rows, residual)
            ffi.finish(job, phase)
            chunk = ffi.claim(job, phase)
        ffi.wait(job, phase, count)

        # Gate and up.
        phase += 1
        count = _chunks(memory, layer, _GATE)
        is_quantized = False
        chunk = ffi.claim(job, phase)
        while chunk < count:
            if not is_quantized:
                norm = _address(memory, layer, _MLP_NORM)
                row = ffi.view_f32(row_at, d_model)
                _norm_and_quantize(x_at, num_rows, norm, eps, row, integers_at, scales, sums)
                is_quantized = True
            first, stride = chunk * _CHUNK * _GROUP, _CHUNK * _GROUP
            size = _multiply(
                memory, layer, _GATE, chunk, d_model, integers_at, scales, sums, num_rows,
                gate_at - 4 * first, stride, False,
            )  # fmt: skip
            _multiply(
                memory, layer, _UP, chunk, d_model, integers_at, scales, sums, num_rows,
                up_at - 4 * first, stride, False,
            )  # fmt: skip
            bias_at = _address(memory, layer, _GATE_BIAS)
            _add_bias(gate_at, stride, bias_at, first, size, num_rows, _f32(1))
            bias_at = _address(memory, layer, _UP_BIAS)
            _add_bias(up_at, stride, bias_at, first, size, num_rows, _f32(1))
            for b in range(num_rows):
                gate = ffi.view_f32(gate_at + 4 * b * stride, size)
                _activate(gate, ffi.view_f32(up_at + 4 * b * stride, size), sizes[_ACTIVATION])
                hidden = ffi.view_f32(hidden_at + 4 * (b * d_ff + first), size)
                for i in range(size):
                    hidden[i] = gate[i] * residual
            ffi.finish(job, phase)
            chunk = ffi.claim(job, phase)
        ffi.wait(job, phase, count)

        # Down, added to the residual stream.
        phase += 1
        count = _chunks(memory, layer, _DOWN)
        is_quantized = False
        chunk = ffi.claim(job, phase)
        while chunk < count:
            if not is_quantized:
                for b in range(num_rows):
                    hidden = ffi.view_f32(hidden_at + 4 * b * d_ff, d_ff)
                    _quantize(hidden, b, integers_at, scales, sums)
                is_quantized = True
            size = _multiply(
                memory,
                layer,
                _DOWN,
                chunk,
                d_ff,
                integers_at,
                scales,
                sums,
                num_rows,
                x_at,
                d_model,
                True,
            )
            first = chunk * _CHUNK * _GROUP
            bias_at = _address(memory, layer, _DOWN_BIAS)
            _add_bias(x_at + 4 * first, d_model, bias_at, first, size, num_rows, residual)
            ffi.finish(job, phase)
            chunk = ffi.claim(job, phase)
        ffi.wait(job, phase, count)


@nb.cfunc(types.void(types.intp), cache=ffi.CACHE)
def _help(job):
    _work(job)
    ffi.release(job)


_help_address = ffi.address_of("pellucid_decode_layers_help", _help)


@nb.cfunc(types.intp(types.intp), cache=ffi.CACHE)
def _decode_layers(frame):
    """The target of `jax.ffi.ffi_call`; `decode_layers` defines operands and results."""
    if ffi.is_metadata_call(frame):
        return 0
    sizes = ffi.view_i32(ffi.operand(frame, 0), _SIZES)
    num_rows, table_width = ffi.operand_dim(frame, 3, 0), ffi.operand_dim(frame, 4, 1)
    num_layers = np.int64(sizes[_L])
    num_words = _WORDS + _SLOT_WORDS * num_layers * _NUM_SLOTS
    job = ffi.new_job(_PHASES * num_layers, 8 * num_words)
    memory = ffi.job_memory(job)
    x_at = ffi.result(frame, 0)
    ffi.view_f32(x_at, num_rows * sizes[_D])[:] = ffi.view_f32(
        ffi.operand(frame, 3), num_rows * sizes[_D]
    )
    ffi.view_i32(memory + _SIZES_AT, _SIZES)[:] = sizes
    ffi.view_f32(memory + _FACTORS_AT, 3)[:] = ffi.view_f32(ffi.operand(frame, 1), 3)
    ffi.poke(memory + 8 * _X, x_at)
    ffi.poke(memory + 8 * _TABLES, ffi.operand(frame, 4))
    ffi.poke(memory + 8 * _STARTS, ffi.operand(frame, 5))
    ffi.poke(memory + 8 * _NUM_ROWS, num_rows)
    ffi.poke(memory + 8 * _TABLE_WIDTH, table_width)
    starts = ffi.view_i32(ffi.operand(frame, 5), num_rows)
    num_blocks = 1  # of the longest row
    for b in range(num_rows):
        num_blocks = max(num_blocks, np.int64(starts[b]) // _BLOCK_SIZE + 1)
    ffi.poke(memory + 8 * _NUM_BLOCKS, min(num_blocks, table_width))
    slots = ffi.view_i32(ffi.operand(frame, 2), num_layers * (_NUM_SLOTS + 1))
    ffi.poke(memory + 8 * _WINDOWS, ffi.operand(frame, 2) + 4 * num_layers * _NUM_SLOTS)
    workspace = ffi.result(frame, 1)
    ffi.poke(memory + 8 * _SHARED, workspace)
    shared_size = _shared_size(num_rows, table_width, sizes)
    ffi.poke(memory + 8 * _PRIVATE, workspace + shared_size)
    ffi.poke(memory + 8 * _PRIVATE_SIZE, _private_size(num_rows, sizes))
    for layer in range(num_layers):
        for name in range(_NUM_SLOTS):
            i = np.int64(slots[layer * _NUM_SLOTS + name])
            slot = _slot(memory, layer, name)
            ffi.poke(slot, 0)
            if i >= 0:
                ffi.poke(slot, ffi.operand(frame, i))
                if ffi.operand_rank(frame, i) == 3:  # a weight in blocks
                    ffi.poke(slot + 8, ffi.operand_dim(frame, i, 0))
                    ffi.poke(slot + 16, ffi.operand_dim(frame, i, 2))
    ffi.start_helpers(frame, job, _help_address(), ffi.num_threads(frame) - 1)
    _work(job)
    ffi.release(job)
    return 0


ffi.register("pellucid_decode_layers", _decode_layers)


# --- JAX ------------------------------------------------------------------------------------------


def is_supported(layers: tuple[Layer, ...], cfg: Config) -> bool:
    """Whether `decode_layers` covers a decoder."""
    is_covered = (
        cfg.norm in ("rms", "unit_rms")
        and cfg.pre_norms
        and not cfg.post_norms
        and not cfg.parallel_residual
        and cfg.mlp in _ACTIVATIONS
        and cfg.num_experts is None
        and cfg.attn_logit_softcap is None
        and not cfg.attention_sinks
        and not (cfg.qk_norm and cfg.qk_norm_over != "head")
        and all(n % _BLOCK == 0 for n in (cfg.d_model, cfg.d_ff, cfg.num_heads * cfg.head_dim))
        and cfg.head_dim % 8 == 0
        and cfg.num_kv_heads * cfg.head_dim % _GROUP == 0
    )
    return is_covered and all(
        isinstance(p.weight, BlockWeight) and p.lora is None
        for layer in layers
        for p in (layer.q, layer.k, layer.v, layer.out, layer.gate, layer.up, layer.down)
        if p is not None
    )


def decode_layers(
    x: jax.Array,
    layers: tuple[Layer, ...],
    cfg: Config,
    kv_cache: cache.KVCache,
    angles: tuple[tuple[jax.Array, jax.Array] | None, ...],
    tables: jax.Array,
    starts: jax.Array,
) -> tuple[jax.Array, cache.KVCache]:
    """Apply all layers to one new token of each row.

    Args:
        x: The residual stream, float32 [B, 1, D].
        layers: Weights of the layers, for which `is_supported` is true.
        cfg: Config of the decoder.
        kv_cache: The cache, which is updated in place if the caller donates it.
        angles: Cosines and sines of each layer, float32 [B, 1, 1, R/2], or None.
        tables: The cache blocks of each row, int32 [B, S/BLOCK_SIZE].
        starts: Number of tokens of each row that are in the cache already, int32 [B].

    Returns:
        The residual stream after the last layer, float32 [B, 1, D], and the updated cache.
    """
    num_rows, table_width = tables.shape
    half = next((cos.shape[-1] for cos, _ in filter(None, angles)), 0)
    is_bfloat16 = kv_cache.keys[0].dtype == jnp.uint16
    sizes = np.array(
        [
            cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.d_ff, half,
            is_bfloat16, _ACTIVATIONS[cfg.mlp], len(layers),
        ],
        np.int32,
    )  # fmt: skip
    query_factor = 1.0
    if cfg.query_scalar is not None:
        query_factor = (cfg.head_dim / cfg.query_scalar) ** 0.5
    if cfg.attention_multiplier is not None:
        query_factor = cfg.attention_multiplier * cfg.head_dim**0.5
    factors = np.array([cfg.norm_eps, query_factor, cfg.residual_multiplier], np.float32)

    operands: list[jax.Array] = []
    numbers: dict[int, int] = {}  # id of an array -> its number among the operands

    def add(array: jax.Array | BlockWeight | None) -> int:
        if array is None:
            return -1
        data = array.packed if isinstance(array, BlockWeight) else array
        if id(data) not in numbers:
            numbers[id(data)] = _FIRST_LAYER_OPERAND + len(operands)
            operands.append(data)
        return numbers[id(data)]

    def norm_scale(norm) -> jax.Array | None:
        if norm is None:
            return None
        return 1.0 + norm.scale if cfg.norm == "unit_rms" else norm.scale

    flat_angles = {
        id(pair): tuple(a.reshape(num_rows, -1) for a in pair) for pair in angles if pair
    }
    aliases = {}  # operand -> result
    slots = []
    kept = []  # arrays whose `id` must stay unique
    for i, layer in enumerate(layers):
        cos, sin = flat_angles[id(angles[i])] if angles[i] else (None, None)
        arrays = {
            "attn_norm": norm_scale(layer.attn_norm),
            "q_norm": norm_scale(layer.q_norm),
            "k_norm": norm_scale(layer.k_norm),
            "mlp_norm": norm_scale(layer.mlp_norm),
            "cos": cos,
            "sin": sin,
            "keys": kv_cache.keys[i],
            "values": kv_cache.values[i],
        }
        for name in ("q", "k", "v", "out", "gate", "up", "down"):
            p: Linear = getattr(layer, name)
            arrays |= {name: p.weight, f"{name}_bias": p.bias}
        kept.append(arrays)
        slots.append([add(arrays[name]) for name in _NAMES])
        for name in ("keys", "values"):
            aliases[slots[-1][_NAMES.index(name)]] = 2 + len(aliases)
    windows = [cfg.window(i) or 0 for i in range(len(layers))]
    slots = np.array([n for row in slots for n in row] + windows, np.int32)

    workspace = _shared_size(num_rows, table_width, sizes) + ffi.MAX_THREADS * _private_size(
        num_rows, sizes
    )
    pools = [pool for pair in zip(kv_cache.keys, kv_cache.values, strict=True) for pool in pair]
    results = [
        jax.ShapeDtypeStruct((num_rows, cfg.d_model), jnp.float32),
        jax.ShapeDtypeStruct((workspace,), jnp.uint8),
        *(jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools),
    ]
    call = jax.ffi.ffi_call("pellucid_decode_layers", results, input_output_aliases=aliases)
    x, _, *pools = call(
        sizes, factors, slots, x.reshape(num_rows, -1), tables, starts, *operands
    )  # fmt: skip
    new = cache.KVCache(keys=tuple(pools[::2]), values=tuple(pools[1::2]))
    return x.reshape(num_rows, 1, -1), new
