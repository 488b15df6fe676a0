"""Checkpoints of Whisper: Hugging Face's safetensors and CTranslate2's `model.bin`.

`hf_names` maps each weight to its tensor in a Hugging Face file; the tensors of a CTranslate2 file
are renamed to those first. A missing or unknown tensor, or one of another shape, raises an error.
Pickles (`whisper.pt`, `pytorch_model.bin`) are never opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from audio import ctranslate2
from audio.config import Config
from audio.model import Attention, AudioLayer, Decoder, Encoder, Mlp, Params, TextLayer, abstract
from transformer.checkpoint import check_tied, safetensors
from transformer.weights import Linear, Norm

Dtype = Literal["float32", "bfloat16", "int8"]

# Options that CTranslate2 stores as scalars, and their values for Whisper.
_EXPECTED_SCALARS = {
    "decoder/activation": 3,  # GELU
    "encoder/activation": 3,
    "decoder/alibi": 0,
    "decoder/pre_norm": 1,
    "encoder/pre_norm": 1,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}
# Options of CTranslate2 that the forward pass does not need.
_UNUSED = (
    "decoder/alignment_heads",
    "decoder/alignment_layer",
    "decoder/multi_query_attention",
    "encoder/multi_query_attention",
    "encoder/num_heads",
    "decoder/num_heads",
)


def load(folder: Path, *, dtype: Dtype = "float32") -> tuple[Params, Config]:
    """Load a Whisper checkpoint.

    Args:
        folder: holds config.json and either model.safetensors (Hugging Face) or model.bin
            (CTranslate2).
        dtype: of the weight matrices: "float32", "bfloat16" or "int8". With "int8", the encoder
            (its matrix products are large) and the decoder's output projections and
            cross-attention key and value projections are bfloat16. Norms, biases and position
            embeddings are always float32.

    Returns:
        The weights and the config.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or a pickle, or has an unknown key, tensor or shape.
    """
    folder = Path(folder)
    if (folder / "model.bin").is_file():
        arrays, cfg = _ctranslate2(folder)
    else:
        config, tensors = safetensors.read(folder)
        cfg = _hf_config(folder, config)
        if "proj_out.weight" in tensors:  # some exporters write the tied embedding twice
            check_tied(tensors, "proj_out.weight", "model.decoder.embed_tokens.weight", folder)
            del tensors["proj_out.weight"]
        arrays = {name: tensor.read(0, tensor.shape[0]) for name, tensor in tensors.items()}
    return _fill(arrays, cfg, dtype, folder), cfg


def is_whisper(folder: Path) -> bool:
    """Return whether the config.json of a folder is that of a Whisper model.

    Args:
        folder: the model folder; the result is False if its config.json cannot be read.
    """
    try:
        config = safetensors.read_json_object(Path(folder) / "config.json")
    except (OSError, ValueError):
        return False
    return config.get("model_type") == "whisper" or "suppress_ids_begin" in config


def save(folder: Path, params: Params, cfg: Config) -> None:
    """Save weights as float32 in a Hugging Face folder.

    Args:
        folder: the folder to write config.json and model.safetensors to.
        params: the weights, float32 or bfloat16.
        cfg: the config.

    Raises:
        ValueError: the weights are int8.
    """
    if params.decoder.embed.scale is not None:
        raise ValueError("int8 weights cannot be saved; save the weights they were quantized from")
    tensors: dict[str, np.ndarray] = {}

    def add(name: str, array: jax.Array) -> None:
        value = np.asarray(array, np.float32)
        if _is_convolution(name):
            value = value.reshape(len(value), 3, -1).swapaxes(1, 2)
        tensors[name] = np.ascontiguousarray(value)

    jax.tree.map(add, hf_names(cfg), params)
    safetensors.write(Path(folder), cfg.to_hf(), tensors)


def hf_names(cfg: Config) -> Params:
    """Return a `Params` tree whose leaves are the tensor names in a Hugging Face file.

    Args:
        cfg: sizes of the model.
    """

    def leaf(name: str) -> Any:  # a name in place of an array
        return name

    def linear(name: str, bias: bool = True) -> Linear:
        return Linear(weight=leaf(f"{name}.weight"), bias=leaf(f"{name}.bias") if bias else None)

    def norm(name: str) -> Norm:
        return Norm(scale=leaf(f"{name}.weight"), bias=leaf(f"{name}.bias"))

    def attention(layer: str, name: str) -> Attention:
        return Attention(
            norm=norm(f"{layer}.{name}_layer_norm"),
            q=linear(f"{layer}.{name}.q_proj"),
            k=linear(f"{layer}.{name}.k_proj", bias=False),
            v=linear(f"{layer}.{name}.v_proj"),
            out=linear(f"{layer}.{name}.out_proj"),
        )

    def mlp(layer: str) -> Mlp:
        return Mlp(
            norm=norm(f"{layer}.final_layer_norm"),
            up=linear(f"{layer}.fc1"),
            down=linear(f"{layer}.fc2"),
        )

    audio_layers = [f"model.encoder.layers.{i}" for i in range(cfg.num_audio_layers)]
    text_layers = [f"model.decoder.layers.{i}" for i in range(cfg.num_text_layers)]
    return Params(
        encoder=Encoder(
            conv1=linear("model.encoder.conv1"),
            conv2=linear("model.encoder.conv2"),
            positions=leaf("model.encoder.embed_positions.weight"),
            layers=tuple(
                AudioLayer(attn=attention(i, "self_attn"), mlp=mlp(i)) for i in audio_layers
            ),
            norm=norm("model.encoder.layer_norm"),
        ),
        decoder=Decoder(
            embed=linear("model.decoder.embed_tokens", bias=False),
            positions=leaf("model.decoder.embed_positions.weight"),
            layers=tuple(
                TextLayer(
                    attn=attention(i, "self_attn"),
                    cross_attn=attention(i, "encoder_attn"),
                    mlp=mlp(i),
                )
                for i in text_layers
            ),
            norm=norm("model.decoder.layer_norm"),
        ),
    )


def _fill(arrays: dict[str, np.ndarray], cfg: Config, dtype: Dtype, folder: Path) -> Params:
    """Build `Params`, with the weights in `dtype`, from a dict of Hugging Face names to arrays."""
    tree, infos = hf_names(cfg), abstract(cfg)
    expected = dict(zip(jax.tree.leaves(tree), jax.tree.leaves(infos), strict=True))
    if missing := sorted(expected.keys() - arrays.keys()):
        raise ValueError(f"{folder}: missing tensors: {_join_names(missing)}")
    if unknown := sorted(arrays.keys() - expected.keys()):
        raise ValueError(f"{folder}: unknown tensors: {_join_names(unknown)}")
    for name, info in expected.items():
        if _is_convolution(name) and arrays[name].ndim == 3:
            arrays[name] = arrays[name].swapaxes(1, 2).reshape(len(arrays[name]), -1)
        if arrays[name].shape != info.shape:
            raise ValueError(
                f"{folder}: {name} must have shape {info.shape}, got {arrays[name].shape}"
            )

    def fill(node: Any) -> Any:
        if not isinstance(node, Linear):
            return jnp.asarray(arrays[node], jnp.float32)
        weight_name, bias_name = cast("tuple[str, str | None]", (node.weight, node.bias))
        bias = None if bias_name is None else jnp.asarray(arrays[bias_name], jnp.float32)
        return _linear(arrays[weight_name], bias, _dtype_of(weight_name, dtype))

    return jax.tree.map(fill, tree, is_leaf=lambda node: isinstance(node, Linear))


def _dtype_of(name: str, dtype: Dtype) -> Dtype:
    """Return the dtype of the weight `name` when the model is loaded as `dtype`."""
    if dtype != "int8":
        return dtype
    is_int8 = name.startswith("model.decoder.") and not name.endswith(
        (
            "out_proj.weight",
            "fc2.weight",
            "encoder_attn.k_proj.weight",
            "encoder_attn.v_proj.weight",
        )
    )
    return "int8" if is_int8 else "bfloat16"


def _linear(weight: np.ndarray, bias: jax.Array | None, dtype: Dtype) -> Linear:
    if dtype == "float32":
        return Linear(weight=jnp.asarray(weight, jnp.float32), bias=bias)
    if dtype == "bfloat16":
        return Linear(weight=jnp.asarray(weight.astype(ml_dtypes.bfloat16)), bias=bias)
    # Equals `layers.quantize`, without a float32 copy on the device.
    weight = weight.astype(np.float32)
    scale = np.maximum(np.abs(weight).max(axis=1), 1e-30) / np.float32(127)
    quantized = np.rint(weight / scale[:, None]).astype(np.int8)
    return Linear(weight=jnp.asarray(quantized), bias=bias, scale=jnp.asarray(scale))


def _is_convolution(name: str) -> bool:
    return name.endswith(("conv1.weight", "conv2.weight"))


def _hf_config(folder: Path, config: Mapping[str, Any]) -> Config:
    if (extra := folder / "generation_config.json").is_file():
        heads = safetensors.read_json_object(extra).get("alignment_heads")
        config = {**config, "alignment_heads": heads or config.get("alignment_heads")}
    try:
        return Config.from_hf(config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None


# CTranslate2


def _ctranslate2(folder: Path) -> tuple[dict[str, np.ndarray], Config]:
    """Load a CTranslate2 folder; return a dict of Hugging Face names to arrays, and the config."""
    path = folder / "model.bin"
    with path.open("rb") as file:
        if file.read(2) in (b"PK", b"\x80\x02"):
            raise ValueError(f"{path}: Python pickles are not supported; convert it to safetensors")
    spec, arrays = ctranslate2.read(path)
    if spec != "WhisperSpec":
        raise ValueError(f"{path}: expected a model of 'WhisperSpec', got {spec!r}")
    try:
        cfg = _ctranslate2_config(arrays, safetensors.read_json_object(folder / "config.json"))
    except KeyError as error:
        raise ValueError(f"{path}: missing array {error.args[0]}") from None
    for name, value in _EXPECTED_SCALARS.items():
        if (actual := arrays.pop(name, None)) is not None and actual != value:
            raise ValueError(f"{path}: {name} must be {value}, got {actual}")
    for name in _UNUSED:
        arrays.pop(name, None)
    projection, embed = arrays.pop("decoder/projection/weight", None), "decoder/embeddings/weight"
    if projection is not None and projection is not arrays.get(embed):
        raise ValueError(f"{path}: decoder/projection/weight must be tied to {embed}")
    renamed: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        for hf_name, value in _to_hf_names(name, array):
            # The key projection has no bias. CTranslate2 concatenates it with other projections
            # and fills its part of the bias with zeros.
            if not hf_name.endswith("k_proj.bias"):
                renamed[hf_name] = value
            elif np.any(value):
                raise ValueError(
                    f"{path}: the keys have no bias, so their part of {name} must be zero"
                )
    return renamed, cfg


def _ctranslate2_config(arrays: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Config:
    def num_layers(half: str) -> int:
        return len(
            {n.split("/")[1] for n in arrays if n.startswith(f"{half}/layer_")} - {"layer_norm"}
        )

    vocab_size, d_model = arrays["decoder/embeddings/weight"].shape
    heads = config.get("alignment_heads") or ()
    return Config(
        num_audio_layers=num_layers("encoder"),
        num_text_layers=num_layers("decoder"),
        num_heads=int(arrays["encoder/num_heads"]),
        d_model=d_model,
        d_ff=len(arrays["encoder/layer_0/ffn/linear_0/weight"]),
        vocab_size=vocab_size,
        num_mels=arrays["encoder/conv1/weight"].shape[1],
        max_audio_len=len(arrays["encoder/position_encodings/encodings"]),
        max_text_len=len(arrays["decoder/position_encodings/encodings"]),
        alignment_heads=tuple((layer, head) for layer, head in heads),
    )


_SUBLAYERS = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
    "ffn/layer_norm": ("final_layer_norm",),
}
_TOP_LEVEL = {
    "conv1": "conv1",
    "conv2": "conv2",
    "layer_norm": "layer_norm",
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
}
_LEAVES = {
    "weight": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "encodings": "weight",
}


def _to_hf_names(name: str, array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Split a CTranslate2 array into Hugging Face tensors; return (name, tensor) pairs.

    An array with an unknown name is not split and keeps its name.
    """
    half, _, rest = name.partition("/")
    module, _, leaf = rest.rpartition("/")
    if leaf in _LEAVES and module in _TOP_LEVEL:
        return [(f"model.{half}.{_TOP_LEVEL[module]}.{_LEAVES[leaf]}", array)]
    layer, _, sublayer = module.partition("/")
    if leaf not in _LEAVES or sublayer not in _SUBLAYERS or not layer.startswith("layer_"):
        return [(name, array)]
    prefix = f"model.{half}.layers.{layer[6:]}"
    names = [f"{prefix}.{hf_module}.{_LEAVES[leaf]}" for hf_module in _SUBLAYERS[sublayer]]
    if len(array) % len(names):
        raise ValueError(
            f"{name}: its first axis must be a multiple of {len(names)}, got shape {array.shape}"
        )
    return list(zip(names, np.split(array, len(names)), strict=True))


def _join_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
