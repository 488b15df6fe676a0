"""Vectors of 32 bytes in Numba, and the dot-product instruction that loops do not reach.

LLVM turns simple loops into vector code by itself. It does not find the instructions that multiply
unsigned with signed bytes and add neighbours, which low-bit products need:

    AVX-512 VNNI, AVX-VNNI   vpdpbusd: four products are added to an int32
    AVX2                     vpmaddubsw: two products are added to a saturated int16,
                             vpmaddwd: two int16 are added to an int32
    others                   plain LLVM arithmetic, for any machine

The operations are Numba intrinsics: each emits LLVM instructions for one or a few vectors.
See the Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
"""

# Numba's intrinsics and the values of llvmlite have no types.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportReturnType=false, reportAssignmentType=false, reportPrivateImportUsage=false

from __future__ import annotations

import os
import platform
from collections.abc import Callable

import llvmlite.binding as llvm
import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F32, _BYTE_POINTER = ir.FloatType(), ir.IntType(8).as_pointer()
intp = types.intp


class Vector(types.Type):
    """Numba type of a vector of LLVM numbers."""

    def __init__(self, element: ir.Type, count: int):
        self.ir = ir.VectorType(element, count)
        super().__init__(f"Vector({element} x {count})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, fe_type.ir)


Bytes, Ints, Floats = Vector(_I8, 32), Vector(_I32, 8), Vector(_F32, 8)
_SHORTS = ir.VectorType(_I16, 16)


def cpu_features() -> frozenset[str]:
    """Return the names, as LLVM's, of the CPU features that Numba compiles for."""
    if (names := os.environ.get("NUMBA_CPU_FEATURES")) is not None:
        return frozenset(name[1:] for name in names.split(",") if name.startswith("+"))
    return frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)


_FEATURES = cpu_features()
HAS_AVX2 = "avx2" in _FEATURES
HAS_F16C = "f16c" in _FEATURES or platform.machine() in ("aarch64", "arm64")
HAS_VNNI = {"avx512vnni", "avx512vl"} <= _FEATURES or "avxvnni" in _FEATURES


def _operation(signature) -> Callable[[Callable], Callable]:
    """Return a decorator that makes an intrinsic of a function (builder, *values) -> value."""

    def wrap(emit: Callable) -> Callable:
        def generate(context, builder, sig, values):
            value = emit(builder, *values)
            return context.get_dummy_value() if value is None else value

        # Numba reads the number of arguments from the signature of the function.
        names = ", ".join(["_context", *(f"a{i}" for i in range(len(signature.args)))])
        space = {"result": (signature, generate)}
        exec(f"def {emit.__name__}({names}): return result", space)
        function = space[emit.__name__]
        function.__doc__ = emit.__doc__
        return intrinsic(function)

    return wrap


def _call(b: ir.IRBuilder, name: str, result: ir.Type, *values: ir.Value) -> ir.Value:
    kind = ir.FunctionType(result, [value.type for value in values])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), values)


def _constant(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _load(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    value = b.load(b.inttoptr(address, kind.as_pointer()))
    value.align = 1
    return value


def _repeat(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    vector = ir.VectorType(value.type, 8)
    vector = b.insert_element(ir.Constant(vector, ir.Undefined), value, _I32(0))
    return b.shuffle_vector(vector, vector, _constant(ir.VectorType(_I32, 8), 0))


# --- float32 --------------------------------------------------------------------------------------


@_operation(Floats())
def zeros(b):
    """Return eight zeros."""
    return _constant(Floats.ir, 0.0)


@_operation(Floats(types.float32))
def repeat(b, x):
    """Return a number eight times."""
    return _repeat(b, x)


@_operation(Floats(intp))
def repeat_at(b, address):
    """Load one float32, and return it eight times."""
    return _repeat(b, _load(b, address, _F32))


@_operation(Floats(intp))
def load_f32(b, address):
    """Load eight float32."""
    return _load(b, address, Floats.ir)


@_operation(Floats(intp))
def load_f16(b, address):
    """Load eight float16, which are finite, and convert them to float32."""
    if HAS_F16C:
        return b.fpext(_load(b, address, ir.VectorType(ir.HalfType(), 8)), Floats.ir)
    # The exponent moves to its place in a float32; its bias differs by 112.
    bits = b.zext(_load(b, address, ir.VectorType(_I16, 8)), Ints.ir)
    size = b.shl(b.and_(bits, _constant(Ints.ir, 0x7FFF)), _constant(Ints.ir, 13))
    size = b.fmul(b.bitcast(size, Floats.ir), _constant(Floats.ir, 2.0**112))
    sign = b.shl(b.and_(bits, _constant(Ints.ir, 0x8000)), _constant(Ints.ir, 16))
    return b.bitcast(b.or_(b.bitcast(size, Ints.ir), sign), Floats.ir)


@_operation(Floats(intp))
def load_bf16(b, address):
    """Load eight bfloat16 and convert them to float32: their bits are the upper half."""
    bits = b.zext(_load(b, address, ir.VectorType(_I16, 8)), Ints.ir)
    return b.bitcast(b.shl(bits, _constant(Ints.ir, 16)), Floats.ir)


@_operation(types.void(intp, Floats))
def store_f32(b, address, x):
    """Store eight float32."""
    b.store(x, b.inttoptr(address, Floats.ir.as_pointer())).align = 1


@_operation(Floats(Ints))
def to_f32(b, x):
    """Convert eight int32 to float32."""
    return b.sitofp(x, Floats.ir)


@_operation(Floats(Floats, Floats))
def add(b, x, y):
    """Return x + y."""
    return b.fadd(x, y)


@_operation(Floats(Floats, Floats))
def mul(b, x, y):
    """Return x * y."""
    return b.fmul(x, y)


@_operation(Floats(Floats, Floats, Floats))
def fma(b, x, y, z):
    """Return x * y + z, rounded once."""
    return _call(b, "llvm.fma.v8f32", Floats.ir, x, y, z)


@_operation(types.int32(types.float32))
def float_bits(b, x):
    """Return the bits of a float32."""
    return b.bitcast(x, _I32)


@_operation(types.float32(types.int32))
def float_from_bits(b, x):
    """Return the float32 with these bits."""
    return b.bitcast(x, _F32)


# --- bytes ----------------------------------------------------------------------------------------


@_operation(Bytes(intp))
def load_bytes(b, address):
    """Load 32 bytes."""
    return _load(b, address, Bytes.ir)


@_operation(Bytes(Bytes))
def low_bits(b, x):
    """Return the lower four bits of each byte."""
    return b.and_(x, _constant(Bytes.ir, 15))


@_operation(Bytes(Bytes))
def high_bits(b, x):
    """Return the upper four bits of each byte."""
    return b.lshr(x, _constant(Bytes.ir, 4))


@_operation(types.void(intp))
def prefetch(b, address):
    """Start to load the cache line at an address."""
    pointer = b.inttoptr(address, _BYTE_POINTER)
    _call(b, "llvm.prefetch.p0", ir.VoidType(), pointer, _I32(0), _I32(3), _I32(1))


def _dot4(b: ir.IRBuilder, total: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    """Add the products of four neighbouring bytes to each of eight int32."""
    if HAS_VNNI:
        return _call(b, "llvm.x86.avx512.vpdpbusd.256", Ints.ir, total, unsigned, signed)
    if HAS_AVX2:
        pairs = _call(b, "llvm.x86.avx2.pmadd.ub.sw", _SHORTS, unsigned, signed)
        ones = _constant(_SHORTS, 1)
        return b.add(total, _call(b, "llvm.x86.avx2.pmadd.wd", Ints.ir, pairs, ones))
    wide = ir.VectorType(_I32, 32)
    products = b.mul(b.zext(unsigned, wide), b.sext(signed, wide))
    for k in range(4):
        lanes = ir.Constant(ir.VectorType(_I32, 8), [4 * i + k for i in range(8)])
        total = b.add(total, b.shuffle_vector(products, products, lanes))
    return total


def _four_bytes(b: ir.IRBuilder, address: ir.Value, k: int) -> ir.Value:
    """Return the four bytes at address + 4k, eight times."""
    word = _load(b, b.add(address, _I64(4 * k)), _I32)
    return b.bitcast(_repeat(b, word), Bytes.ir)


@_operation(Ints(*[Bytes] * 8, intp))
def dot_unsigned4(b, *values):
    """Return the products of eight rows of 32 unsigned 4-bit integers with one row of int8.

    Args: eight vectors, of which vector k has the integers 4k to 4k + 3 of each row; and the
    address of the row of 32 int8, each from -127 to 127.
    """
    *rows, x = values
    if HAS_AVX2 and not HAS_VNNI:
        # Sums of int16: at most 8 * 2 * 15 * 127 = 30480, which does not overflow.
        pairs = _constant(_SHORTS, 0)
        for k, row in enumerate(rows):
            products = _call(b, "llvm.x86.avx2.pmadd.ub.sw", _SHORTS, row, _four_bytes(b, x, k))
            pairs = b.add(pairs, products)
        return _call(b, "llvm.x86.avx2.pmadd.wd", Ints.ir, pairs, _constant(_SHORTS, 1))
    total = _constant(Ints.ir, 0)
    for k, row in enumerate(rows):
        total = _dot4(b, total, row, _four_bytes(b, x, k))
    return total


@_operation(Ints(*[Bytes] * 8, intp))
def dot_signed8(b, *values):
    """Return the products of eight rows of 32 int8, from -127 to 127, with one row of int8.

    The arguments are those of `dot_unsigned4`. The instructions multiply unsigned with signed
    bytes: x * w = |x| * (w with the sign of x).
    """
    *rows, x = values
    total = _constant(Ints.ir, 0)
    zero = _constant(Bytes.ir, 0)
    for k, row in enumerate(rows):
        four = _four_bytes(b, x, k)
        size = _call(b, "llvm.abs.v32i8", Bytes.ir, four, _I1(0))
        if HAS_AVX2:
            row = _call(b, "llvm.x86.avx2.psign.b", Bytes.ir, row, four)
        else:
            row = b.select(b.icmp_signed("<", four, zero), b.sub(zero, row), row)
        total = _dot4(b, total, size, row)
    return total
