"""Reader of `model.bin`, the weights of CTranslate2: a flat list of named arrays.

All numbers are little-endian. A string is its length with the terminating zero (uint16), its bytes,
and the zero. The file format, from CTranslate2's `Model::load` (binary versions 5 and 6):

    uint32 version, string name of the specification, uint32 its revision,
    uint32 number of variables, then for each:
        string name, uint8 number of axes, uint32 each axis,
        uint8 type (0 float32, 1 int8, 2 int16, 3 int32, 4 float16, 5 bfloat16),
        uint32 bytes of data, the data
    uint32 number of aliases, then for each: string alias, string name of a variable

An int8 weight `NAME` has a float32 `NAME_scale`, one per row; the dequantized value is weight /
scale. Counts and sizes are checked against the file before data are read.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

_TYPES = {
    0: np.dtype("<f4"),
    1: np.dtype("i1"),
    2: np.dtype("<i2"),
    3: np.dtype("<i4"),
    4: np.dtype("<f2"),
    5: np.dtype(ml_dtypes.bfloat16),
}


def read(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Read a `model.bin`.

    Args:
        path: the file; it is memory-mapped.

    Returns:
        The name of the specification ("WhisperSpec"), and the arrays by name, aliases included.
        They are views of the mapped file; int8 weights are dequantized to float32.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: the file is damaged, or of an unsupported version.
    """
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ValueError(f"{path}: the file is empty") from None
    position = 0

    def skip(size: int, label: str) -> int:
        """Advance by `size` bytes; return the position before them. `label` is for the error."""
        nonlocal position
        if size > len(data) - position:
            raise ValueError(
                f"{path}: truncated or damaged: {label} needs {size} bytes, "
                f"{len(data) - position} are left"
            )
        position += size
        return position - size

    def number(code: str, label: str) -> int:
        return struct.unpack_from(code, data, skip(struct.calcsize(code), label))[0]

    def string(label: str) -> str:
        size = number("<H", label)
        begin = skip(size, label)
        try:
            return data[begin : begin + size].rstrip(b"\0").decode()
        except UnicodeDecodeError:
            raise ValueError(f"{path}: damaged: {label} is not UTF-8") from None

    if (version := number("<I", "the version")) not in (5, 6):
        raise ValueError(
            f"{path}: the version of CTranslate2's format must be 5 or 6, got {version}"
        )
    spec = string("the specification")
    number("<I", "its revision")
    arrays: dict[str, np.ndarray] = {}
    for _ in range(number("<I", "the number of variables")):
        name = string("the name of a variable")
        rank = number("<B", f"the shape of {name}")
        shape = struct.unpack_from(f"<{rank}I", data, skip(4 * rank, f"the shape of {name}"))
        if (kind := number("<B", f"the type of {name}")) not in _TYPES:
            raise ValueError(f"{path}: the code of the dtype of {name} must be 0 to 5, got {kind}")
        size, dtype = number("<I", f"the size of {name}"), _TYPES[kind]
        count = 1
        for axis in shape:  # not np.prod, which overflows
            count *= axis
        if size != count * dtype.itemsize:
            raise ValueError(
                f"{path}: damaged: {name} of shape {shape} must have {count * dtype.itemsize} "
                f"bytes, got {size}"
            )
        begin = skip(size, name)
        if name in arrays:
            raise ValueError(f"{path}: damaged: {name} occurs twice")
        arrays[name] = np.frombuffer(data, dtype, count, begin).reshape(shape)
    for _ in range(number("<I", "the number of aliases")):
        alias, name = string("an alias"), string("the target of an alias")
        if name not in arrays:
            raise ValueError(f"{path}: {alias} is an alias of {name}, which is missing")
        arrays[alias] = arrays[name]
    for name in [name for name in arrays if name.endswith("_scale")]:
        scale, weight = arrays.pop(name), arrays.get(name.removesuffix("_scale"))
        if weight is None or weight.dtype != np.int8 or scale.shape != weight.shape[:1]:
            raise ValueError(
                f"{path}: {name} has shape {scale.shape}, but there is no int8 weight with a row "
                f"per scale"
            )
        rows = scale.reshape(-1, *(1,) * (weight.ndim - 1)).astype(np.float32)
        arrays[name.removesuffix("_scale")] = weight / rows
    return spec, arrays
