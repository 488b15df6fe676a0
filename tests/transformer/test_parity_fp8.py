"""Weights of 8-bit floats against torch, and against transformers' FineGrainedFP8 on the CPU."""

import json

import numpy as np
import pytest

from tests.transformer.test_checkpoint_files import DTYPES, write_safetensors
from transformer import checkpoint
from transformer.checkpoint import safetensors

pytestmark = pytest.mark.parity
SIZES = dict(
    vocab_size=96, hidden_size=256, intermediate_size=384, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_of_the_256_fp8_values_equals_that_of_torch(tmp_path, dtype):
    import torch

    kind = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[dtype]
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    write_safetensors(tmp_path / "x.safetensors", {"x": values.view(DTYPES[dtype])})
    tensor = safetensors.read_tensors(tmp_path / "x.safetensors")["x"]
    expected = torch.from_numpy(values).view(kind).float().numpy()
    np.testing.assert_array_equal(tensor.read(0, 16), expected)


def quantized(weight, layout: str):
    """Return a weight in E4M3 by torch, its scales, and the weight that they stand for."""
    import torch

    rows, columns = weight.shape
    size = {"block": (128, 128), "row": (1, columns), "tensor": (rows, columns)}[layout]
    blocks = weight.reshape(rows // size[0], size[0], columns // size[1], size[1])
    scales = blocks.abs().amax((1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    stored = (blocks / scales).to(torch.float8_e4m3fn)
    expected = (stored.float() * scales).reshape(weight.shape)
    scales = scales[:, 0, :, 0]
    return stored.reshape(weight.shape), scales if layout != "tensor" else scales[0, 0], expected


@pytest.mark.parametrize(
    ("layout", "quantization", "suffix"),
    [
        ("block", dict(quant_method="fp8", weight_block_size=[128, 128]), "_scale_inv"),
        ("tensor", dict(quant_method="fp8", weight_block_size=None), "_scale_inv"),
        ("row", dict(quant_method="compressed-tensors", format="float-quantized"), "_scale"),
        ("tensor", dict(quant_method="modelopt", quant_algo="FP8"), "_scale"),
    ],
)
def test_fp8_folder_has_the_weights_of_torch_and_transformers(
    tmp_path, layout, quantization, suffix
):
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig

    torch.manual_seed(1)
    config = LlamaConfig(**SIZES)
    stored, expected = {}, {}
    for name, weight in AutoModelForCausalLM.from_config(config).state_dict().items():
        stored[name] = expected[name] = weight
        if "_proj" in name:
            stored[name], stored[name + suffix], expected[name] = quantized(weight, layout)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    values = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    values["quantization_config"] = {"activation_scheme": "dynamic"} | quantization
    (tmp_path / "config.json").write_text(json.dumps(values))

    tensors = checkpoint.read_header(tmp_path).tensors
    assert tensors.keys() == expected.keys()
    for name, weight in expected.items():
        values = tensors[name].read(0, len(weight))
        np.testing.assert_array_equal(values, weight.numpy(), err_msg=name)
    if quantization["quant_method"] == "fp8":
        settings = FineGrainedFP8Config(
            dequantize=True, weight_block_size=quantization["weight_block_size"]
        )
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=settings, dtype=torch.float32
        )
        for name, weight in model.state_dict().items():
            np.testing.assert_array_equal(weight.numpy(), expected[name].numpy(), err_msg=name)
