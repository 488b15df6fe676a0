"""Weights from files: find the tensors by name, put them right, and fill the tree of `Params`.

Loading is strict both ways: a tensor that is missing, has another shape, or has a name nobody asks
for raises. It goes tensor by tensor and, for large ones, slab by slab, so that the memory needed is
that of the weights in their final format and little more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from transformer.checkpoint import gguf, safetensors
from transformer.checkpoint.gguf import Tensor
from transformer.checkpoint.names import Source, all_names, sources
from transformer.config import Config
from transformer.decoder import Params, abstract
from transformer.layers import Linear

Format = Literal["float32", "bfloat16", "int8"]

# Rotary tables and masks that some exporters store though they follow from the config.
_DERIVED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", "rope_freqs.weight")
_SLAB_BYTES = 32 * 2**20  # of float32 rows held at once


def load(
    path: Path, *, format: Format = "float32", notify: Callable[[float], None] = lambda done: None
) -> tuple[Params, Config, Mapping[str, Any]]:
    """Loads a decoder from a GGUF file or a Hugging Face folder.

    Args:
        path: a `.gguf` file, or a folder with config.json and safetensors.
        format: what the weight matrices become; norms and biases stay float32.
        notify: called with the fraction loaded so far.

    Returns:
        The weights, the config, and the metadata (of the GGUF file, or config.json).

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a damaged file, a pickle, an unknown model, key, tensor or shape.
    """
    path = Path(path)
    if path.is_dir():
        metadata, tensors = safetensors.read(path)
        cfg, scheme, architecture = Config.from_hf(metadata), "hf", metadata["model_type"]
    elif path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"):
        raise ValueError(
            f"{path}: pickled weights are never opened, because unpickling runs code from the "
            "file; give a .gguf file or a folder with safetensors"
        )
    else:
        metadata, tensors = gguf.read(path)
        cfg = Config.from_gguf(metadata, has_head="output.weight" in tensors)
        scheme, architecture = "gguf", metadata["general.architecture"]
    return fill(tensors, cfg, scheme, architecture, path, format, notify), cfg, metadata


def fill(
    tensors: Mapping[str, Tensor],
    cfg: Config,
    scheme: str,
    architecture: str,
    path: Path,
    format: Format,
    notify: Callable[[float], None],
) -> Params:
    """Builds `Params` from named tensors; see `load`."""
    tree = sources(cfg, scheme, architecture=architecture)
    wanted = all_names(tree)
    given = {name for name in tensors if not name.endswith(_DERIVED)}
    if cfg.tie_embeddings:
        given.discard("lm_head.weight")  # some exporters write the tied table twice
    if missing := sorted(set(wanted) - given):
        raise ValueError(f"{path}: lacks {_some(missing)}")
    if unknown := sorted(given - set(wanted)):
        raise ValueError(f"{path}: holds {_some(unknown)}, which this model has no place for")

    done = 0

    def load_part(part: Any, info: Any) -> Any:
        nonlocal done
        if isinstance(part, Source):
            loaded = jnp.asarray(_read(part, info.shape, tensors, cfg, path))
        elif isinstance(part, Linear):
            loaded = _load_linear(part, info, tensors, cfg, path, format)
        else:
            loaded = jax.tree.map(load_part, part, info)
        done += 1
        notify(min(done / len(wanted), 1.0))
        return loaded

    is_part = lambda node: isinstance(node, Linear)  # noqa: E731
    return jax.tree.map(load_part, tree, abstract(cfg), is_leaf=is_part)


def save(folder: Path, params: Params, cfg: Config) -> None:
    """Writes float32 weights as a Hugging Face folder that `load` and other tools read back.

    Raises:
        ValueError: the weights are int8, which this layout has no place for.
    """
    if params.embed.scale is not None:
        raise ValueError("int8 weights are a serving format; save the weights they were made from")
    config = cfg.to_hf()
    tensors: dict[str, np.ndarray] = {}

    def put(source: Source, array: jax.Array) -> None:
        parts = np.split(np.asarray(array), np.cumsum(source.rows)[:-1])
        for name, part in zip(source.names, parts, strict=True):
            tensors[name] = np.ascontiguousarray(part.T if source.is_transposed else part)

    jax.tree.map(put, sources(cfg, "hf", architecture=config["model_type"]), params)
    safetensors.write(Path(folder), config, tensors)


def _load_linear(
    part: Linear, info: Linear, tensors: Mapping[str, Tensor], cfg: Config, path: Path, format: Format
) -> Linear:
    bias = None
    if part.bias is not None:
        bias = jnp.asarray(_read(part.bias, info.bias.shape, tensors, cfg, path))
    dtype = {"float32": np.float32, "bfloat16": jnp.bfloat16, "int8": np.int8}[format]
    weight = np.empty(info.weight.shape, dtype)
    scale = np.empty(info.weight.shape[:1], np.float32) if format == "int8" else None
    for start, rows in _slabs(part.weight, info.weight.shape, tensors, cfg, path):
        stop = start + len(rows)
        if scale is not None:
            # Same arithmetic as `layers.quantize`, in place and without a second copy.
            scale[start:stop] = np.maximum(np.abs(rows).max(axis=1), 1e-30) / np.float32(127)
            weight[start:stop] = np.rint(rows / scale[start:stop, None])
        else:
            weight[start:stop] = rows
    return Linear(
        weight=jnp.asarray(weight), bias=bias, scale=None if scale is None else jnp.asarray(scale)
    )


def _read(source: Source, shape, tensors, cfg: Config, path: Path) -> np.ndarray:
    return np.concatenate([rows for _, rows in _slabs(source, shape, tensors, cfg, path)])


def _slabs(source: Source, shape: tuple[int, ...], tensors, cfg: Config, path: Path):
    """Yields (first row, float32 rows) of the weight that `source` describes, in order."""
    at = 0
    for i, (name, num_rows) in enumerate(zip(source.names, source.rows, strict=True)):
        tensor = tensors[name]
        expected = (num_rows, *shape[1:])
        if source.is_transposed:
            expected = expected[::-1]
        if tensor.shape != expected:
            raise ValueError(f"{path}: {name} must have shape {expected}, got {tensor.shape}")
        if source.is_transposed:
            yield at, tensor.read(0, expected[0]).T
        else:
            width = int(np.prod(shape[1:]))
            # Whole heads, so that interleaved rows can be put right within a slab.
            slab = max(_SLAB_BYTES // (4 * width) // cfg.head_dim, 1) * cfg.head_dim
            for start in range(0, num_rows, slab):
                rows = tensor.read(start, min(start + slab, num_rows))
                if source.is_interleaved and source.is_interleaved[i]:
                    rows = _deinterleave(rows, cfg.head_dim)
                yield at + start, rows
        at += num_rows


def _deinterleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rotary pairs from (0, 1), (2, 3), ... to (0, H/2), (1, H/2 + 1), ..., head by head."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
