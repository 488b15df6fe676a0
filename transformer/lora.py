"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv:2106.09685), in the file format of PEFT.

The change of a weight W [out, in] in fine-tuning is approximated by a low-rank product:
W + scale * B A, with A [r, in] and B [out, r]. B is initialized to zeros, so that training starts
from the base model. `apply` keeps A and B separate from the weights, which may be int8; `merge`
adds the product to the weights, so that inference costs the same as without an adapter.

An adapter is a tree of arrays that `jax.grad` and optimizers accept: a tuple with one dictionary
{"q": Lora, ...} per layer. On disk it is `adapter_config.json` and `adapter_model.safetensors`, the
files of PEFT.

Not supported: adapters of the token embedding and of experts, DoRA, different ranks per linear map,
and initializations that change the base model (such as PiSSA). Files that use one of these are
rejected with the name of the key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer import hf_config, quarot
from transformer.checkpoint import safetensors
from transformer.checkpoint.names import TensorSource, join_rows, rows_of, tensor_sources
from transformer.config import Config
from transformer.decoder import Params, abstract
from transformer.weights import Linear, Lora

Adapter = tuple[dict[str, Lora], ...]
TARGET_MODULES = ("q", "k", "v", "out", "gate", "up", "down")
WEIGHTS_FILE = "adapter_model.safetensors"
_FILES = ("adapter_config.json", WEIGHTS_FILE)
# Keys of adapter_config.json with their supported values.
_SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    **dict.fromkeys(("lora_bias", "use_bdlora", "use_dora", "use_qalora"), (False, None)),
    **dict.fromkeys(
        (
            "alora_invocation_tokens",
            "arrow_config",
            "kasa_config",
            "layer_replication",
            "modules_to_save",
            "monteclora_config",
            "target_parameters",
            "trainable_token_indices",
            "velora_config",
        ),
        (None, [], {}),
    ),
}
# Keys that do not affect the result of the adapter.
_IGNORED_KEYS = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules
    fan_in_fan_out inference_mode layers_pattern loftq_config lora_dropout lora_ga_config
    megatron_config megatron_core peft_version qalora_group_size revision runtime_config task_type
    """.split()  # noqa: SIM905 (a list of words reads better than forty quotes)
)
_READ_KEYS = frozenset({"r", "lora_alpha", "use_rslora", "target_modules", "layers_to_transform"})


def init(
    key: jax.Array,
    cfg: Config,
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str] | None = None,
) -> Adapter:
    """Return an initial adapter for every layer, with random A and zero B, in float32.

    Args:
        key: Random key.
        cfg: Config of the decoder.
        rank: r, the rows of A and columns of B.
        alpha: Numerator of the scale of the adapter, which is alpha / rank.
        target_modules: Names of the linear maps to adapt, from TARGET_MODULES. Maps that a layer
            does not have are ignored. None: all maps that can have an adapter.

    Returns:
        The adapter.

    Raises:
        ValueError: A target module is unknown or a map of experts, or the rank is less than one.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if target_modules is None:
        target_modules = adaptable_modules(cfg)
    if unknown := sorted(set(target_modules) - set(TARGET_MODULES)):
        raise ValueError(
            f"target_modules must be among {', '.join(TARGET_MODULES)}, got {unknown[0]!r}"
        )
    if experts := sorted(set(target_modules) - set(adaptable_modules(cfg))):
        raise ValueError(
            f"target_modules must be among {', '.join(adaptable_modules(cfg))}, because experts "
            f"have no adapters, got {experts[0]!r}"
        )
    layers = []
    for layer in abstract(cfg).layers:
        loras = {}
        for name in target_modules:
            if (linear := getattr(layer, name)) is None:
                continue
            out, inner = linear.weight.shape
            key, subkey = jax.random.split(key)
            bound = 1 / math.sqrt(inner)
            a = jax.random.uniform(subkey, (rank, inner), jnp.float32, -bound, bound)
            loras[name] = Lora(a=a, b=jnp.zeros((out, rank), jnp.float32), scale=alpha / rank)
        layers.append(loras)
    return tuple(layers)


def adaptable_modules(cfg: Config) -> tuple[str, ...]:
    """Return the names of the linear maps that can have an adapter: all but those of experts."""
    if cfg.num_experts is None:
        return TARGET_MODULES
    return tuple(name for name in TARGET_MODULES if name not in ("gate", "up", "down"))


def shared_modules(cfg: Config) -> tuple[str, ...]:
    """Return the names of the linear maps that share one tensor in Hugging Face files.

    In a PEFT adapter, these linear maps also share one matrix A.
    """
    names: dict[str, list[str]] = {}
    for name, source in _tensor_sources(cfg)[0].items():
        names.setdefault(source.name, []).append(name)
    return tuple(name for group in names.values() if len(group) > 1 for name in group)


def apply(params: Params, adapter: Adapter) -> Params:
    """Return the model with an adapter attached to its linear maps, whose weights do not change.

    The weights may have any dtype. If they are rotated (`quarot.py`), the adapter is rotated to
    match. An adapter that was applied earlier to the same linear maps is replaced.
    """
    if params.folded_norm_weights is not None:
        adapter = tuple(
            {name: quarot.rotate_lora(lora, name, norm_weights) for name, lora in loras.items()}
            for norm_weights, loras in zip(params.folded_norm_weights, adapter, strict=True)
        )
    return _map_linears(params, adapter, lambda linear, lora: linear.replace(lora=lora))


def merge(params: Params, adapter: Adapter) -> Params:
    """Return the weights with the low-rank product of the adapter added to them.

    Raises:
        ValueError: The weights are int8 or int4, which cannot represent the sum; merge before
            quantizing.
    """

    def add(linear: Linear, lora: Lora) -> Linear:
        if linear.is_quantized:
            raise ValueError(
                "an adapter cannot be merged into int8 or int4 weights; use lora.apply, or load "
                "the model with another dtype"
            )
        delta = lora.scale * jnp.dot(lora.b, lora.a, preferred_element_type=jnp.float32)
        weight = linear.weight.astype(jnp.float32) + delta
        return linear.replace(weight=weight.astype(linear.weight.dtype), lora=None)

    return _map_linears(params, adapter, add)


def _map_linears(
    params: Params, adapter: Adapter, change: Callable[[Linear, Lora], Linear]
) -> Params:
    layers = tuple(
        layer.replace(**{name: change(getattr(layer, name), lora) for name, lora in loras.items()})
        for layer, loras in zip(params.layers, adapter, strict=True)
    )
    return params.replace(layers=layers)


def load(folder: Path, cfg: Config) -> Adapter:
    """Load an adapter from a PEFT folder.

    Args:
        folder: Folder with adapter_config.json and adapter_model.safetensors.
        cfg: Config of the base model.

    Returns:
        The adapter, in float32.

    Raises:
        FileNotFoundError: One of the two files does not exist.
        ValueError: A file is damaged, a key or tensor is unknown, a tensor is missing, or a shape
            does not fit the model.
    """
    folder = Path(folder)
    config = safetensors.read_json_object(folder / _FILES[0])
    rank, scale = _check(config, folder / _FILES[0])
    tensors = safetensors.read_tensors(folder / _FILES[1])

    def read(name: str, shape: tuple[int, ...]) -> jax.Array:
        if (file_shape := tensors[name].shape) != shape:
            raise ValueError(f"{folder}: {name} must have shape {shape}, got {file_shape}")
        used.add(name)
        return jnp.asarray(tensors[name].read(0, shape[0]))

    used: set[str] = set()
    adapter, missing = [], []
    for i, (sources, layer) in enumerate(
        zip(_tensor_sources(cfg), abstract(cfg).layers, strict=True)
    ):
        # Rows of each B: GPT-2 has one B for queries, keys and values together.
        num_rows: dict[str, int] = {}
        for name, source in sources.items():
            out = getattr(layer, name).weight.shape[0]
            num_rows[source.name] = num_rows.get(source.name, 0) + out
        loras = {}
        for name, source in sources.items():
            a_name, b_name = (_tensor_name(source, letter) for letter in "AB")
            is_absent = a_name not in tensors and b_name not in tensors
            if is_absent and not _is_target(source, i, config):
                continue
            if absent := [tensor for tensor in (a_name, b_name) if tensor not in tensors]:
                missing += absent
                continue
            out, inner = getattr(layer, name).weight.shape
            b = read(b_name, (num_rows[source.name], rank))
            b = rows_of(b, source, out)
            loras[name] = Lora(a=read(a_name, (rank, inner)), b=b, scale=scale)
        adapter.append(loras)
    if missing:
        raise ValueError(f"{folder}: {missing[0]} and {len(missing) - 1} other tensors are missing")
    if unknown := sorted(tensors.keys() - used):
        raise ValueError(f"{folder}: the tensor {unknown[0]} is not part of this model")
    return tuple(adapter)


def save(folder: Path, adapter: Adapter, cfg: Config, *, base_model: str | None = None) -> None:
    """Save an adapter as a PEFT folder.

    Args:
        folder: Folder to write to; it is created if it does not exist.
        adapter: The adapter.
        cfg: Config of the base model.
        base_model: Name or folder of the base model, which is stored for other tools.

    Raises:
        ValueError: Ranks or scales differ, or maps that share a tensor (queries, keys and values of
            GPT-2) do not have the same A.
    """
    tensors: dict[str, np.ndarray] = {}
    adapted, all_modules, settings = set(), set(), set()
    layers = _tensor_sources(cfg)
    for sources, layer_loras in zip(layers, adapter, strict=True):
        # Linear maps by tensor: in GPT-2, q, k and v share one.
        names_of: dict[TensorSource, list[str]] = {}
        for name, source in sources.items():
            names_of.setdefault(replace(source, first_row=0), []).append(name)
        all_modules |= {_module(source) for source in names_of}
        for source, names in names_of.items():
            loras = [layer_loras[name] for name in names if name in layer_loras]
            if not loras:
                continue
            if len(loras) < len(names) or any((lora.a != loras[0].a).any() for lora in loras[1:]):
                raise ValueError(
                    f"{source.name} is one tensor for {', '.join(names)}, which must all have an "
                    "adapter with the same A to be saved; merge the adapter into the model instead"
                )
            tensors[_tensor_name(source, "A")] = np.asarray(loras[0].a)
            b = [np.asarray(lora.b) for lora in loras]
            tensors[_tensor_name(source, "B")] = join_rows(sources[names[0]], b)
            settings |= {(len(lora.a), lora.scale) for lora in loras}
            adapted.add(_module(source))
    if len(settings) != 1:
        raise ValueError(
            f"all linear maps must have the same rank and scale, got (rank, scale) of "
            f"{sorted(settings)}"
        )
    ((rank, scale),) = settings
    short_names = sorted({module.rsplit(".", 1)[1] for module in adapted})
    # Short names are enough if they match no other module.
    is_unambiguous = adapted == {
        name for name in all_modules if name.rsplit(".", 1)[1] in short_names
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(scale * rank) if float(scale * rank).is_integer() else scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(source.is_transposed for source in layers[0].values()),
        "target_modules": short_names if is_unambiguous else sorted(adapted),
    }
    safetensors.write(Path(folder), config, tensors, names=_FILES)


def _tensor_sources(cfg: Config) -> list[dict[str, TensorSource]]:
    """Return one dictionary per layer: name of a linear map -> its Hugging Face tensor."""
    tree = tensor_sources(cfg, "hf", architecture=hf_config.to_hf(cfg)["model_type"])
    return [
        {
            name: getattr(layer, name).weight
            for name in adaptable_modules(cfg)
            if getattr(layer, name) is not None
        }
        for layer in tree.layers
    ]


def _module(source: TensorSource) -> str:
    return source.name.removesuffix(".weight")


def _tensor_name(source: TensorSource, letter: str) -> str:
    return f"base_model.model.{_module(source)}.lora_{letter}.weight"


def _is_target(source: TensorSource, layer: int, config: Mapping[str, Any]) -> bool:
    """Return whether `target_modules` lists this weight; False if it is a regex, not a list."""
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if not isinstance(targets, list) or (layers and layer not in layers):
        return False
    return any(f".{_module(source)}".endswith(f".{target}") for target in targets)


def _check(config: Mapping[str, Any], path: Path) -> tuple[int, float]:
    """Check the content of an adapter_config.json; return its rank and scale.

    Raises:
        ValueError: The config is invalid or not supported.
    """
    for key, value in config.items():
        if key in _SUPPORTED_VALUES:
            if value not in _SUPPORTED_VALUES[key]:
                allowed = " or ".join(map(repr, _SUPPORTED_VALUES[key]))
                raise ValueError(f"{path}: {key} must be {allowed}, got {value!r}")
        elif key not in _IGNORED_KEYS | _READ_KEYS:
            raise ValueError(f"{path}: the key {key!r} is not supported")
    if missing := [
        k for k in ("peft_type", "r", "lora_alpha", "target_modules") if k not in config
    ]:
        raise ValueError(f"{path}: missing keys: {', '.join(missing)}")
    rank, alpha = config["r"], config["lora_alpha"]
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{path}: r must be a positive integer, got {rank!r}")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{path}: lora_alpha must be a number, got {alpha!r}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
