"""Read GGUF, the single-file format of llama.cpp: a header of keys, then tensors.

Follows the specification in ggml's docs/gguf.md (versions 2 and 3, little-endian). This file parses
the header itself, because the `gguf` package takes seconds for a large vocabulary and does not
check counts and offsets. Here each count and offset is checked against the size of the file before
memory is allocated. The `gguf` package dequantizes the block formats (Q4_1, Q6_K, ...).
"""

from __future__ import annotations

import functools
import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
    10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")
_SAMPLING_KEYS = {  # key after `general.sampling.` -> key of generation_config.json
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file whose data is not read yet; `read` reads a range of its first axis."""

    shape: tuple[int, ...]  # outermost axis first, as in NumPy
    read: Callable[[int, int], np.ndarray]  # (start, stop) -> float32 [stop - start, ...]
    path: Path  # the file, for error messages
    dtype: str = ""  # the dtype in the file, as the file format names it: "BF16", "Q4_K"
    # (start, stop) -> the bytes of these rows as in the file, uint8 [stop - start, bytes per row];
    # None if the file does not store a matrix row by row.
    read_raw: Callable[[int, int], np.ndarray] | None = None


class _Reader:
    """A cursor over the mapped file that raises instead of reading past its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.offset = data, path, 0

    def take(self, size: int, item: str) -> bytes:
        """Return the next `size` bytes; `item` describes them in error messages."""
        if size > len(self.data) - self.offset:
            raise ValueError(
                f"{self.path}: truncated or damaged: {item} needs {size} bytes, but the file ends "
                f"after {len(self.data) - self.offset}"
            )
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def number(self, struct_format: str, item: str) -> Any:
        return struct.unpack(struct_format, self.take(struct.calcsize(struct_format), item))[0]

    def string(self, item: str) -> bytes:
        return self.take(self.number("<Q", item), item)

    def count(self, item: str, min_bytes: int) -> int:
        """Read and return the number of items that follow.

        `item` names the items in error messages. An item has at least `min_bytes` bytes, so more
        items than fit in the rest of the file are an error.
        """
        count = self.number("<Q", item)
        if count * min_bytes > len(self.data) - self.offset:
            raise ValueError(f"{self.path}: damaged: {count} {item} do not fit in the file")
        return count

    def value(self, kind: int, item: str) -> Any:
        """Read and return a metadata value; `kind` is its GGUF type number, `item` names it."""
        if kind == _STRING:
            return self.string(item).decode("utf-8", "replace")
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], item)
        if kind != _ARRAY:
            raise ValueError(f"{self.path}: {item} has the unknown value type {kind}")
        kind = self.number("<I", item)
        if kind == _STRING:
            # Keep bytes: decoding half a million tokens and merges one by one is slow.
            return [self.string(item) for _ in range(self.count(item, 8))]
        if kind not in _SCALARS:
            raise ValueError(f"{self.path}: {item} is an array of the unknown value type {kind}")
        dtype = np.dtype(_SCALARS[kind].replace("B", "u1").replace("b", "i1"))
        count = self.count(item, dtype.itemsize)
        return np.frombuffer(self.take(count * dtype.itemsize, item), dtype).tolist()


def _open(path: Path) -> _Reader:
    """Open a GGUF file, and return a reader that is positioned after the magic bytes."""
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path}: expected a GGUF file, which begins with the bytes 'GGUF'")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header = _Reader(data, path)
    header.take(4, "magic")
    return header


def split_files(path: Path) -> list[Path]:
    """Return the paths of all files of a split model: NAME-00001-of-00003.gguf, ...

    Args:
        path: The path of any of the files.

    Returns:
        The paths in order, whether or not the files exist; `path` alone if its name has no number.
    """
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or not 1 <= int(match["no"]) <= int(match["count"]):
        return [path]
    count = int(match["count"])
    return [
        path.with_name(f"{match['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)
    ]


def read(path: Path) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Read the headers of a GGUF model; tensors are read lazily from the mapped files.

    Args:
        path: The GGUF file; for a split model the first file, which has the metadata.

    Returns:
        The metadata (strings as str, arrays of strings as lists of bytes), and the tensors by name.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is not a GGUF file, a count, offset or type in it is invalid, or it does
            not belong to the other files.
    """
    metadata, tensors = _read_file(path)
    split = {key: metadata.pop(key) for key in list(metadata) if key.startswith("split.")}
    count = split.get("split.count", 1)
    if count in (0, 1):
        return metadata, tensors
    files = split_files(path)
    if split.get("split.no") != 0:
        raise ValueError(
            f"{path}: expected the first file of a split model (split.no 0), got split.no "
            f"{split.get('split.no')!r}; use {files[0].name}"
        )
    if len(files) != count:
        raise ValueError(
            f"{path}: split.count is {count!r}, so the files must have the names "
            f"NAME-00001-of-{count:05}.gguf and so on"
            if isinstance(count, int)
            else f"{path}: split.count must be an integer, got {count!r}"
        )
    for number, file in enumerate(files[1:], 1):
        if not file.is_file():
            raise FileNotFoundError(f"{path}: the part {file.name} is missing from the folder")
        part, more = _read_file(file)
        if (part.get("split.no"), part.get("split.count")) != (number, count):
            raise ValueError(
                f"{file}: split.no and split.count are {part.get('split.no')!r} and "
                f"{part.get('split.count')!r}, expected {number} and {count}"
            )
        if duplicates := sorted(more.keys() & tensors.keys()):
            raise ValueError(f"{file}: the tensor {duplicates[0]!r} is in two files")
        tensors |= more
    if (total := split.get("split.tensors.count")) not in (None, len(tensors)):
        raise ValueError(
            f"{path}: expected {total!r} tensors (split.tensors.count), but the {count} files have "
            f"{len(tensors)}; a file belongs to another model"
        )
    return metadata, tensors


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Return the metadata and the tensors of one file of a model."""
    import gguf  # imported here because it is slow to import

    header = _open(path)
    if (version := header.number("<I", "version")) not in (2, 3):
        raise ValueError(f"{path}: GGUF version must be 2 or 3, got {version}")
    num_tensors = header.count("tensors", 24)
    metadata: dict[str, Any] = {}
    for _ in range(header.count("metadata keys", 13)):
        key = header.string("key").decode("utf-8", "replace")
        if key in metadata:
            raise ValueError(f"{path}: the key {key!r} occurs twice")
        metadata[key] = header.value(header.number("<I", key), key)

    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}  # name -> shape, type, offset
    for _ in range(num_tensors):
        name = header.string("tensor name").decode("utf-8", "replace")
        num_axes = header.number("<I", name)
        if not 1 <= num_axes <= 4:
            raise ValueError(f"{path}: tensor {name!r} must have 1 to 4 axes, got {num_axes}")
        shape = tuple(header.number("<Q", name) for _ in range(num_axes))[::-1]
        kind, offset = header.number("<I", name), header.number("<Q", name)
        if 0 in shape:
            raise ValueError(
                f"{path}: tensor {name!r} must have positive sizes, got the shape {shape}"
            )
        if name in entries:
            raise ValueError(f"{path}: the tensor {name!r} occurs twice")
        entries[name] = shape, kind, offset

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
        raise ValueError(f"{path}: general.alignment must be a multiple of 8, got {alignment!r}")
    start = -(-header.offset // alignment) * alignment

    tensors = {}
    for name, (shape, kind, offset) in entries.items():
        try:
            quantization = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(f"{path}: tensor {name!r} has the unknown type {kind}") from None
        if not _can_dequantize(quantization):
            raise ValueError(
                f"{path}: weights of type {quantization.name} are not supported ({name!r})"
            )
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
        if shape[-1] % block:
            raise ValueError(
                f"{path}: rows of {name!r} must be a multiple of {block}, got {shape[-1]}"
            )
        row_bytes = shape[-1] // block * block_bytes
        num_rows = int(np.prod(shape[:-1], dtype=object))
        if offset % alignment or start + offset + num_rows * row_bytes > len(header.data):
            raise ValueError(f"{path}: truncated or damaged: {name!r} exceeds the file")
        raw = np.frombuffer(header.data, np.uint8, num_rows * row_bytes, start + offset)
        if len(shape) > 3:
            raise ValueError(
                f"{path}: tensor {name!r} must have 1 to 3 axes in a decoder, got {len(shape)}"
            )
        raw = raw.reshape(num_rows, row_bytes)
        tensors[name] = LazyTensor(
            shape,
            _row_reader(raw, shape, quantization),
            path,
            quantization.name,
            _raw_reader(raw) if len(shape) == 2 else None,
        )
    return metadata, tensors


def read_metadata_head(path: Path) -> dict[str, Any]:
    """Return the metadata before the first tokenizer key, because a vocabulary takes long to read.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not a GGUF file, or is damaged.
    """
    header = _open(path)
    header.take(4, "version")
    header.count("tensors", 24)
    metadata: dict[str, Any] = {}
    for _ in range(header.count("metadata keys", 13)):
        key = header.string("key").decode("utf-8", "replace")
        if key.startswith("tokenizer."):
            break
        metadata[key] = header.value(header.number("<I", key), key)
    return metadata


def sampling_defaults(metadata: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert the keys `general.sampling.*` to the keys of generation_config.json.

    A float32 is rounded to 7 digits: 0.7, not 0.699999988.

    Args:
        metadata: Metadata of a GGUF file.

    Returns:
        The parameters by keys of generation_config.json, which are not validated, and the
        parameters that have no such key, by their GGUF keys.
    """
    settings, others = {}, {}
    for key, value in metadata.items():
        if not key.startswith("general.sampling."):
            continue
        if isinstance(value, float):
            value = float(f"{value:.7g}")
        if (name := _SAMPLING_KEYS.get(key.removeprefix("general.sampling."))) is None:
            others[key] = value
        else:
            settings[name] = value
    return settings, others


@functools.cache
def _can_dequantize(quantization: Any) -> bool:
    """Whether the `gguf` package can dequantize a type (not types of integers or activations)."""
    import gguf

    _, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), quantization)
    except NotImplementedError:
        return False
    return True


def _raw_reader(raw: np.ndarray) -> Callable[[int, int], np.ndarray]:
    """Return the function `LazyTensor.read_raw` of a matrix; the arguments are of `_row_reader`."""
    return lambda start, stop: raw[start:stop]


def _row_reader(
    raw: np.ndarray, shape: tuple[int, ...], quantization: Any
) -> Callable[[int, int], np.ndarray]:
    """Return the function `LazyTensor.read` of a tensor.

    Args:
        raw: The bytes of the tensor, uint8 [rows, bytes per row]; the rows are those of the last
            axis.
        shape: The shape of the tensor.
        quantization: The `GGMLQuantizationType` of the tensor.
    """
    inner = math.prod(shape[1:-1])  # rows of numbers per item of the first axis

    def read(start: int, stop: int) -> np.ndarray:
        from gguf.quants import dequantize

        rows = raw[0] if len(shape) == 1 else raw[start * inner : stop * inner]
        values = dequantize(rows, quantization).astype(np.float32)
        if len(shape) == 1:  # a vector is stored as one row
            return values[start:stop]
        return values.reshape(-1, *shape[1:])

    return read
