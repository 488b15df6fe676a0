"""A tiny gpt-oss whose experts are random weights in MXFP4."""

import json

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.transformer.conftest import GOLDEN


def quantized(folder, source=GOLDEN / "gpt_oss") -> dict:
    """Write the model with random MXFP4 experts; return these by the names of unquantized files."""
    rng = np.random.default_rng(0)
    tensors, expected = load_file(source / "model.safetensors"), {}
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, columns, rows = tensors.pop(key).shape
        numbers = rng.integers(0, 16, (num_experts, rows, columns // 32, 32), np.uint8)
        scales = rng.integers(122, 127, numbers.shape[:3], np.uint8)
        tensors[f"{key}_blocks"] = numbers[..., 0::2] | numbers[..., 1::2] << 4
        tensors[f"{key}_scales"] = scales
        # GGUF has the scale before the block, and the second half of it in the high bits.
        halves = numbers[..., :16] | numbers[..., 16:] << 4
        raw = np.concatenate([scales[..., None], halves], axis=-1).reshape(num_experts, rows, -1)
        weight = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.MXFP4)
        expected[key] = weight.swapaxes(1, 2)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return expected
