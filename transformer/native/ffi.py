"""Call Numba functions from XLA programs: the C interface of `jax.ffi`, memory access and threads.

XLA calls a C function with one pointer, the *call frame*: a struct with the addresses of operands
and results. Numba compiles Python functions to such C functions (`numba.cfunc`). This module
mirrors the structs in `ctypes`, so that a field is an offset, and reads memory at an address.

Machine code is cached on disk, in a folder of its own for each version of the sources: Numba checks
the file of a function, but not the files of the functions that it calls.

Work is split into chunks. Every thread that has time claims the next chunk with an atomic counter:
the calling thread, and the threads of XLA's own pool, which `start_helpers` asks for. Nobody waits
for a helper that has not started, so a call finishes even if the pool is busy with other work.

After xla/ffi/api/c_api.h, which `jax.ffi.include_dir()` contains.
"""

# Numba's intrinsics and the values of llvmlite have no types.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportReturnType=false, reportAssignmentType=false, reportPrivateImportUsage=false

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import jax
import llvmlite.binding as llvm
import llvmlite.ir as ir
import numba as nb
import numpy as np
import platformdirs
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

log = logging.getLogger(__name__)


def _use_cache_folder() -> bool:
    """Make Numba cache in a folder for this version of the sources; return whether it can.

    The environment variable NUMBA_CACHE_DIR chooses another parent folder.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    version = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    parent = os.environ.get("NUMBA_CACHE_DIR") or platformdirs.user_cache_path("pellucid")
    folder = Path(parent) / "native" / version
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        log.warning("native kernels are compiled at every start, because of: %s", error)
        return False
    nb.config.CACHE_DIR = str(folder)
    return True


I64, I32, F32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
intp = types.intp
# Options of every kernel: no exceptions, so that 1 / 0 is infinity; machine code cached on disk.
CACHE = _use_cache_folder()
JIT: dict[str, Any] = dict(nogil=True, error_model="numpy", cache=CACHE)
# Sums in any order. Only for loops over one row, so that results do not depend on other rows.
FAST = {"reassoc", "nnan", "ninf", "nsz", "contract"}
MAX_THREADS = 16

# --- the structs of XLA_FFI_API_MAJOR 0 -----------------------------------------------------------
_SIZE, _POINTER, _INT64, _INT = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_HEADER = [("struct_size", _SIZE), ("extension_start", _POINTER)]


class ApiVersion(ctypes.Structure):
    """XLA_FFI_Api_Version."""

    _fields_ = [*_HEADER, ("major_version", _INT), ("minor_version", _INT)]


class Metadata(ctypes.Structure):
    """XLA_FFI_Metadata, up to the fields used here."""

    _fields_ = [("struct_size", _SIZE), ("api_version", ApiVersion), ("traits", ctypes.c_uint32)]


class MetadataExtension(ctypes.Structure):
    """XLA_FFI_Metadata_Extension, with the XLA_FFI_Extension_Base at its beginning."""

    _fields_ = [("struct_size", _SIZE), ("type", _INT), ("next", _POINTER), ("metadata", _POINTER)]


class Buffer(ctypes.Structure):
    """XLA_FFI_Buffer."""

    _fields_ = [*_HEADER, ("dtype", _INT), ("data", _POINTER), ("rank", _INT64), ("dims", _POINTER)]


class Args(ctypes.Structure):
    """XLA_FFI_Args, and XLA_FFI_Rets, which has the same fields."""

    _fields_ = [*_HEADER, ("size", _INT64), ("types", _POINTER), ("args", _POINTER)]


class CallFrame(ctypes.Structure):
    """XLA_FFI_CallFrame, up to the fields used here."""

    _fields_ = [
        *_HEADER,
        ("api", _POINTER),
        ("ctx", _POINTER),
        ("stage", _INT),
        ("args", Args),
        ("rets", Args),
    ]


class Api(ctypes.Structure):
    """XLA_FFI_Api, up to the functions used here."""

    _fields_ = [
        *_HEADER,
        ("api_version", ApiVersion),
        ("internal_api", _POINTER),
        ("XLA_FFI_Error_Create", _POINTER),
        ("XLA_FFI_Error_GetMessage", _POINTER),
        ("XLA_FFI_Error_Destroy", _POINTER),
        ("XLA_FFI_Handler_Register", _POINTER),
        ("XLA_FFI_Stream_Get", _POINTER),
        ("XLA_FFI_Type_Register", _POINTER),
        ("XLA_FFI_ExecutionContext_Get", _POINTER),
        ("XLA_FFI_State_Set", _POINTER),
        ("XLA_FFI_State_Get", _POINTER),
        ("XLA_FFI_DeviceMemory_Allocate", _POINTER),
        ("XLA_FFI_DeviceMemory_Free", _POINTER),
        ("XLA_FFI_ThreadPool_Schedule", _POINTER),
        ("XLA_FFI_ThreadPool_NumThreads", _POINTER),
    ]


def _offset(struct: type[ctypes.Structure], *path: str) -> int:
    """Return the offset of a field of a struct, or of a field of a struct in it."""
    offset, kinds = 0, struct
    for name in path:
        offset += getattr(kinds, name).offset
        kinds = dict((field[0], field[1]) for field in kinds._fields_)[name]
    return offset


_METADATA = _offset(MetadataExtension, "metadata")
_MAJOR = _offset(Metadata, "api_version", "major_version")
_MINOR = _offset(Metadata, "api_version", "minor_version")
_TRAITS = _offset(Metadata, "traits")
_EXTENSION = _offset(CallFrame, "extension_start")
_API, _CTX = _offset(CallFrame, "api"), _offset(CallFrame, "ctx")
_ARGS, _RETS = _offset(CallFrame, "args", "args"), _offset(CallFrame, "rets", "args")
_DATA, _RANK = _offset(Buffer, "data"), _offset(Buffer, "rank")
_DIMS = _offset(Buffer, "dims")
_API_MINOR = _offset(Api, "api_version", "minor_version")
_SCHEDULE = _offset(Api, "XLA_FFI_ThreadPool_Schedule")
_NUM_THREADS = _offset(Api, "XLA_FFI_ThreadPool_NumThreads")

# --- memory at an address -------------------------------------------------------------------------


def _pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def peek(_context, address):
    """Return the 64-bit word at an address."""
    return intp(intp), lambda c, b, sig, a: b.load(_pointer(b, a[0], I64))


@intrinsic
def poke(_context, address, value):
    """Store a 64-bit word at an address."""

    def emit(context, b, sig, a):
        b.store(a[1], _pointer(b, a[0], I64))
        return context.get_dummy_value()

    return types.void(intp, intp), emit


@intrinsic
def _poke_int(_context, address, value):
    """Store a C int at an address."""

    def emit(context, b, sig, a):
        b.store(b.trunc(a[1], I32), _pointer(b, a[0], I32))
        return context.get_dummy_value()

    return types.void(intp, intp), emit


@intrinsic
def _peek_int(_context, address):
    """Return the C int at an address."""
    return intp(intp), lambda c, b, sig, a: b.sext(b.load(_pointer(b, a[0], I32)), I64)


@intrinsic
def fetch_add(_context, address, value):
    """Atomically add to a 64-bit word, and return its previous value."""
    return intp(intp, intp), lambda c, b, sig, a: b.atomic_rmw(
        "add", _pointer(b, a[0], I64), a[1], "seq_cst"
    )


@intrinsic
def load_atomic(_context, address):
    """Return a 64-bit word, and see all that was written before it was."""
    return intp(intp), lambda c, b, sig, a: b.load_atomic(_pointer(b, a[0], I64), "seq_cst", 8)


@intrinsic
def _call(_context, function, argument):
    """Call a C function with one pointer, which returns a pointer."""
    kind = ir.FunctionType(I64, [I64])
    return intp(intp, intp), lambda c, b, sig, a: b.call(_pointer(b, a[0], kind), [a[1]])


@intrinsic
def _void_pointer(_context, address):
    return types.voidptr(intp), lambda c, b, sig, a: _pointer(b, a[0], ir.IntType(8))


@intrinsic
def _pause(_context):
    """Tell the core that this thread waits in a loop."""

    def emit(context, b, sig, a):
        if platform.machine() in ("x86_64", "AMD64"):
            kind, name, arguments = ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause", []
        else:
            kind = ir.FunctionType(ir.VoidType(), [I32])
            name, arguments = "llvm.aarch64.hint", [I32(1)]
        b.call(cgutils.get_or_insert_function(b.module, kind, name), arguments)
        return context.get_dummy_value()

    return types.void(), emit


def _array(dtype: type):
    @nb.njit(forceinline=True)
    def view(address, count):
        return nb.carray(_void_pointer(address), (count,), dtype)

    return view


# view(address, count): the numbers at an address as an array.
view_f32, view_i32 = _array(np.float32), _array(np.int32)
view_i8, view_u16 = _array(np.int8), _array(np.uint16)

_malloc = types.ExternalFunction("malloc", intp(intp))
_free = types.ExternalFunction("free", types.void(intp))
_sched_yield = types.ExternalFunction("sched_yield", types.int32())

# --- the call frame -------------------------------------------------------------------------------


@nb.njit(**JIT)
def is_metadata_call(frame):
    """Return whether XLA asks for the version of the interface, after writing the answer."""
    extension = peek(frame + _EXTENSION)
    if extension == 0:
        return False
    metadata = peek(extension + _METADATA)
    _poke_int(metadata + _MAJOR, 0)
    # Of the minor version, nothing newer than the thread pool is used: answer with XLA's own.
    _poke_int(metadata + _MINOR, _peek_int(peek(frame + _API) + _API_MINOR))
    _poke_int(metadata + _TRAITS, 0)
    return True


@nb.njit(**JIT)
def operand(frame, i):
    """Return the address of the data of operand i."""
    return peek(peek(peek(frame + _ARGS) + 8 * i) + _DATA)


@nb.njit(**JIT)
def operand_dim(frame, i, axis):
    """Return the size of an axis of operand i."""
    return peek(peek(peek(peek(frame + _ARGS) + 8 * i) + _DIMS) + 8 * axis)


@nb.njit(**JIT)
def operand_rank(frame, i):
    """Return the number of axes of operand i."""
    return peek(peek(peek(frame + _ARGS) + 8 * i) + _RANK)


@nb.njit(**JIT)
def result(frame, i):
    """Return the address of the data of result i."""
    return peek(peek(peek(frame + _RETS) + 8 * i) + _DATA)


# --- jobs: work in phases of chunks ---------------------------------------------------------------
# A job is memory that all threads of a call share. Two counters of each phase stand in cache lines
# of their own, so that threads do not slow down each other.
_REFERENCES, _THREADS, _COUNTERS, _LINE = 0, 64, 128, 64


@nb.njit(**JIT)
def new_job(num_phases, num_bytes):
    """Return the address of a new job with zeroed counters, used by the calling thread alone.

    Args:
        num_phases: Number of phases.
        num_bytes: Number of bytes of `job_memory`, not initialized.
    """
    size = _COUNTERS + 2 * _LINE * num_phases
    memory = _malloc(size + num_bytes + 2 * _LINE)
    job = (memory + 16 + _LINE - 1) // _LINE * _LINE
    poke(job - 8, memory)
    poke(job - 16, num_phases)
    for at in range(job, job + size, 8):
        poke(at, 0)
    poke(job + _REFERENCES, 1)
    return job


@nb.njit(**JIT)
def job_memory(job):
    """Return the address of the memory of a job, a multiple of 64."""
    return job + _COUNTERS + 2 * _LINE * peek(job - 16)


@nb.njit(**JIT)
def release(job):
    """Give up a thread's use of a job; the last thread frees it."""
    if fetch_add(job + _REFERENCES, -1) == 1:
        _free(peek(job - 8))


@nb.njit(**JIT)
def thread_index(job):
    """Return the number of this thread in the job, counted from 0. Call once in each thread."""
    return fetch_add(job + _THREADS, 1)


@nb.njit(**JIT)
def claim(job, phase):
    """Return the next chunk of a phase: 0, 1, ..., also beyond the last one."""
    return fetch_add(job + _COUNTERS + 2 * _LINE * phase, 1)


@nb.njit(**JIT)
def finish(job, phase):
    """Count a claimed chunk as finished."""
    fetch_add(job + _COUNTERS + 2 * _LINE * phase + _LINE, 1)


@nb.njit(**JIT)
def wait(job, phase, count):
    """Return when all chunks of a phase are finished."""
    spins = 0
    while load_atomic(job + _COUNTERS + 2 * _LINE * phase + _LINE) < count:
        _pause()
        spins += 1
        if spins > 4000:  # another process may need this core to let the other thread go on
            _sched_yield()


@nb.njit(**JIT)
def num_threads(frame):
    """Return the number of threads of XLA's pool, at most MAX_THREADS."""
    count = np.ones(1, np.int64)
    arguments = np.array([32, 0, peek(frame + _CTX), count.ctypes.data], np.int64)
    _call(peek(peek(frame + _API) + _NUM_THREADS), arguments.ctypes.data)
    return min(count[0], MAX_THREADS)


@nb.njit(**JIT)
def start_helpers(frame, job, task, num_helpers):
    """Ask XLA's pool to call `task(job)` in `num_helpers` threads; each must `release` the job."""
    fetch_add(job + _REFERENCES, num_helpers)
    for _ in range(num_helpers):
        arguments = np.array([40, 0, peek(frame + _CTX), task, job], np.int64)
        if _call(peek(peek(frame + _API) + _SCHEDULE), arguments.ctypes.data) != 0:
            release(job)


# --- registration ---------------------------------------------------------------------------------


def address_of(name: str, function: Any):
    """Return a Numba function without arguments that returns the address of a C function.

    The address is a symbol of the linker, because it differs from process to process while the
    machine code is cached on disk.

    Args:
        name: A unique name for the symbol.
        function: The result of `numba.cfunc`.
    """
    llvm.add_symbol(name, function.address)

    @intrinsic
    def address(_context):
        def emit(context, b, sig, a):
            kind = ir.FunctionType(ir.VoidType(), [I64])
            return b.ptrtoint(cgutils.get_or_insert_function(b.module, kind, name), I64)

        return intp(), emit

    return address


def register(name: str, function: Any) -> None:
    """Register a C function as the target `name` of `jax.ffi.ffi_call` on the CPU."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    capsule = new(function.address, b"xla._CUSTOM_CALL_TARGET", None)
    jax.ffi.register_ffi_target(name, capsule, platform="cpu", api_version=1)
