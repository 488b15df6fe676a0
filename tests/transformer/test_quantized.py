"""Weights of integers in the layouts of GPTQ, AWQ and compressed-tensors.

The golden files have layers that AutoGPTQ, AutoAWQ and compressed-tensors packed, with the weights
that these tools compute from them. Whole folders are packed here, after the published layouts.
"""

import json
import logging
import shutil
from functools import cache as once
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.naming import naming
from tests.transformer.conftest import GOLDEN
from tests.transformer.test_checkpoint_files import assert_same
from transformer import checkpoint
from transformer.checkpoint import quantized, safetensors

NAMES = sorted(path.stem for path in (GOLDEN / "quantized").glob("*.safetensors"))
RNG = np.random.default_rng(3)
GROUP = 8
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
WEIGHTS = dict(num_bits=4, type="int", symmetric=False, strategy="group", group_size=GROUP)
QUANTIZATION = {
    "gptq": dict(quant_method="gptq", bits=4, group_size=GROUP, desc_act=False, sym=False),
    "gptq_v2": dict(
        quant_method="gptq", checkpoint_format="gptq_v2", bits=4, group_size=GROUP, desc_act=True,
        sym=False, pack_dtype="int32", meta={"quantizer": ["gptqmodel:4.0"]},
    ),
    "awq": dict(quant_method="awq", bits=4, group_size=GROUP, zero_point=True, version="gemm"),
    "packed": dict(
        quant_method="compressed-tensors", format="pack-quantized", ignore=["lm_head"],
        config_groups={"group_0": dict(targets=["Linear"], weights=WEIGHTS)},
    ),
}  # fmt: skip


def golden(name: str) -> tuple[dict, dict, np.ndarray]:
    """Return the quantization_config, the tensors, and the expected weight of a golden file."""
    path = GOLDEN / "quantized" / f"{name}.safetensors"
    with safe_open(path, "numpy") as file:
        settings = json.loads(file.metadata()["quantization_config"])
        expected = file.get_tensor("expected")
    tensors = safetensors._read_tensors(path, ("expected",))
    return settings, tensors, expected


def dequantized(settings: dict, tensors: dict) -> quantized.LazyTensor:
    config, tensors = quantized.dequantize({"quantization_config": settings}, tensors)
    assert not config
    (weight,) = tensors.values()
    return weight


@pytest.mark.parametrize("name", NAMES)
def test_quantized_weight_equals_that_of_the_tool_that_packed_it(name):
    settings, tensors, expected = golden(name)
    weight = dequantized(settings, tensors)
    assert weight.shape == expected.shape
    np.testing.assert_array_equal(weight.read(0, len(expected)), expected)
    np.testing.assert_array_equal(weight.read(3, 29), expected[3:29])  # not at a whole word


def pack(integers: np.ndarray, axis: int, bits: int = 4) -> np.ndarray:
    """Return int32 words of integers along an axis, the first in the lowest bits."""
    per_word = 32 // bits
    integers = np.moveaxis(integers, axis, 0).astype(np.int64)
    integers = np.concatenate([integers, np.zeros((-len(integers) % per_word, *integers.shape[1:]),
                                                  np.int64)])  # fmt: skip
    words = sum(integers[i::per_word] << bits * i for i in range(per_word))
    return np.moveaxis(words.astype(np.uint32).view(np.int32), 0, axis)


def quantize(
    array: np.ndarray, method: str, settings: dict, lowest_zero: int
) -> tuple[dict, np.ndarray]:
    """Return the tensors of random integers with the shape of a weight, and the weight."""
    rows, columns = array.shape
    group = np.arange(columns) // GROUP
    if settings.get("desc_act"):
        group = RNG.permutation(group)
    integers = RNG.integers(0, 16, array.shape)
    zeros = RNG.integers(lowest_zero, 16, (rows, columns // GROUP))
    scales = (RNG.random(zeros.shape) * 0.02 + 0.001).astype(np.float16)
    weight = (integers - zeros[:, group]) * scales.astype(np.float32)[:, group]
    weight = weight.astype(np.float32)
    if method == "packed":
        parts = {
            "weight_packed": pack(integers, 1), "weight_scale": scales,
            "weight_zero_point": pack(zeros, 0), "weight_shape": np.array(array.shape),
        }  # fmt: skip
    elif method == "awq":
        order = np.arange(rows).reshape(-1, 8)[:, AWQ_ORDER].ravel()
        parts = {"qweight": pack(integers[order].T, 1), "qzeros": pack(zeros[order].T, 1)}
        parts["scales"] = scales.T
    else:
        stored = zeros if method == "gptq_v2" else (zeros - 1) & 15
        parts = {"qweight": pack(integers.T, 0), "qzeros": pack(stored.T, 1), "scales": scales.T}
        parts["g_idx"] = group.astype(np.int32)
    return {part: np.ascontiguousarray(values) for part, values in parts.items()}, weight


@once
def random_tensors(method: str, lowest_zero: int = 0) -> tuple[dict, dict]:
    """Return the tensors of the golden Llama with random quantized weights, and the weights."""
    settings = QUANTIZATION[method]
    stored, expected = {}, {}
    for name, array in load_file(GOLDEN / "llama" / "model.safetensors").items():
        stored[name] = expected[name] = array
        if "_proj" in name:
            parts, expected[name] = quantize(array, method, settings, lowest_zero)
            del stored[name]
            base = name.removesuffix("weight")
            stored |= {base + part: values for part, values in parts.items()}
    return stored, expected


def write_folders(folder: Path, method: str) -> tuple[Path, Path]:
    """Write folders of `random_tensors`: quantized, and the same weights as float32."""
    config = json.loads((GOLDEN / "llama" / "config.json").read_text())
    packed, plain = folder / "packed", folder / "plain"
    extras = ({"quantization_config": QUANTIZATION[method]}, {})
    for path, tensors, extra in zip((packed, plain), random_tensors(method), extras, strict=True):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config | extra))
        save_file(tensors, path / "model.safetensors")
    return packed, plain


@pytest.mark.parametrize("method", QUANTIZATION)
def test_quantized_folder_loads_as_its_dequantized_weights(tmp_path, method):
    packed, plain = write_folders(tmp_path, method)
    params, cfg, _ = checkpoint.load(packed)
    expected, plain_cfg, _ = checkpoint.load(plain)
    assert cfg == plain_cfg
    assert_same(params, expected)
    stored = {tensor.dtype for tensor in checkpoint.read_header(packed).tensors.values()}
    assert "F32" in stored and any("4-bit" in dtype for dtype in stored)


def test_symmetric_gptq_with_zero_points_of_the_second_version_is_recognized():
    """Bug of some tools: `checkpoint_format` is "gptq", but the zero points are as they are."""
    settings, tensors, expected = golden("gptq-4bit")
    name = next(name for name in tensors if name.endswith("qzeros"))
    words = np.array(tensors[name].read(0, 3)).view(np.uint32) + np.uint32(0x11111111)
    tensors[name] = quantized.LazyTensor(
        words.shape, lambda start, stop: words.view(np.int32)[start:stop], Path("x"), "I32"
    )
    for version in ("gptq", "gptq_v2"):
        weight = dequantized(settings | {"checkpoint_format": version}, dict(tensors))
        np.testing.assert_array_equal(weight.read(0, len(expected)), expected)


def test_biases_of_zeros_are_ignored_and_others_are_not(tmp_path, caplog):
    """AutoGPTQ stored a bias of zeros for each layer that has none."""
    packed, plain = write_folders(tmp_path, "gptq")
    path = packed / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.bias"
    save_file(tensors | {name: np.zeros(40, np.float16)}, path)
    with caplog.at_level(logging.WARNING):
        assert_same(checkpoint.load(packed)[0], checkpoint.load(plain)[0])
    assert name in caplog.text
    save_file(tensors | {name: np.eye(1, 40, dtype=np.float16)[0]}, path)
    with pytest.raises(ValueError, match=naming(path, name)):
        checkpoint.load(packed)
    other = "model.layers.1.mlp.other.bias"
    save_file(tensors | {other: np.zeros(40, np.float16)}, path)
    with pytest.raises(ValueError, match=naming(path, other)):
        checkpoint.load(packed)


@pytest.mark.parametrize(
    ("method", "change", "facts"),
    [
        ("gptq", dict(bits=3), ("bits", 3)),
        ("gptq", dict(bits=True), ("bits", True)),
        ("gptq", dict(checkpoint_format="marlin"), ("checkpoint_format", "'marlin'")),
        ("gptq", dict(format="bitblas"), ("format", "'bitblas'")),
        ("gptq", dict(is_marlin_format=True), ("is_marlin_format", True)),
        ("gptq", dict(pack_dtype="int16"), ("pack_dtype", "'int16'")),
        ("gptq", dict(group_size=0), ("group_size", 0)),
        ("gptq", dict(group_size=16), ("groups", 5)),
        ("gptq", dict(adapter={"name": "lora"}), ("adapter",)),
        ("awq", dict(bits=8), ("bits", 8)),
        ("awq", dict(w_bit=3), ("w_bit", 3)),
        ("awq", dict(version="gemv"), ("version", "'gemv'")),
        ("awq", dict(version="GEMV_fast"), ("version", "'gemv_fast'")),
        ("awq", dict(zero_point=False), ("zero_point", False)),
        ("awq", dict(backend="llm-awq"), ("backend", "'llm-awq'")),
        ("awq", dict(group_size="x"), ("group_size", "'x'")),
        ("packed", dict(config_groups=[]), ("config_groups",)),
        ("packed", dict(transform_config={"R1": {}}), ("transform_config",)),
        ("packed", dict(sparsity_config={"format": "sparse-24-bitmask"}), ("sparsity_config.format",
                                                                          "'sparse-24-bitmask'")),
        ("packed", WEIGHTS | dict(num_bits=3), ("config_groups.g.weights.num_bits", 3)),
        ("packed", WEIGHTS | dict(type="float"), ("config_groups.g.weights.type", "'float'")),
        ("packed", WEIGHTS | dict(strategy="tensor"), ("config_groups.g.weights.strategy",)),
        ("packed", WEIGHTS | dict(symmetric=True), ("weight_zero_point",)),
        ("packed", dict(format="int-quantized"), ("quantization_config", "int-quantized")),
    ],
)  # fmt: skip
def test_unsupported_value_in_quantization_config_raises_with_key(tmp_path, method, change, facts):
    packed, _ = write_folders(tmp_path, method)
    path = packed / "config.json"
    config = json.loads(path.read_text())
    if "num_bits" in change:
        change = dict(config_groups={"g": dict(targets=["Linear"], weights=change)})
    if method == "gptq" and "group_size" in change:  # else g_idx has the groups
        tensors = load_file(packed / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}
        save_file(kept, packed / "model.safetensors")
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=naming(*facts)):
        checkpoint.read_header(packed)


@pytest.mark.parametrize(
    ("method", "part", "change"),
    [
        ("gptq", "qzeros", None),
        ("gptq", "scales", lambda scales: scales[:, :-1].copy()),
        ("gptq", "qzeros", lambda zeros: zeros[:, :-1].copy()),
        ("gptq", "g_idx", lambda groups: groups + 1),
        ("gptq", "g_idx", lambda groups: groups[:-1].copy()),
        ("gptq", "qweight", lambda words: words.astype(np.int64)),
        ("gptq", "qweight", lambda words: words.ravel()),
        ("awq", "scales", None),
        ("awq", "qzeros", lambda zeros: zeros[:-1].copy()),
        ("packed", "weight_shape", None),
        ("packed", "weight_zero_point", None),
        ("packed", "weight_zero_point", lambda zeros: zeros[:-1].copy()),
        ("packed", "weight_shape", lambda shape: shape + 8),
        ("packed", "weight_scale", lambda scales: scales[:-1].copy()),
    ],
)
def test_quantized_weight_with_missing_or_misshapen_tensor_raises_with_file(
    tmp_path, method, part, change
):
    packed, _ = write_folders(tmp_path, method)
    path = packed / "model.safetensors"
    tensors = load_file(path)
    name = f"model.layers.1.mlp.up_proj.{part}"
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor)
    save_file(tensors, path)
    facts = (path, "model.layers.1.mlp.up_proj")
    with pytest.raises(ValueError, match=naming(*facts)):
        checkpoint.check_tensors(packed, checkpoint.read_header(packed))


def test_integer_tensors_without_quantization_config_are_refused(tmp_path):
    packed, _ = write_folders(tmp_path, "awq")
    shutil.copy(GOLDEN / "llama" / "config.json", packed)
    with pytest.raises(ValueError, match=naming(packed / "model.safetensors", "I32")):
        checkpoint.load(packed)


def test_gptq_of_gpt2_is_refused():
    settings, tensors, _ = golden("gptq-4bit")
    config = {"quantization_config": settings, "model_type": "gpt2"}
    with pytest.raises(ValueError, match=naming("quant_method", "'gpt2'")):
        quantized.dequantize(config, tensors)
