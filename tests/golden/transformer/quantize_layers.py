"""Quantize a random linear map with AutoGPTQ, AutoAWQ and compressed-tensors.

    pip download --no-deps auto-gptq==0.7.1 autoawq==0.2.7.post3 compressed-tensors==0.20.1 loguru
    for wheel in *.whl; do unzip -qo $wheel -d tools; done
    python quantize_layers.py tools

It needs torch, transformers and the unpacked wheels. They cannot be installed beside transformers
5, or need a CUDA device, but their packing and unpacking runs on any CPU. Each file has the tensors
of a layer `model.layers.0.mlp.up_proj` as the tool stores them, the weight that the tool computes
from them in float32, `expected` [out, in], and the `quantization_config` as metadata.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent / "quantized"
NAME = "model.layers.0.mlp.up_proj"
IN, OUT, GROUP = 96, 64, 32
GPTQ = dict(quant_method="gptq", damp_percent=0.01, true_sequential=True)
AWQ = dict(quant_method="awq", version="gemm", modules_to_not_convert=None)
PACKED = dict(
    quant_method="compressed-tensors", format="pack-quantized", ignore=["lm_head"],
    kv_cache_scheme=None, quantization_status="compressed",
)  # fmt: skip


def import_without_init(name: str, folder: Path) -> types.ModuleType:
    """Import a module without the `__init__.py` of its packages, which need a CUDA device."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        package = types.ModuleType(".".join(parts[:i]))
        package.__path__ = [str(folder.joinpath(*parts[:i]))]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(name)


def write(name: str, tensors: dict, expected: torch.Tensor, quantization: dict) -> None:
    stored = {f"{NAME}.{part}": tensor.contiguous() for part, tensor in tensors.items()}
    metadata = {"quantization_config": json.dumps(quantization)}
    save_file(stored | {"expected": expected.contiguous()}, HERE / f"{name}.safetensors", metadata)


def ranges(weight: torch.Tensor, group: torch.Tensor, bits: int, is_symmetric: bool):
    """Return scales and zero points [out, groups] for groups of inputs."""
    top = 2**bits - 1
    scales, zeros = [], []
    for g in range(int(group.max()) + 1):
        part = weight[:, group == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if is_symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / top).half().float()
        scales.append(scale)
        middle = torch.full_like(low, 2 ** (bits - 1))
        # The packing of AutoGPTQ spoils its neighbours where a zero point is 0.
        zeros.append(middle if is_symmetric else (-low / scale).round().clamp(1, top))
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def gptq(tools: Path) -> None:
    module = import_without_init("auto_gptq.nn_modules.qlinear.qlinear_cuda_old", tools)
    for name, bits, is_symmetric, is_ordered, group_size in (
        ("gptq-4bit", 4, True, False, GROUP),
        ("gptq-4bit-asymmetric", 4, False, False, GROUP),
        ("gptq-4bit-desc-act", 4, False, True, GROUP),
        ("gptq-4bit-one-group", 4, False, False, -1),
        ("gptq-8bit-desc-act", 8, False, True, GROUP),
        ("gptq-2bit", 2, False, False, GROUP),
    ):
        linear = torch.nn.Linear(IN, OUT, bias=False)
        weight = linear.weight.data
        group = torch.arange(IN) // (IN if group_size == -1 else group_size)
        if is_ordered:
            group = group[torch.randperm(IN)]
        scales, zeros = ranges(weight, group, bits, is_symmetric)
        low, high = -zeros[:, group], 2**bits - 1 - zeros[:, group]
        weight.copy_((weight / scales[:, group]).round().clamp(low, high) * scales[:, group])
        layer = module.QuantLinear(bits, group_size, IN, OUT, False)
        layer.pack(linear, scales, zeros.clone(), group.to(torch.int32))
        tensors = {part: getattr(layer, part) for part in ("qweight", "qzeros", "scales", "g_idx")}
        layer.scales = layer.scales.float()
        if is_ordered:  # the class for any order of groups
            other = import_without_init("auto_gptq.nn_modules.qlinear.qlinear_cuda", tools)
            ordered = other.QuantLinear(bits, group_size, IN, OUT, False)
            ordered.load_state_dict(layer.state_dict(), strict=False)
            ordered.scales, layer = layer.scales, ordered
        expected = layer(torch.eye(IN)).T
        settings = dict(bits=bits, group_size=group_size, desc_act=is_ordered, sym=is_symmetric)
        write(name, tensors, expected, GPTQ | settings)


def awq(tools: Path) -> None:
    gemm = import_without_init("awq.modules.linear.gemm", tools)
    for name, group_size in (("awq", GROUP), ("awq-one-group", IN)):
        linear = torch.nn.Linear(IN, OUT, bias=False)
        group = torch.arange(IN) // group_size
        scales, zeros = ranges(linear.weight.data, group, 4, False)
        zeros[::3] = 0  # the format has them
        low, high = -zeros[:, group], 15 - zeros[:, group]
        full = scales[:, group]
        linear.weight.data.copy_((linear.weight.data / full).round().clamp(low, high) * full)
        layer = gemm.WQLinear_GEMM.from_linear(
            linear, 4, group_size, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
        )
        tensors = {part: getattr(layer, part) for part in ("qweight", "qzeros", "scales")}
        expected = gemm.dequantize_gemm(
            layer.qweight, layer.qzeros, layer.scales.float(), 4, group_size
        ).T
        settings = dict(bits=4, group_size=group_size, zero_point=True)
        write(name, tensors, expected, AWQ | settings)


def packed(tools: Path) -> None:
    sys.path.append(str(tools))
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    for name, bits, is_symmetric, strategy, is_ordered in (
        ("packed-4bit", 4, True, "group", False),
        ("packed-4bit-asymmetric", 4, False, "group", False),
        ("packed-4bit-channel", 4, True, "channel", False),
        ("packed-8bit-channel", 8, False, "channel", False),
        ("packed-4bit-actorder", 4, True, "group", True),
    ):
        weight = torch.randn(OUT, IN)
        group = torch.arange(IN) // (GROUP if strategy == "group" else IN)
        if is_ordered:
            group = group[torch.randperm(IN)]
        scales, zeros = ranges(weight, group, bits, is_symmetric)
        zeros = (zeros - 2 ** (bits - 1)).to(torch.int8)
        settings = dict(
            num_bits=bits, type="int", symmetric=is_symmetric, strategy=strategy,
            group_size=GROUP if strategy == "group" else None,
        )  # fmt: skip
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
        if is_ordered:  # before version 0.20; the inputs keep their order
            integers = (weight / scales[:, group]).round().clamp(-8, 7)
            expected = integers * scales[:, group]
            state = {"weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}
            state["weight_packed"] = pack_to_int32(integers.to(torch.int8), bits)
            state["weight_g_idx"] = group.to(torch.int32)
            settings["actorder"] = "group"
        else:
            state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
            state = PackedQuantizationCompressor.compress(state, scheme)
            expected = PackedQuantizationCompressor.decompress(dict(state), scheme)["weight"]
        group_0 = dict(targets=["Linear"], weights=settings, input_activations=None)
        write(name, state, expected.float(), PACKED | {"config_groups": {"group_0": group_0}})


if __name__ == "__main__":
    torch.manual_seed(17)
    HERE.mkdir(exist_ok=True)
    for quantize in (gptq, awq, packed):
        with torch.no_grad():
            quantize(Path(sys.argv[1]).resolve())
