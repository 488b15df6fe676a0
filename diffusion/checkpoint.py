"""Networks on disk: a folder with `config.json` and `model.safetensors`, nothing pickled.

Weights are stored in float16 or float32 and are float32 in memory. Names are paths in the tree of
weights: `stages.1.down.0.first.weight`.
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
    """Writes a network."""
    kind = next(name for name, (known, _) in _KINDS.items() if type(cfg) is known)
    tensors = {
        name: np.ascontiguousarray(np.asarray(leaf, dtype=dtype))
        for name, leaf in _leaves_by_path(params).items()
    }
    safetensors.write(folder, {"kind": kind, **asdict(cfg)}, tensors)


def load(folder: Path) -> tuple[Any, Config]:
    """Reads a network; its weights are float32.

    Raises:
        OSError: a file is not there.
        ValueError: an unknown kind or key, or a tensor is missing, superfluous or misshapen.
    """
    folder = Path(folder)
    cfg, module = _read_config(folder / "config.json")
    tensors = safetensors.read_tensors(folder / "model.safetensors")
    like = jax.eval_shape(lambda: layers.init(jax.random.key(0), module.abstract(cfg)))
    wanted = _leaves_by_path(like)
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ValueError(f"{folder}: lacks {missing[0]!r} and {len(missing) - 1} others")
    if unknown := sorted(tensors.keys() - wanted.keys()):
        raise ValueError(f"{folder}: holds {unknown[0]!r}, which this network has no place for")
    leaves = []
    for name, leaf in wanted.items():
        if tensors[name].shape != leaf.shape:
            raise ValueError(
                f"{folder}: {name} must have shape {leaf.shape}, got {tensors[name].shape}"
            )
        leaves.append(jnp.asarray(tensors[name].read(0, leaf.shape[0])))
    return jax.tree.unflatten(jax.tree.structure(like), leaves), cfg


def _read_config(path: Path) -> tuple[Config, ModuleType]:
    values = safetensors.read_json_object(path)
    kind = values.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"{path}: kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    known, module = _KINDS[kind]
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return known(**fields), module
    except TypeError as error:  # a key too many, or one too few
        raise ValueError(f"{path}: {error}") from error


def _leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by the paths to them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
