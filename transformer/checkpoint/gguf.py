"""Reading GGUF, the one-file format of llama.cpp: a header of keys, then tensors in many formats.

Follows the specification in ggml's docs/gguf.md (versions 2 and 3, little-endian). The header is
read here, because the `gguf` package takes seconds over a large vocabulary and trusts the counts
and offsets it finds; here each one is checked against the size of the file before anything is
allocated. The block formats (Q4_1, Q6_K, ...) are dequantised by the `gguf` package.
"""

from __future__ import annotations

import mmap
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
_SAMPLING_KEYS = {  # of `general.sampling.` -> of generation_config.json
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


@dataclass(frozen=True)
class LazyTensor:
    """One tensor of a file: its shape, and a reader of a range of its rows."""

    shape: tuple[int, ...]  # outermost axis first, as NumPy has it
    read: Callable[[int, int], np.ndarray]  # (start, stop) -> float32 [stop - start, ...]


class _Reader:
    """A cursor over the mapped file that refuses to step past its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.offset = data, path, 0

    def take(self, size: int, what: str) -> bytes:
        if size > len(self.data) - self.offset:
            raise ValueError(f"{self.path}: cut short or damaged: {what} needs {size} bytes more")
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def string(self, what: str) -> bytes:
        return self.take(self.number("<Q", what), what)

    def count(self, what: str, smallest: int) -> int:
        """A number of items, each of which takes at least `smallest` bytes of what is left."""
        count = self.number("<Q", what)
        if count * smallest > len(self.data) - self.offset:
            raise ValueError(f"{self.path}: damaged: {count} {what} cannot fit in the file")
        return count

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what).decode("utf-8", "replace")
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind != _ARRAY:
            raise ValueError(f"{self.path}: {what} has the unknown value type {kind}")
        kind = self.number("<I", what)
        if kind == _STRING:
            # Raw bytes: half a million tokens and merges are not worth decoding one by one.
            return [self.string(what) for _ in range(self.count(what, 8))]
        if kind not in _SCALARS:
            raise ValueError(f"{self.path}: {what} is an array of the unknown value type {kind}")
        form = np.dtype(_SCALARS[kind].replace("B", "u1").replace("b", "i1"))
        count = self.count(what, form.itemsize)
        return np.frombuffer(self.take(count * form.itemsize, what), form).tolist()


def read(path: Path) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Reads the header of a GGUF file; tensors are read from the mapped file when asked for.

    Returns:
        The metadata (strings as str, arrays of strings as lists of bytes), and the tensors by name.

    Raises:
        ValueError: not a GGUF file, or one whose counts, offsets or types cannot be true.
    """
    import gguf  # heavy; only this function needs it

    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file (it does not begin with the letters GGUF)")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header = _Reader(data, path)
    header.take(4, "magic")
    if (version := header.number("<I", "version")) not in (2, 3):
        raise ValueError(f"{path}: GGUF version must be 2 or 3, got {version}")
    num_tensors = header.count("tensors", 24)
    metadata: dict[str, Any] = {}
    for _ in range(header.count("metadata keys", 13)):
        key = header.string("key").decode("utf-8", "replace")
        if key in metadata:
            raise ValueError(f"{path}: the key {key!r} stands twice")
        metadata[key] = header.value(header.number("<I", key), key)

    places: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_tensors):
        name = header.string("tensor name").decode("utf-8", "replace")
        num_axes = header.number("<I", name)
        if not 1 <= num_axes <= 4:
            raise ValueError(f"{path}: tensor {name!r} has {num_axes} axes")
        shape = tuple(header.number("<Q", name) for _ in range(num_axes))[::-1]
        kind, offset = header.number("<I", name), header.number("<Q", name)
        if 0 in shape:
            raise ValueError(f"{path}: tensor {name!r} has the shape {shape}")
        if name in places:
            raise ValueError(f"{path}: the tensor {name!r} stands twice")
        places[name] = shape, kind, offset

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
        raise ValueError(f"{path}: general.alignment must be a multiple of 8, got {alignment!r}")
    start = -(-header.offset // alignment) * alignment

    tensors = {}
    for name, (shape, kind, offset) in places.items():
        try:
            quantisation = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(f"{path}: tensor {name!r} has the unknown format {kind}") from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
        if shape[-1] % block:
            raise ValueError(f"{path}: rows of {name!r} are not whole blocks of {block}")
        row_bytes = shape[-1] // block * block_bytes
        num_rows = int(np.prod(shape[:-1], dtype=object))
        if offset % alignment or start + offset + num_rows * row_bytes > len(data):
            raise ValueError(f"{path}: cut short or damaged: {name!r} ends behind the file's end")
        raw = np.frombuffer(data, np.uint8, num_rows * row_bytes, start + offset)
        tensors[name] = LazyTensor(
            shape, _row_reader(raw.reshape(num_rows, row_bytes), shape, quantisation)
        )
    return metadata, tensors


def sampling_defaults(metadata: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of `general.sampling.*` by the keys of generation_config.json.

    A float32 becomes the shortest decimal that it was written as: 0.7, not 0.699999988.

    Returns:
        The settings, unchecked; and the keys of that section without a counterpart.
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


def _row_reader(raw: np.ndarray, shape: tuple[int, ...], quantisation: Any):
    if len(shape) > 2:
        raise ValueError(f"tensors of {len(shape)} axes do not occur in a decoder")

    def read(start: int, stop: int) -> np.ndarray:
        from gguf.quants import dequantize

        rows = raw[0] if len(shape) == 1 else raw[start:stop]
        try:
            values = dequantize(rows, quantisation).astype(np.float32)
        except NotImplementedError as error:
            raise ValueError(f"weights of the format {quantisation.name} cannot be read") from error
        return values[start:stop] if len(shape) == 1 else values  # one axis: one row is all of it

    return read
