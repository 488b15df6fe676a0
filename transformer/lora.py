"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv:2106.09685), in the files of the PEFT package.

Fine-tuning moves a weight W [out, in] by little, and what it adds can be told in few numbers:
W + scale * B A, with A [r, in] and B [out, r]. B begins as zeros, so that training begins at the
model as it was. `apply` puts A and B beside the weights, which may be int8; `merge` adds them in,
after which nothing is left to compute.

An adapter is a tree of arrays: a tuple with a dictionary a layer, {"q": Lora, ...}, so that
`jax.grad` and optimisers take it as it is. On disk it is `adapter_config.json` and
`adapter_model.safetensors`, which PEFT and others open.

Leaves out: adapters of the token table, DoRA, ranks that differ from part to part, and initial
values that change the base model too (PiSSA and its like); files with them are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer import families, quarot
from transformer.checkpoint import safetensors
from transformer.checkpoint.names import TensorSource, tensor_sources
from transformer.config import Config
from transformer.decoder import Params, abstract
from transformer.weights import Linear, Lora

Adapter = tuple[dict[str, Lora], ...]
TARGET_MODULES = ("q", "k", "v", "out", "gate", "up", "down")
WEIGHTS_FILE = "adapter_model.safetensors"
_FILES = ("adapter_config.json", WEIGHTS_FILE)
# Keys of adapter_config.json, with the values for which we are right.
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
# Keys that say nothing about what the adapter computes.
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
    target_modules: Sequence[str] = TARGET_MODULES,
) -> Adapter:
    """A fresh adapter of every layer, which changes nothing yet.

    Args:
        rank: r, the columns of B.
        alpha: the adapter is scaled by alpha / rank.
        parts: which linear maps of a layer it adapts; those that a layer lacks are passed over.

    Raises:
        ValueError: an unknown part, or a rank below one.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if unknown := sorted(set(target_modules) - set(TARGET_MODULES)):
        raise ValueError(
            f"target_modules must be among {', '.join(TARGET_MODULES)}, got {unknown[0]!r}"
        )
    layers = []
    for layer in abstract(cfg).layers:
        own = {}
        for part in target_modules:
            if (linear := getattr(layer, part)) is None:
                continue
            out, inner = linear.weight.shape
            key, one = jax.random.split(key)
            bound = 1 / math.sqrt(inner)
            a = jax.random.uniform(one, (rank, inner), jnp.float32, -bound, bound)
            own[part] = Lora(a=a, b=jnp.zeros((out, rank), jnp.float32), scale=alpha / rank)
        layers.append(own)
    return tuple(layers)


def apply(params: Params, adapter: Adapter) -> Params:
    """The model with the adapter beside its weights, of any format; replaces one that is there."""
    if params.folded_norm_weights is not None:
        adapter = tuple(
            {part: quarot.rotate_lora(lora, part, gains) for part, lora in own.items()}
            for gains, own in zip(params.folded_norm_weights, adapter, strict=True)
        )
    return _map_linears(params, adapter, lambda linear, lora: linear.replace(lora=lora))


def merge(params: Params, adapter: Adapter) -> Params:
    """The model with the adapter added to its weights.

    Raises:
        ValueError: the weights are int8, which have no room for it: merge first, then quantise.
    """

    def add(linear: Linear, lora: Lora) -> Linear:
        if linear.scale is not None:
            raise ValueError("an adapter cannot be merged into int8 weights; apply it instead")
        change = lora.scale * jnp.dot(lora.b, lora.a, preferred_element_type=jnp.float32)
        weight = linear.weight.astype(jnp.float32) + change
        return linear.replace(weight=weight.astype(linear.weight.dtype), lora=None)

    return _map_linears(params, adapter, add)


def _map_linears(params: Params, adapter: Adapter, change) -> Params:
    layers = tuple(
        layer.replace(**{part: change(getattr(layer, part), lora) for part, lora in own.items()})
        for layer, own in zip(params.layers, adapter, strict=True)
    )
    return params.replace(layers=layers)


def load(folder: Path, cfg: Config) -> Adapter:
    """Reads an adapter for a model.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        cfg: the model it was made for.

    Returns:
        The adapter, in float32.

    Raises:
        FileNotFoundError: one of the two files is not there.
        ValueError: a damaged file, a key or a tensor whose meaning is not known, one that is
            missing, or a shape that does not fit the model.
    """
    folder = Path(folder)
    config = safetensors.read_json_object(folder / _FILES[0])
    rank, scale = _check(config, folder / _FILES[0])
    tensors = safetensors.read_tensors(folder / _FILES[1])

    def read(name: str, shape: tuple[int, ...]) -> jax.Array:
        if (found := tensors[name].shape) != shape:
            raise ValueError(f"{folder}: {name} must have shape {shape}, got {found}")
        used.add(name)
        return jnp.asarray(tensors[name].read(0, shape[0]))

    used: set[str] = set()
    adapter, missing = [], []
    for i, (places, layer) in enumerate(
        zip(_tensor_sources(cfg), abstract(cfg).layers, strict=True)
    ):
        height: dict[str, int] = {}  # of B: GPT-2 has one for queries, keys and values together
        for part, source in places.items():
            out = getattr(layer, part).weight.shape[0]
            height[source.name] = height.get(source.name, 0) + out
        own = {}
        for part, source in places.items():
            a, b = (_tensor_name(source, letter) for letter in "AB")
            if a not in tensors and b not in tensors and not _is_target(source, i, config):
                continue
            if lacking := [name for name in (a, b) if name not in tensors]:
                missing += lacking
                continue
            out, inner = getattr(layer, part).weight.shape
            whole = read(b, (height[source.name], rank))
            b = whole[source.first_row : source.first_row + out]
            own[part] = Lora(a=read(a, (rank, inner)), b=b, scale=scale)
        adapter.append(own)
    if missing:
        raise ValueError(f"{folder}: lacks {missing[0]}, and {len(missing) - 1} others")
    if unknown := sorted(tensors.keys() - used):
        raise ValueError(f"{folder}: holds {unknown[0]}, which this model has no place for")
    return tuple(adapter)


def save(folder: Path, adapter: Adapter, cfg: Config, *, base_model: str | None = None) -> None:
    """Writes an adapter as PEFT does.

    Args:
        base: name or folder of the model it was made for, noted for other tools.

    Raises:
        ValueError: ranks or scales differ, or GPT-2's queries, keys and values do not share A.
    """
    tensors: dict[str, np.ndarray] = {}
    adapted, everywhere, kinds = set(), set(), set()
    layers = _tensor_sources(cfg)
    for places, own in zip(layers, adapter, strict=True):
        sharing: dict[TensorSource, list[str]] = {}  # parts of one module: GPT-2's q, k and v
        for part, source in places.items():
            sharing.setdefault(replace(source, first_row=0), []).append(part)
        everywhere |= {_module(source) for source in sharing}
        for source, parts in sharing.items():
            found = [own[part] for part in parts if part in own]
            if not found:
                continue
            if len(found) < len(parts) or any((lora.a != found[0].a).any() for lora in found[1:]):
                raise ValueError(
                    f"{source.name} has one A for {', '.join(parts)}; an adapter of some of them, "
                    "or with several, cannot be written: merge it"
                )
            tensors[_tensor_name(source, "A")] = np.asarray(found[0].a)
            tensors[_tensor_name(source, "B")] = np.concatenate([lora.b for lora in found])
            kinds |= {(len(lora.a), lora.scale) for lora in found}
            adapted.add(_module(source))
    if len(kinds) != 1:
        raise ValueError(f"all parts must have one rank and one scale, got {sorted(kinds)}")
    ((rank, scale),) = kinds
    short = sorted({module.rsplit(".", 1)[1] for module in adapted})
    is_enough = adapted == {name for name in everywhere if name.rsplit(".", 1)[1] in short}
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
        "target_modules": short if is_enough else sorted(adapted),
    }
    safetensors.write(Path(folder), config, tensors, names=_FILES)


def _tensor_sources(cfg: Config) -> list[dict[str, TensorSource]]:
    """For each layer, where the weights of its parts stand in Hugging Face's layout."""
    tree = tensor_sources(cfg, "hf", architecture=families.to_hf(cfg)["model_type"])
    return [
        {
            part: getattr(layer, part).weight
            for part in TARGET_MODULES
            if getattr(layer, part) is not None
        }
        for layer in tree.layers
    ]


def _module(source: TensorSource) -> str:
    return source.name.removesuffix(".weight")


def _tensor_name(source: TensorSource, letter: str) -> str:
    return f"base_model.model.{_module(source)}.lora_{letter}.weight"


def _is_target(source: TensorSource, layer: int, config: Mapping[str, Any]) -> bool:
    """Whether the config lists this weight as adapted; a pattern instead of a list is not read."""
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if not isinstance(targets, list) or (layers and layer not in layers):
        return False
    return any(f".{_module(source)}".endswith(f".{target}") for target in targets)


def _check(config: Mapping[str, Any], path: Path) -> tuple[int, float]:
    """Rank and scale, if there is nothing in the config that we would get wrong."""
    for key, value in config.items():
        if key in _SUPPORTED_VALUES:
            if value not in _SUPPORTED_VALUES[key]:
                allowed = " or ".join(map(repr, _SUPPORTED_VALUES[key]))
                raise ValueError(f"{path}: {key} must be {allowed}, got {value!r}")
        elif key not in _IGNORED_KEYS | _READ_KEYS:
            raise ValueError(f"{path}: has the key {key!r}, whose meaning is not known")
    if missing := [
        k for k in ("peft_type", "r", "lora_alpha", "target_modules") if k not in config
    ]:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    rank, alpha = config["r"], config["lora_alpha"]
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{path}: r must be a positive integer, got {rank!r}")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{path}: lora_alpha must be a number, got {alpha!r}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
