"""Weights in MXFP4, the 4-bit floats of gpt-oss, as its safetensors store them.

Each block of 32 numbers has 4-bit floats (E2M1) and a common scale, a power of two (E8M0): the OCP
Microscaling Formats specification 1.0. A weight NAME is two tensors of bytes:

    NAME_blocks [E, R, C / 32, 16]   two numbers per byte, the first one in the low bits
    NAME_scales [E, R, C / 32]       the exponent plus 127

Files without quantization have one tensor NAME [E, C, R]. The `gguf` package dequantizes MXFP4 in
GGUF files, which order the numbers of a block otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from transformer.checkpoint.gguf import LazyTensor

BLOCKS, SCALES = "_blocks", "_scales"
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_POSITIVE, *(-x for x in _POSITIVE)], np.float32)  # the high bit is the sign


def dequantize(
    config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]
) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Return a config without its MXFP4 quantization, and tensors that are dequantized when read.

    If the config has another quantization, or none, config and tensors are returned unchanged.

    Args:
        config: Content of config.json.
        tensors: Tensors by name.

    Raises:
        ValueError: Blocks have no scales, scales no blocks, or their shapes do not match.
    """
    config, tensors = dict(config), dict(tensors)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "mxfp4":
        return config, tensors
    del config["quantization_config"]
    for name in [name for name in tensors if name.endswith((BLOCKS, SCALES))]:
        stem = name.removesuffix(BLOCKS).removesuffix(SCALES)
        if stem in tensors:  # made from the other of the two
            continue
        parts = [tensors.pop(stem + suffix, None) for suffix in (BLOCKS, SCALES)]
        blocks, scales = parts
        if blocks is None or scales is None:
            other = stem + (BLOCKS if blocks is None else SCALES)
            path = next(part.path for part in parts if part is not None)
            raise ValueError(f"{path}: {name} needs {other}, which is missing")
        tensors[stem] = _dequantized(stem, blocks, scales)
    return config, tensors


def _dequantized(name: str, blocks: LazyTensor, scales: LazyTensor) -> LazyTensor:
    """Return a weight [E, C, R] that is made from its blocks and scales when it is read.

    Args:
        name: Name of the weight, for error messages.
        blocks: [E, R, C / 32, 16].
        scales: [E, R, C / 32].
    """
    if len(scales.shape) != 3 or blocks.shape != (*scales.shape, 16):
        raise ValueError(
            f"{blocks.path}: {name}{BLOCKS} must have shape (experts, rows, blocks, 16) and "
            f"{name}{SCALES} the same without the 16, got {blocks.shape} and {scales.shape}"
        )
    num_experts, num_rows, num_blocks = scales.shape

    def read(start: int, stop: int) -> np.ndarray:
        exponents = scales.read(start, stop).astype(np.int32)
        if (exponents == 255).any():
            raise ValueError(f"{scales.path}: {name}{SCALES} has a scale of 255 (NaN)")
        pairs = blocks.read(start, stop).astype(np.uint8)
        numbers = _VALUES[np.stack([pairs & 15, pairs >> 4], axis=-1)]  # [E, R, C / 32, 16, 2]
        weight = np.ldexp(numbers, exponents[..., None, None] - 127)
        return weight.reshape(stop - start, num_rows, 32 * num_blocks).swapaxes(1, 2)

    shape = (num_experts, 32 * num_blocks, num_rows)
    return LazyTensor(shape, read, blocks.path, "MXFP4")
