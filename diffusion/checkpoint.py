"""Checkpoints of the networks: folders with `config.json` and `model.safetensors`, no pickles.

Weights are stored in float16 or float32 and loaded as float32. Tensor names are paths in the
pytree of weights: `stages.1.down.0.first.weight`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import dit, layers, unet, upscale
from diffusion.config import DiTConfig, UNetConfig, UpscalerConfig
from transformer.checkpoint import safetensors

Config = UNetConfig | DiTConfig | UpscalerConfig
_KINDS: dict[str, tuple[type, ModuleType]] = {
    "unet": (UNetConfig, unet),
    "dit": (DiTConfig, dit),
    "upscaler": (UpscalerConfig, upscale),
}


def save(
    folder: Path, params: Any, cfg: Config, *, dtype: Literal["float32", "float16"] = "float32"
) -> None:
    """Save a network.

    Args:
        folder: the folder to write config.json and model.safetensors to.
        params: the weights, a pytree of arrays.
        cfg: the config of the network.
        dtype: the dtype of the file.
    """
    kind = next(name for name, (config_type, _) in _KINDS.items() if type(cfg) is config_type)
    tensors = {
        name: np.ascontiguousarray(np.asarray(leaf, dtype=dtype))
        for name, leaf in _leaves_by_path(params).items()
    }
    safetensors.write(folder, {"kind": kind, **asdict(cfg)}, tensors)


def load(folder: Path) -> tuple[Any, Config]:
    """Load a network.

    Args:
        folder: holds config.json and model.safetensors.

    Returns:
        The float32 weights and the config.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: the config has an unknown `kind` of network or an unknown key, or a tensor is
            missing, unknown or has the wrong shape.
    """
    folder = Path(folder)
    cfg, module = _read_config(folder / "config.json")
    tensors = safetensors.read_tensors(folder / "model.safetensors")
    abstract_params = jax.eval_shape(lambda: layers.init(jax.random.key(0), module.abstract(cfg)))
    expected = _leaves_by_path(abstract_params)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(
            f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]!r}"
        )
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise ValueError(
            f"{folder}: {len(unknown)} tensors are unknown, the first is {unknown[0]!r}"
        )
    leaves = []
    for name, leaf in expected.items():
        if tensors[name].shape != leaf.shape:
            raise ValueError(
                f"{folder}: {name} must have shape {leaf.shape}, got {tensors[name].shape}"
            )
        leaves.append(jnp.asarray(tensors[name].read(0, leaf.shape[0])))
    return jax.tree.unflatten(jax.tree.structure(abstract_params), leaves), cfg


def _read_config(path: Path) -> tuple[Config, ModuleType]:
    values = safetensors.read_json_object(path)
    kind = values.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"{path}: kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    config_type, module = _KINDS[kind]
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return config_type(**fields), module
    except TypeError as error:  # an unknown or a missing key
        raise ValueError(f"{path}: {error}") from error


def _leaves_by_path(tree: Any) -> dict[str, Any]:
    """Return a dict from path, such as `stages.1.down.0.first.weight`, to leaf of a pytree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
