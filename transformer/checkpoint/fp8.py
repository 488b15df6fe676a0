"""Read FP8 checkpoints of Hugging Face: weights in 8-bit floats, and their scales.

A weight is the product of its 8-bit floats and their scales: one scale per tensor, per row, or per
block of 128 x 128. Despite their names, `NAME.weight_scale_inv` (DeepSeek, Qwen3) and
`NAME.weight_scale` (compressed-tensors, FBGEMM) are both multiplied with the weight. Scales of
activations are ignored, because weights are dequantized when they are read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from transformer.checkpoint.gguf import LazyTensor

log = logging.getLogger(__name__)

_SCALES = (".weight_scale_inv", ".weight_scale")
_ACTIVATION_SCALES = (
    ".input_scale",
    ".activation_scale",
    ".input_scale_ub",
    ".k_scale",
    ".v_scale",
)


def dequantize(
    config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]
) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Return a config without its FP8 quantization, and tensors multiplied by their scales.

    If the config has no quantization, or another one, config and tensors are returned unchanged.

    Args:
        config: Content of config.json.
        tensors: Tensors by name.

    Raises:
        ValueError: A scale has no weight, its shape does not fit the shape of the weight, or a
            tensor in 8-bit floats has no scale.
    """
    config, tensors = dict(config), dict(tensors)
    key = "quantization_config"
    quantization = config.get(key)
    if not isinstance(quantization, Mapping) or not _is_fp8(quantization):
        return config, tensors
    del config[key]
    block = quantization.get("weight_block_size")
    ignored = [name for name in tensors if name.endswith(_ACTIVATION_SCALES)]
    for name in ignored:
        del tensors[name]
    if ignored:
        log.warning("ignoring %d scales of activations, such as %s", len(ignored), ignored[0])
    scaled: set[str] = set()
    for name in [name for name in tensors if name.endswith(_SCALES)]:
        scale = tensors.pop(name)
        weight_name = f"{name[: name.rindex('.')]}.weight"
        if (weight := tensors.get(weight_name)) is None:
            raise ValueError(
                f"{scale.path}: {name} is the scale of {weight_name}, which is missing"
            )
        tensors[weight_name] = _scaled(weight, scale, name, block)
        scaled.add(weight_name)
    for name, tensor in tensors.items():
        if tensor.dtype.startswith("F8_") and name not in scaled:
            raise ValueError(
                f"{tensor.path}: {name!r} has the dtype {tensor.dtype}, but its scale is missing: "
                f"expected {' or '.join(name.removesuffix('.weight') + scale for scale in _SCALES)}"
            )
    return config, tensors


def _is_fp8(quantization: Mapping[str, Any]) -> bool:
    """Return whether a `quantization_config` describes weights in 8-bit floats."""
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        return quantization.get("format") in ("float-quantized", "naive-quantized")
    if method == "modelopt":
        return quantization.get("quant_algo") == "FP8"
    return method in ("fp8", "fbgemm_fp8")


def _scaled(weight: LazyTensor, scale: LazyTensor, name: str, block: Any) -> LazyTensor:
    """Return a weight [out, in] that is multiplied by its scale when it is read."""
    if len(weight.shape) != 2:
        raise ValueError(
            f"{weight.path}: expected a weight with two axes for the scale {name}, got the shape "
            f"{weight.shape}"
        )
    num_rows, num_columns = weight.shape
    shape = scale.shape if len(scale.shape) == 2 else (*scale.shape, 1) if scale.shape else (1, 1)
    if shape == (1, 1):
        block = None
    try:
        rows, columns = (
            map(int, block) if block is not None else (-(-num_rows // shape[0]), num_columns)
        )
        expected = (math.ceil(num_rows / rows), math.ceil(num_columns / columns))
    except (TypeError, ValueError, ZeroDivisionError):
        raise ValueError(
            f"{scale.path.parent / 'config.json'}: weight_block_size must be two positive "
            f"integers, got {block!r}"
        ) from None
    if shape != expected or (block is None and shape[0] not in (1, num_rows)):
        raise ValueError(
            f"{scale.path}: {name} must have the shape {expected} for a weight of shape "
            f"{weight.shape}, got {scale.shape}"
        )
    factors = scale.read(0, scale.shape[0] if scale.shape else 1).reshape(shape)
    column_index = np.arange(num_columns) // columns

    def read(start: int, stop: int) -> np.ndarray:
        row_index = np.arange(start, stop) // rows
        return weight.read(start, stop) * factors[row_index][:, column_index]

    return LazyTensor(weight.shape, read, weight.path, weight.dtype)
