"""Load and save weights: find tensors by name, convert them and fill the tree of `Params`.

Loading is strict: a tensor that is missing, unknown or of another shape raises ValueError. Tensors
are loaded one after another, and large ones in slabs of rows, so that the peak memory is little
more than the size of the weights in their final dtype.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer import gguf_config, hf_config, quant, quarot
from transformer.checkpoint import gguf, safetensors
from transformer.checkpoint.gguf import LazyTensor
from transformer.checkpoint.names import (
    TensorSource,
    join_rows,
    rows_of,
    rows_per_tensor,
    tensor_sources,
    tensors_of,
)
from transformer.config import Config
from transformer.decoder import Params, abstract
from transformer.weights import BlockWeight, Linear

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "int8", "int4"]

# Rotary frequencies and masks that some exporters store, although they follow from the config.
_IGNORED_TENSORS = (
    "rotary_emb.inv_freq",
    *(".attn.bias", ".attn.masked_bias"),  # GPT-2
    *(".attention.bias", ".attention.masked_bias"),  # GPT-NeoX
)
# The prefix of the tensor names of a model with a head, except the head itself.
_PREFIXES = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}
_PREFIX = "model."  # the prefix in the other families
_HEADS = ("lm_head.weight", "embed_out.weight")
# GGUF tensors with numbers that belong to the config: RoPE scaling of Llama 3 and LongRoPE.
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
# Size of the float32 rows converted at once; rotation and quantization need about six copies.
_SLAB_BYTES = 4 * 2**20


class Header(NamedTuple):
    """The metadata, the config and the tensor index of a decoder's files, without weight data.

    Attributes:
        metadata: Metadata of the GGUF file, or the content of config.json.
        tensors: Tensor name -> tensor whose data is read later.
        cfg: Config of the decoder.
        scheme: Naming scheme of the tensors, "hf" or "gguf".
        architecture: model_type in config.json, or general.architecture in the GGUF file.
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
    """Load a decoder from a GGUF file or a Hugging Face folder.

    Args:
        path: A `.gguf` file, or a folder with config.json and safetensors.
        dtype: Dtype of the weights of linear maps and of the embedding; norms and biases are always
            float32. "int8" also rotates the weights (`quarot.py`), or keeps the output projections
            in bfloat16 if they cannot be rotated. "int4" stores blocks of 4 bits, or of 8 bits for
            the embedding, the head, and tensors that have more than 4 bits in the file; weights of
            experts, and weights whose rows cannot be cut into blocks, are bfloat16.
        on_progress: Called with the fraction of the tensors loaded so far, from 0 to 1.
        header: Result of `read_header(path)`, if the caller has read it already.

    Returns:
        The weights, the config, and the metadata of the GGUF file or the content of config.json.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is damaged or a pickle, or a model type, key, tensor or shape is not
            supported.
    """
    path = Path(path)
    metadata, tensors, cfg, scheme, architecture = header or read_header(path)
    return build_params(tensors, cfg, scheme, architecture, path, dtype, on_progress), cfg, metadata


def read_config(path: Path) -> Config:
    """Return the config that `load` returns, without reading weights; raises as `load`."""
    return read_header(Path(path)).cfg


def read_header(path: Path) -> Header:
    """Read the metadata, the config, and names and shapes of the tensors; raises as `load`."""
    if path.is_dir():
        metadata, tensors = safetensors.read(path, ignore=_IGNORED_TENSORS)
        cfg, scheme, architecture = hf_config.from_hf(metadata), "hf", metadata["model_type"]
        tensors = with_prefix(tensors, architecture)
    elif path.suffix in safetensors.PICKLE_SUFFIXES:
        raise ValueError(
            f"{path}: pickled weights are never opened, because unpickling runs code from the "
            "file; convert them in an isolated environment: "
            f"{safetensors.conversion_command(path)}"
        )
    else:
        metadata, tensors = gguf.read(path)
        factors = {}
        for name in _ROPE_TENSORS:
            if (tensor := tensors.pop(name, None)) is not None:
                if len(tensor.shape) != 1:
                    raise ValueError(f"{path}: {name} must have one axis, got {tensor.shape}")
                factors[name.removesuffix(".weight")] = tensor.read(0, tensor.shape[0]).tolist()
        cfg = gguf_config.from_gguf(
            metadata, has_head="output.weight" in tensors, rope_factors=factors
        )
        scheme, architecture = "gguf", metadata["general.architecture"]
    return Header(metadata, tensors, cfg, scheme, architecture)


def with_prefix(tensors: Mapping[str, LazyTensor], architecture: str) -> Mapping[str, LazyTensor]:
    """Rename the tensors of a Hugging Face folder as in a model that was saved with its head.

    Tensor names of a model that was saved without its head have no prefix (GPT-2's first files).
    The head of a GPT-NeoX has two names: `embed_out`, and the `lm_head` that transformers 5 writes,
    as in other families.

    Args:
        tensors: Tensors by name.
        architecture: model_type in config.json.
    """
    prefix = _PREFIXES.get(architecture, _PREFIX)
    if not any(name.startswith(prefix) for name in tensors):
        tensors = {
            name if name in _HEADS else prefix + name: tensor for name, tensor in tensors.items()
        }
    if architecture == "gpt_neox" and _HEADS[0] in tensors:
        tensors = {
            _HEADS[1] if name == _HEADS[0] else name: tensor for name, tensor in tensors.items()
        }
    return tensors


def check_tensors(path: Path, header: Header) -> None:
    """Check that names and shapes of the tensors match the config.

    Raises:
        ValueError: A tensor is missing, unknown, or of another shape.
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
    """Build `Params` from named tensors.

    Args:
        tensors: Tensors by name.
        cfg: Config of the decoder.
        scheme: As in `Header`.
        architecture: As in `Header`.
        path: Path of the files, for error messages.
        dtype: As in `load`.
        on_progress: As in `load`.

    Returns:
        The weights.

    Raises:
        ValueError: As `load`.
    """
    tree, infos, num_tensors = _match_tensors(tensors, cfg, scheme, architecture, path)
    num_loaded = 0
    is_rotated = dtype == "int8" and quarot.can_rotate(cfg)

    def load_node(key_path: tuple[Any, ...], node: Any, info: Any) -> Any:
        nonlocal num_loaded
        num_loaded += 1
        on_progress(min(num_loaded / num_tensors, 1.0))
        name = key_path[-1].name
        if not is_linear(node):
            array = _read(node, info.shape, tensors, cfg)
            if is_rotated and name in quarot.INPUT_PROJECTIONS:  # a router
                array = quarot.rotate_input_weight(array, norm_weight(key_path))
            return jnp.asarray(array)
        bias = None if node.bias is None else _read(node.bias, info.bias.shape, tensors, cfg)
        if dtype == "int4" and quant.has_blocks(info.weight.shape):
            bias = None if bias is None else jnp.asarray(bias)
            bits = quant.bits_of(name, tensors[node.weight.name].dtype)
            return Linear(_block_weight(node.weight, info.weight.shape, tensors, cfg, bits), bias)
        slabs = _slabs(node.weight, info.weight.shape, tensors, cfg)
        is_skipped = dtype == "int4" or (dtype == "int8" and name in quarot.int8_skip_modules(cfg))
        if is_rotated and name in quarot.OUTPUT_PROJECTIONS:
            slabs = _rotated_outputs(slabs, info.weight.shape[-2:])
            if bias is not None:  # a row vector like x, or one for each expert
                bias = quarot.rotate_input_weight(np.atleast_2d(bias)).reshape(bias.shape)
        elif is_rotated:
            scale = norm_weight(key_path)
            slabs = ((start, quarot.rotate_input_weight(rows, scale)) for start, rows in slabs)
        return _make_linear(info.weight.shape, slabs, bias, "bfloat16" if is_skipped else dtype)

    def norm_weight(key_path: tuple[Any, ...]) -> np.ndarray | None:
        """Return the weights of the norm before a linear map; None for the token embedding."""
        if key_path[-1].name == "embed":
            return None
        parent = tree if key_path[0].name != "layers" else tree.layers[key_path[1].idx]
        norm = getattr(parent, quarot.INPUT_PROJECTIONS[key_path[-1].name])
        return _read(norm.scale, (cfg.d_model,), tensors, cfg)

    is_linear = lambda node: isinstance(node, Linear)  # noqa: E731
    params = jax.tree_util.tree_map_with_path(load_node, tree, infos, is_leaf=is_linear)
    if is_rotated and params.head is None:
        key_path = (jax.tree_util.GetAttrKey("head"),)
        params = params.replace(head=load_node(key_path, tree.embed, infos.embed))
    return quarot.strip_norm_weights(params) if is_rotated else params


def _match_tensors(
    tensors: Mapping[str, LazyTensor], cfg: Config, scheme: str, architecture: str, path: Path
) -> tuple[Any, Any, int]:
    """Check the tensors against the config.

    Returns:
        The tree of `TensorSource`, the tree of `ArrayInfo`, and the number of tensors.

    Raises:
        ValueError: A tensor is missing, unknown, or of another shape.
    """
    if cfg.num_layers > len(tensors):  # checked before a tree of so many layers is built
        raise ValueError(f"{path}: {len(tensors)} tensors are too few for {cfg.num_layers} layers")
    tree: Any = tensor_sources(cfg, scheme, architecture=architecture, names=tensors.keys())
    infos = abstract(cfg)
    num_rows = rows_per_tensor(tree, infos)
    names = {name for name in tensors if not name.endswith(_IGNORED_TENSORS)}
    head = next((name for name in _HEADS if name in names), None)
    if cfg.tie_embeddings and head is not None:  # some exporters store tied weights twice
        names.discard(head)
        check_tied(tensors, head, tree.embed.weight.name, path)
    check_names(names, num_rows.keys(), tensors, path)
    for weight, info in zip(jax.tree.leaves(tree), jax.tree.leaves(infos), strict=True):
        for source, part in tensors_of(weight, info.shape):
            experts, part = (part[:1], part[1:]) if source.has_experts else ((), part)
            expected = (num_rows[source.name], *part[1:])
            expected = (*experts, *(expected[::-1] if source.is_transposed else expected))
            tensor = tensors[source.name]
            if tensor.shape != expected:
                raise ValueError(
                    f"{tensor.path}: {source.name} must have shape {expected}, got {tensor.shape}"
                )
    return tree, infos, len(num_rows)


def check_names(
    names: Set[str], expected: Set[str], tensors: Mapping[str, LazyTensor], path: Path
) -> None:
    """Check that files have the tensors of a model, and no others except zero biases.

    Args:
        names: Names of the tensors in the files, without those that are ignored.
        expected: Names of the tensors of the model.
        tensors: Tensors by name.
        path: Path of the files, for error messages.

    Raises:
        ValueError: A tensor is missing or unknown.
    """
    if missing := sorted(expected - names):
        raise ValueError(f"{path}: missing tensors: {_first_names(missing)}")
    if unknown := _without_zero_biases(sorted(names - expected), tensors):
        raise ValueError(
            f"{tensors[unknown[0]].path}: tensors that are not part of this model: "
            f"{_first_names(unknown)}"
        )


def _without_zero_biases(names: list[str], tensors: Mapping[str, LazyTensor]) -> list[str]:
    """Return the names of tensors without those of biases that are zero, and log these.

    GPTQ files have such a bias for a linear map without a bias.
    """
    zeros = [
        name
        for name in names
        if name.endswith(".bias")
        and f"{name.removesuffix('bias')}weight" in tensors
        and len(tensors[name].shape) == 1
        and not tensors[name].read(0, tensors[name].shape[0]).any()
    ]
    if zeros:
        log.warning("ignoring %d biases that are zero, such as %s", len(zeros), zeros[0])
    return [name for name in names if name not in zeros]


def check_tied(tensors: Mapping[str, LazyTensor], head: str, embedding: str, path: Path) -> None:
    """Check that the head of a model with tied embeddings equals the embedding.

    Args:
        tensors: Tensors by name.
        head: Name of the head's tensor.
        embedding: Name of the embedding's tensor; if it is missing, nothing is checked.
        path: Path of the files, for error messages.

    Raises:
        ValueError: The tensors differ.
    """
    if embedding not in tensors:
        return  # the caller reports the missing tensor
    (rows, *rest), is_same = tensors[head].shape, tensors[head].shape == tensors[embedding].shape
    slab = max(_SLAB_BYTES // (4 * max(math.prod(rest), 1)), 1)
    for start in range(0, rows if is_same else 0, slab):
        stop = min(start + slab, rows)
        is_same = np.array_equal(
            tensors[head].read(start, stop), tensors[embedding].read(start, stop)
        )
        if not is_same:
            break
    if not is_same:
        raise ValueError(
            f"{path}: {head} differs from {embedding}, but tie_word_embeddings is true; set it to "
            "false in config.json if the embeddings are not tied"
        )


def save(folder: Path, params: Params, cfg: Config) -> None:
    """Save float32 weights as a Hugging Face folder.

    Args:
        folder: Folder to write to; it is created if it does not exist.
        params: Weights of the decoder.
        cfg: Config of the decoder.

    Raises:
        ValueError: The weights are int8 or int4, which the Hugging Face layout cannot store, or no
            Hugging Face model type matches the config.
    """
    if params.embed.is_quantized:
        raise ValueError(
            "int8 and int4 weights cannot be saved; save the float weights they were made from"
        )
    config = hf_config.to_hf(cfg)
    parts_by_tensor: dict[str, list[np.ndarray]] = {}

    sources: dict[str, TensorSource] = {}

    def add(weight: TensorSource, array: jax.Array) -> None:
        numbers = np.asarray(array)
        for e, (source, _) in enumerate(tensors_of(weight, array.shape)):
            part = numbers if source is weight else numbers[e]
            sources.setdefault(source.name, source)
            parts_by_tensor.setdefault(source.name, []).append(part)  # in the order of their rows

    jax.tree.map(add, tensor_sources(cfg, "hf", architecture=config["model_type"]), params)
    tensors = {}
    for name, arrays in parts_by_tensor.items():
        source = sources[name]

        def join(parts: Sequence[np.ndarray], source=source) -> np.ndarray:
            joined = join_rows(source, parts)
            return joined.T if source.is_transposed else joined

        has_experts = source.has_experts
        joined = np.stack([*map(join, zip(*arrays, strict=True))]) if has_experts else join(arrays)
        tensors[name] = np.ascontiguousarray(joined)
    safetensors.write(Path(folder), config, tensors)


def _make_linear(
    shape: tuple[int, ...],
    slabs: Iterable[tuple[int, np.ndarray]],
    bias: np.ndarray | None,
    dtype: Dtype,
) -> Linear:
    numpy_dtype = {"float32": np.float32, "bfloat16": jnp.bfloat16, "int8": np.int8}[dtype]
    num_rows = math.prod(shape[:-1])  # of all experts
    weight = _aligned_empty((num_rows, shape[-1]), numpy_dtype)
    scale = np.empty(num_rows, np.float32) if dtype == "int8" else None
    for start, rows in slabs:
        stop = start + len(rows)
        if scale is not None:
            # The arithmetic of `layers.quantize`, in place and without a second copy.
            scale[start:stop] = np.maximum(np.abs(rows).max(axis=1), 1e-30) / np.float32(127)
            weight[start:stop] = np.rint(rows / scale[start:stop, None])
        else:
            weight[start:stop] = rows
    return Linear(
        weight=jax.device_put(weight.reshape(shape), may_alias=True),
        bias=None if bias is None else jnp.asarray(bias),
        scale=None if scale is None else jnp.asarray(scale.reshape(shape[:-1])),
    )


def _block_weight(
    source: TensorSource,
    shape: tuple[int, ...],
    tensors: Mapping[str, LazyTensor],
    cfg: Config,
    bits: int,
) -> BlockWeight:
    """Return a weight [out, in] in blocks, with the integers of the file where it has such blocks.

    Args:
        source: Source of the weight.
        shape: Shape of the weight.
        tensors: Tensors by name.
        cfg: Config of the decoder.
        bits: Bits of the blocks, 4 or 8.
    """
    num_rows, num_columns = shape
    tensor = tensors[source.name]
    groups = quant.empty(num_rows, num_columns, bits)
    is_exact = tensor.read_raw is not None and tensor.dtype in quant.GGUF_BITS
    is_exact = is_exact and not source.is_transposed and quant.GGUF_BITS[tensor.dtype] == bits
    quantize = quant.quantize_4bit if bits == 4 else quant.quantize_8bit
    for start, rows in _slabs(source, shape, tensors, cfg, is_raw=is_exact):
        blocks = quant.from_gguf(rows, tensor.dtype) if is_exact else quantize(rows)
        quant.pack(groups, start, blocks)
    return quant.from_groups(groups, num_rows)


def _aligned_empty(shape: tuple[int, int], dtype: Any) -> np.ndarray:
    """Return an array that JAX takes on a CPU without a copy: it begins at a multiple of 64."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(num_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def _read(source: TensorSource, shape: tuple[int, ...], tensors, cfg: Config) -> np.ndarray:
    rows = [rows for _, rows in _slabs(source, shape, tensors, cfg)]
    return np.concatenate(rows).reshape(shape)


def _slabs(
    weight: TensorSource,
    shape: tuple[int, ...],
    tensors: Mapping[str, LazyTensor],
    cfg: Config,
    *,
    is_raw: bool = False,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield a weight in slabs: (index of the first row, float32 rows), in order.

    The rows of all experts are numbered consecutively: those of expert 1 follow those of expert 0.

    Args:
        weight: Source of the weight.
        shape: Shape of the weight.
        tensors: Tensors by name.
        cfg: Config of the decoder.
        is_raw: Whether to yield the bytes of the rows as in the file (`LazyTensor.read_raw`).
    """
    if weight.has_experts:
        for e in range(shape[0]):
            rows = tensors[weight.name].read(e, e + 1)[0]
            yield e * shape[1], rows_of(rows.T if weight.is_transposed else rows, weight, shape[1])
        return
    for e, (source, part) in enumerate(tensors_of(weight, shape)):
        for start, rows in _slabs_of_tensor(source, part, tensors[source.name], cfg, is_raw):
            yield e * part[0] + start, rows


def _slabs_of_tensor(
    source: TensorSource, shape: tuple[int, ...], tensor: LazyTensor, cfg: Config, is_raw: bool
) -> Iterator[tuple[int, np.ndarray]]:
    read, first = tensor.read_raw if is_raw else tensor.read, source.first_row
    assert read is not None
    if source.is_transposed:
        yield 0, read(0, shape[1]).T[first : first + shape[0]]
        return
    # Whole heads, so that interleaved rows can be reordered within a slab.
    slab = max(_SLAB_BYTES // (4 * math.prod(shape[1:])) // cfg.head_dim, 1) * cfg.head_dim
    for start in range(0, shape[0], slab):
        stop = min(start + slab, shape[0])
        if source.stride:
            groups = read(*(n // source.group * source.stride for n in (start, stop)))
            rows = rows_of(groups, source, stop - start)
        else:
            rows = read(first + start, first + stop)
        if source.is_interleaved:
            rows = _deinterleave(rows, cfg.head_dim)
        yield start, rows - 1 if source.is_shifted else rows


def _rotated_outputs(
    slabs: Iterable[tuple[int, np.ndarray]], shape: tuple[int, int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the slabs of an output projection, or of those of all experts, after its rotation.

    Args:
        slabs: Slabs of the weight before the rotation, from `_slabs`.
        shape: Shape of the projection, or of the projection of one expert: [D, columns].
    """
    num_rows, num_columns = shape
    columns = max(_SLAB_BYTES // (4 * num_rows), 1)
    weight = np.empty(shape, np.float32)
    start = 0
    for first, rows in slabs:
        stop = first + len(rows) - start
        weight[first - start : stop] = rows
        if stop == num_rows:
            for i in range(0, num_columns, columns):
                part = weight[:, i : i + columns]
                part[:] = quarot.rotate_output_weight(part)
            yield start, weight
            start += num_rows


def _deinterleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder rotary pairs from (0, 1), (2, 3), ... to (0, H/2), (1, H/2 + 1), ... in each head."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
