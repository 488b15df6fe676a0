"""Weights from files: find the tensors by name, put them right, and fill the tree of `Params`.

Loading is strict both ways: a tensor that is missing, has another shape, or has a name nobody asks
for raises. It goes tensor by tensor and, for large ones, slab by slab, so that the memory needed is
that of the weights in their final format and little more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer import families, quarot
from transformer.checkpoint import gguf, safetensors
from transformer.checkpoint.gguf import LazyTensor
from transformer.checkpoint.names import TensorSource, rows_per_tensor, tensor_sources
from transformer.config import Config
from transformer.decoder import Params, abstract
from transformer.weights import Linear

Dtype = Literal["float32", "bfloat16", "int8"]

# Rotary tables and masks that some exporters store though they follow from the config.
_IGNORED_TENSORS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
# What names begin with, but for the head's; a model saved without its head lacks it.
_PREFIXES = {"gpt2": "transformer."}
_PREFIX = "model."  # of the other families
_SLAB_BYTES = 32 * 2**20  # of float32 rows held at once


class Header(NamedTuple):
    """What the files of a decoder say before their weights are read.

    Attributes:
        metadata: of the GGUF file, or config.json.
        tensors: by name; they are read when asked for.
        cfg: the sizes.
        scheme: of the names, "hf" or "gguf".
        architecture: as the files call it.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]
    cfg: Config
    scheme: str
    architecture: str


def load(
    path: Path,
    *,
    dtype: Dtype = "float32",
    on_progress: Callable[[float], None] = lambda done: None,
    header: Header | None = None,
) -> tuple[Params, Config, Mapping[str, Any]]:
    """Loads a decoder from a GGUF file or a Hugging Face folder.

    Args:
        path: a `.gguf` file, or a folder with config.json and safetensors.
        format: what the weight matrices become; norms and biases stay float32. In "int8" the
            stream is turned (`rotation.py`), or, where it cannot be, the maps that write to it
            are bfloat16.
        notify: called with the fraction loaded so far.
        header: of these files, where it was read already.

    Returns:
        The weights, the config, and the metadata (of the GGUF file, or config.json).

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a damaged file, a pickle, an unknown model, key, tensor or shape.
    """
    path = Path(path)
    metadata, tensors, cfg, scheme, architecture = header or read_header(path)
    return build_params(tensors, cfg, scheme, architecture, path, dtype, on_progress), cfg, metadata


def read_config(path: Path) -> Config:
    """What `load` would return as the config, without reading weights. Raises what it raises."""
    return read_header(Path(path)).cfg


def read_header(path: Path) -> Header:
    """What `load` begins with. Raises what it raises."""
    if path.is_dir():
        metadata, tensors = safetensors.read(path, ignore=_IGNORED_TENSORS)
        cfg, scheme, architecture = families.from_hf(metadata), "hf", metadata["model_type"]
        prefix = _PREFIXES.get(architecture, _PREFIX)
        if not any(name.startswith(prefix) for name in tensors):  # as GPT-2's first files
            tensors = {
                name if name.startswith("lm_head.") else prefix + name: tensor
                for name, tensor in tensors.items()
            }
    elif path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"):
        raise ValueError(
            f"{path}: pickled weights are never opened, because unpickling runs code from the "
            "file; give a .gguf file or a folder with safetensors"
        )
    else:
        metadata, tensors = gguf.read(path)
        factors = tensors.pop("rope_freqs.weight", None)
        if factors is not None and len(factors.shape) != 1:
            raise ValueError(f"{path}: rope_freqs.weight must have one axis, got {factors.shape}")
        cfg = families.from_gguf(
            metadata,
            has_head="output.weight" in tensors,
            rope_factors=None if factors is None else factors.read(0, factors.shape[0]).tolist(),
        )
        scheme, architecture = "gguf", metadata["general.architecture"]
    return Header(metadata, tensors, cfg, scheme, architecture)


def check_tensors(path: Path, header: Header) -> None:
    """Compare the names and shapes of tensors with those that the config asks for.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape.
    """
    _match_tensors(header.tensors, header.cfg, header.scheme, header.architecture, path)


def build_params(
    tensors: Mapping[str, LazyTensor],
    cfg: Config,
    scheme: str,
    architecture: str,
    path: Path,
    dtype: Dtype,
    on_progress: Callable[[float], None],
) -> Params:
    """Builds `Params` from named tensors; see `load`."""
    tree, infos, num_tensors = _match_tensors(tensors, cfg, scheme, architecture, path)
    done = 0
    turns = dtype == "int8" and quarot.can_rotate(cfg)

    def load_part(place: tuple[Any, ...], part: Any, info: Any) -> Any:
        nonlocal done
        done += 1
        on_progress(min(done / num_tensors, 1.0))
        if not isinstance(part, Linear):
            return jnp.asarray(_read(part, info.shape, tensors, cfg))
        name = place[-1].name
        slabs = _slabs(part.weight, info.weight.shape, tensors, cfg)
        bias = None if part.bias is None else _read(part.bias, info.bias.shape, tensors, cfg)
        is_wide = dtype == "int8" and name in quarot.int8_skip_modules(cfg)
        own = "bfloat16" if is_wide else dtype
        if turns and name in quarot.OUTPUT_PROJECTIONS:
            slabs = [(0, quarot.rotate_output_weight(np.concatenate([rows for _, rows in slabs])))]
            bias = None if bias is None else quarot.rotate_output_weight(bias[:, None])[:, 0]
        elif turns:
            gain = gain_of(place)
            slabs = ((start, quarot.rotate_input_weight(rows, gain)) for start, rows in slabs)
        return _make_linear(info.weight.shape, slabs, bias, own)

    def gain_of(place: tuple[Any, ...]) -> np.ndarray | None:
        """The scale of the norm that a map reads behind; None for the token table."""
        if place[-1].name == "embed":
            return None
        owner = tree if place[0].name != "layers" else tree.layers[place[1].idx]
        norm = getattr(owner, quarot.INPUT_PROJECTIONS[place[-1].name])
        return _read(norm.scale, (cfg.d_model,), tensors, cfg)

    is_part = lambda node: isinstance(node, Linear)  # noqa: E731
    params = jax.tree_util.tree_map_with_path(load_part, tree, infos, is_leaf=is_part)
    if turns and params.head is None:
        head = (jax.tree_util.GetAttrKey("head"),)
        params = params.replace(head=load_part(head, tree.embed, infos.embed))
    return quarot.strip_norm_weights(params) if turns else params


def _match_tensors(
    tensors: Mapping[str, LazyTensor], cfg: Config, scheme: str, architecture: str, path: Path
) -> tuple[Any, Any, int]:
    """Return the trees of sources and of shapes that the tensors match, and the number of tensors.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape.
    """
    if cfg.num_layers > len(tensors):  # before a tree of so many layers is built
        raise ValueError(f"{path}: {len(tensors)} tensors cannot make {cfg.num_layers} layers")
    tree, infos = tensor_sources(cfg, scheme, architecture=architecture), abstract(cfg)
    wanted = rows_per_tensor(tree, infos)
    given = {name for name in tensors if not name.endswith(_IGNORED_TENSORS)}
    if cfg.tie_embeddings and "lm_head.weight" in given:  # some exporters write the table twice
        given.discard("lm_head.weight")
        check_tied(tensors, "lm_head.weight", tree.embed.weight.name, path)
    if missing := sorted(wanted.keys() - given):
        raise ValueError(f"{path}: lacks {_first_names(missing)}")
    if unknown := sorted(given - wanted.keys()):
        raise ValueError(
            f"{path}: holds {_first_names(unknown)}, which this model has no place for"
        )
    for source, info in zip(jax.tree.leaves(tree), jax.tree.leaves(infos), strict=True):
        expected = (wanted[source.name], *info.shape[1:])
        expected = expected[::-1] if source.is_transposed else expected
        if (shape := tensors[source.name].shape) != expected:
            raise ValueError(f"{path}: {source.name} must have shape {expected}, got {shape}")
    return tree, infos, len(wanted)


def check_tied(tensors: Mapping[str, LazyTensor], head: str, table: str, path: Path) -> None:
    """Refuse a head that differs from the token table that it is said to be.

    Raises:
        ValueError: they differ.
    """
    if table not in tensors:
        return  # which is an error of its own
    (rows, *rest), same = tensors[head].shape, tensors[head].shape == tensors[table].shape
    slab = max(_SLAB_BYTES // (4 * max(math.prod(rest), 1)), 1)
    for start in range(0, rows if same else 0, slab):
        stop = min(start + slab, rows)
        same = np.array_equal(tensors[head].read(start, stop), tensors[table].read(start, stop))
        if not same:
            break
    if not same:
        raise ValueError(
            f"{path}: {head} differs from {table}, but the config ties them; set "
            "tie_word_embeddings to false in config.json if the model has a head of its own"
        )


def save(folder: Path, params: Params, cfg: Config) -> None:
    """Writes float32 weights as a Hugging Face folder that `load` and other tools read back.

    Raises:
        ValueError: the weights are int8, which this layout has no place for.
    """
    if params.embed.scale is not None:
        raise ValueError("int8 weights are a serving format; save the weights they were made from")
    config = families.to_hf(cfg)
    parts: dict[str, list[np.ndarray]] = {}

    def put(source: TensorSource, array: jax.Array) -> None:
        parts.setdefault(source.name, []).append(np.asarray(array))  # in the order of their rows
        if source.is_transposed:
            parts[source.name][-1] = parts[source.name][-1].T

    tree = tensor_sources(cfg, "hf", architecture=config["model_type"])
    jax.tree.map(put, tree, params)
    transposed = {source.name for source in jax.tree.leaves(tree) if source.is_transposed}
    tensors = {
        name: np.ascontiguousarray(np.concatenate(arrays, axis=1 if name in transposed else 0))
        for name, arrays in parts.items()
    }
    safetensors.write(Path(folder), config, tensors)


def _make_linear(
    shape: tuple[int, ...],
    slabs: Iterable[tuple[int, np.ndarray]],
    bias: np.ndarray | None,
    dtype: Dtype,
) -> Linear:
    numpy_dtype = {"float32": np.float32, "bfloat16": jnp.bfloat16, "int8": np.int8}[dtype]
    weight = np.empty(shape, numpy_dtype)
    scale = np.empty(shape[:1], np.float32) if dtype == "int8" else None
    for start, rows in slabs:
        stop = start + len(rows)
        if scale is not None:
            # Same arithmetic as `layers.quantize`, in place and without a second copy.
            scale[start:stop] = np.maximum(np.abs(rows).max(axis=1), 1e-30) / np.float32(127)
            weight[start:stop] = np.rint(rows / scale[start:stop, None])
        else:
            weight[start:stop] = rows
    return Linear(
        weight=jnp.asarray(weight),
        bias=None if bias is None else jnp.asarray(bias),
        scale=None if scale is None else jnp.asarray(scale),
    )


def _read(source: TensorSource, shape: tuple[int, ...], tensors, cfg: Config) -> np.ndarray:
    return np.concatenate([rows for _, rows in _slabs(source, shape, tensors, cfg)])


def _slabs(
    source: TensorSource, shape: tuple[int, ...], tensors: Mapping[str, LazyTensor], cfg: Config
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (row to begin at, float32 rows) of the weight that `source` describes, in order."""
    read, first = tensors[source.name].read, source.first_row
    if source.is_transposed:
        yield 0, read(0, shape[1]).T[first : first + shape[0]]
        return
    # Whole heads, so that interleaved rows can be put right within a slab.
    slab = max(_SLAB_BYTES // (4 * math.prod(shape[1:])) // cfg.head_dim, 1) * cfg.head_dim
    for start in range(0, shape[0], slab):
        rows = read(first + start, first + min(start + slab, shape[0]))
        if source.is_interleaved:
            rows = _deinterleave(rows, cfg.head_dim)
        yield start, rows - 1 if source.is_shifted else rows


def _deinterleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rotary pairs from (0, 1), (2, 3), ... to (0, H/2), (1, H/2 + 1), ..., head by head."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
