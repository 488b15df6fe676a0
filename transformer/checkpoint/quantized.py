"""Weights of integers with a few bits, as GPTQ, AWQ and compressed-tensors store them.

An int32 holds several integers, the first in its lowest bits. Consecutive inputs of an output form
a group with one scale and one zero point, and weight = scale * (integer - zero point):

    GPTQ                qweight [in / 8, out], qzeros [groups, out / 8], scales [groups, out],
                        g_idx [in] (Frantar et al. 2022, arXiv:2210.17323; layout of AutoGPTQ)
    AWQ                 qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]
                        (Lin et al. 2023, arXiv:2306.00978; layout "gemm" of AutoAWQ)
    compressed-tensors  weight_packed [out, in / 8], weight_scale [out, groups], weight_shape [2],
                        and maybe weight_zero_point [out / 8, groups] and weight_g_idx [in]

The shapes are those of 4 bits. GPTQ with `desc_act` quantizes the inputs in the order of their
activations, so that those of a group are scattered; `g_idx` is the group of each input. AWQ stores
the eight outputs of an int32 in the order of its kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transformer import config_keys
from transformer.checkpoint.gguf import LazyTensor

_KEY = "quantization_config"
_BITS = (2, 4, 8)  # widths that fill an int32
_AWQ_POSITIONS = [0, 4, 1, 5, 2, 6, 3, 7]  # of the outputs within an int32
_GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_AWQ_PARTS = ("qweight", "qzeros", "scales")
_PACKED_PARTS = ("packed", "scale", "shape", "zero_point", "g_idx")
# Keys that describe how the weights were quantized, or with which kernel to multiply them.
_NEUTRAL = frozenset(
    """
    quant_method method meta backend tokenizer dataset damp_percent damp_auto_increment desc_act
    act_group_aware static_groups true_sequential mse model_seqlen block_name_to_quantize
    module_name_preceding_first_block batch_size pad_token_id max_input_length cache_block_outputs
    modules_in_block_to_quantize modules_to_not_convert use_cuda_fp16 use_exllama exllama_config
    disable_exllama model_name_or_path model_file_base_name lm_head dynamic do_fuse modules_to_fuse
    fuse_max_seq_len version format checkpoint_format bits w_bit group_size q_group_size sym
    zero_point pack_dtype is_marlin_format adapter config_groups ignore quantization_status
    global_compression_ratio kv_cache_scheme sparsity_config transform_config
    """.split()  # noqa: SIM905
)
_MakeWeight = Callable[[str, Mapping[str, LazyTensor]], LazyTensor]


class _Rows(NamedTuple):
    """A range of the rows of a weight: integers [N, in], scales and zero points [N, groups]."""

    integers: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | int


def dequantize(
    config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]
) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Return a config without its quantization, and tensors that are dequantized when read.

    GPTQ, AWQ and packed integers of compressed-tensors are supported. If the config has another
    quantization, or none, config and tensors are returned unchanged.

    Args:
        config: Content of config.json.
        tensors: Tensors by name; `read` of an integer tensor returns integers.

    Raises:
        ValueError: A key has a value that is not supported, or a tensor is missing or has an
            unexpected shape or dtype.
    """
    config, tensors = dict(config), dict(tensors)
    quantization = config.get(_KEY)
    if not isinstance(quantization, Mapping):
        return config, tensors
    method = quantization.get("quant_method")
    suffix = "."
    if method == "gptq":
        weight, parts = _check_gptq(quantization, config.get("model_type")), _GPTQ_PARTS
    elif method == "awq":
        weight, parts = _check_awq(quantization), _AWQ_PARTS
    elif method == "compressed-tensors" and quantization.get("format") == "pack-quantized":
        weight, parts, suffix = _check_packed(quantization), _PACKED_PARTS, ".weight_"
    else:
        return config, tensors
    unknown = sorted(str(key) for key in quantization.keys() - _NEUTRAL)
    config_keys.log_ignored_keys(f"config.json: {_KEY}", tuple(unknown))
    del config[_KEY]
    main = suffix + parts[0]
    for base in [name.removesuffix(main) for name in tensors if name.endswith(main)]:
        found = {
            part: tensors.pop(name) for part in parts if (name := base + suffix + part) in tensors
        }
        tensors[f"{base}.weight"] = weight(base + suffix, found)
    return config, tensors


def _check_gptq(quantization: Mapping[str, Any], model_type: Any) -> _MakeWeight:
    if model_type == "gpt2":
        raise ValueError(f"{_KEY}.quant_method 'gptq' is not supported for model_type 'gpt2'")
    key = "checkpoint_format" if quantization.get("checkpoint_format") else "format"
    name = _check({"format": "gptq"} | dict(quantization), key, ("gptq", "gptq_v2"))
    _check(quantization, "is_marlin_format", (None, False))
    _check(quantization, "pack_dtype", (None, "int32"))
    if quantization.get("adapter"):
        raise ValueError(f"{_KEY}.adapter is not supported, got {quantization['adapter']!r}")
    bits = _check(quantization, "bits", _BITS)
    group_size = _check_group_size(quantization, "group_size")
    is_symmetric = quantization.get("sym") is True
    return partial(_gptq, bits, group_size, name == "gptq_v2", is_symmetric)


def _check_awq(quantization: Mapping[str, Any]) -> _MakeWeight:
    quantization = {"version": "gemm", "zero_point": True} | dict(quantization)
    quantization["version"] = str(quantization["version"]).lower()
    _check(quantization, "version", ("gemm",))
    _check(quantization, "zero_point", (True,))
    _check(quantization, "backend", (None, "auto", "autoawq", "gptqmodel"))
    _check(quantization, "w_bit" if "w_bit" in quantization else "bits", (4,))
    key = "q_group_size" if "q_group_size" in quantization else "group_size"
    return partial(_awq, _check_group_size(quantization, key))


def _check_packed(quantization: Mapping[str, Any]) -> _MakeWeight:
    sparsity = quantization.get("sparsity_config") or {}
    _check(sparsity, "format", (None, "dense"), "sparsity_config.")
    if quantization.get("transform_config"):
        raise ValueError(f"{_KEY}.transform_config is not supported: it rotates activations")
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"{_KEY}.config_groups must be an object that is not empty")
    settings = set()
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        where = f"config_groups.{name}.weights."
        if not isinstance(weights, Mapping):
            raise ValueError(f"{_KEY}.{where.rstrip('.')} must be an object, got {weights!r}")
        _check(weights, "type", (None, "int"), where)
        _check(weights, "strategy", ("group", "channel"), where)
        bits = _check(weights, "num_bits", _BITS, where)
        is_symmetric = _check(weights, "symmetric", (None, True, False), where) is not False
        group_size = _check_group_size(weights, "group_size", where)
        settings.add((bits, group_size, is_symmetric))
    if len(settings) > 1:
        raise ValueError(
            f"{_KEY}.config_groups must have the same num_bits, group_size and symmetric, "
            f"got {sorted(settings)}"
        )
    return partial(_packed, *settings.pop())


def _check_group_size(values: Mapping[str, Any], key: str, where: str = "") -> int:
    """Return the number of inputs that share a scale, or 0 if all inputs of an output do."""
    value = values.get(key)
    if value in (None, -1) and not isinstance(value, bool):
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{_KEY}.{where}{key} must be a positive integer or -1, got {value!r}")
    return value


def _check(values: Mapping[str, Any], key: str, known: tuple[Any, ...], where: str = "") -> Any:
    value = values.get(key)
    if not any(value is item or (value == item and type(value) is type(item)) for item in known):
        names = " or ".join(repr(item) for item in known if item is not None)
        raise ValueError(f"{_KEY}.{where}{key} must be {names}, got {value!r}")
    return value


def _gptq(
    bits: int,
    group_size: int,
    is_v2: bool,
    is_symmetric: bool,
    name: str,
    parts: Mapping[str, LazyTensor],
) -> LazyTensor:
    """Return the weight [out, in] of GPTQ's tensors, whose names begin with `name`."""
    qweight, qzeros, scales = _take(name, parts, _GPTQ_PARTS[:3])
    per_word, middle = 32 // bits, 1 << bits - 1
    (num_words, num_rows), num_groups = qweight.shape, scales.shape[0]
    num_columns = num_words * per_word
    _check_shape(name + "scales", scales, (num_groups, num_rows))
    _check_shape(name + "qzeros", qzeros, (num_groups, -(-num_rows // per_word)))
    group = _groups(name, parts.get("g_idx"), num_columns, group_size, scales)
    # The first version of the format stores zero points minus one, modulo 2**bits.
    offset = 0 if is_v2 else 1
    if is_symmetric and not is_v2:
        # Some files of the second version are called "gptq". A symmetric zero point is known.
        stored = _unpack(qzeros.read(0, num_groups), bits, 1)[:, :num_rows]
        offset = 0 if (stored == middle).all() else 1

    def read(start: int, stop: int) -> _Rows:
        zeros = _unpack_range(qzeros.read(0, num_groups).T, start, stop, bits)
        return _Rows(
            _unpack(qweight.read(0, num_words)[:, start:stop], bits, 0).T,
            scales.read(0, num_groups)[:, start:stop].T,
            zeros + np.uint8(offset) & np.uint8((1 << bits) - 1),
        )

    return _weight(read, group, (num_rows, num_columns), qweight.path, f"GPTQ {bits}-bit")


def _awq(group_size: int, name: str, parts: Mapping[str, LazyTensor]) -> LazyTensor:
    """Return the weight [out, in] of AWQ's tensors, whose names begin with `name`."""
    qweight, qzeros, scales = _take(name, parts, _AWQ_PARTS)
    num_columns, num_rows = qweight.shape[0], qweight.shape[1] * 8
    num_groups = scales.shape[0]
    _check_shape(name + "scales", scales, (num_groups, num_rows))
    _check_shape(name + "qzeros", qzeros, (num_groups, num_rows // 8))
    group = _groups(name, None, num_columns, group_size, scales)

    def unpack(words: np.ndarray, start: int, stop: int) -> np.ndarray:
        first = start // 8
        integers = _unpack(words[:, first : -(-stop // 8)], 4, 1)
        integers = integers.reshape(len(words), -1, 8)[:, :, _AWQ_POSITIONS]
        return integers.reshape(len(words), -1)[:, start - 8 * first : stop - 8 * first].T

    def read(start: int, stop: int) -> _Rows:
        return _Rows(
            unpack(qweight.read(0, num_columns), start, stop),
            scales.read(0, num_groups)[:, start:stop].T,
            unpack(qzeros.read(0, num_groups), start, stop),
        )

    return _weight(read, group, (num_rows, num_columns), qweight.path, "AWQ 4-bit")


def _packed(
    bits: int, group_size: int, is_symmetric: bool, name: str, parts: Mapping[str, LazyTensor]
) -> LazyTensor:
    """Return the weight [out, in] of compressed-tensors' tensors, whose names begin with `name`."""
    packed, scales, sizes = _take(name, parts, _PACKED_PARTS[:3])
    per_word = 32 // bits
    _check_integers(name + "shape", sizes, ("I64", "I32"))
    _check_shape(name + "shape", sizes, (2,))
    num_rows, num_columns = (int(size) for size in sizes.read(0, 2))
    num_groups = scales.shape[-1]
    _check_shape(name + "packed", packed, (num_rows, -(-num_columns // per_word)))
    _check_shape(name + "scale", scales, (num_rows, num_groups))
    zero_point = parts.get("zero_point")
    if (zero_point is None) is not is_symmetric:
        raise ValueError(
            f"{packed.path}: {name}zero_point must be {'absent' if is_symmetric else 'present'}, "
            f"because the weights are {'' if is_symmetric else 'not '}symmetric"
        )
    if zero_point is not None:
        _check_integers(name + "zero_point", zero_point)
        _check_shape(name + "zero_point", zero_point, (-(-num_rows // per_word), num_groups))
    group = _groups(name, parts.get("g_idx"), num_columns, group_size, scales, axis=1)

    def read(start: int, stop: int) -> _Rows:
        zeros = 1 << bits - 1
        if zero_point is not None:
            zeros = _unpack_range(zero_point.read(0, zero_point.shape[0]), start, stop, bits)
        integers = _unpack(packed.read(start, stop), bits, 1)[:, :num_columns]
        return _Rows(integers, scales.read(start, stop), zeros)

    return _weight(read, group, (num_rows, num_columns), packed.path, f"packed {bits}-bit")


def _weight(
    read_rows: Callable[[int, int], _Rows],
    group: np.ndarray,
    shape: tuple[int, int],
    path: Path,
    dtype: str,
) -> LazyTensor:
    def read(start: int, stop: int) -> np.ndarray:
        rows = read_rows(start, stop)
        weight = rows.integers.astype(np.float32, order="C")
        weight -= rows.zeros if isinstance(rows.zeros, int) else rows.zeros[:, group]
        weight *= rows.scales[:, group]
        return weight

    return LazyTensor(shape, read, path, dtype)


def _unpack(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Return the integers in int32 words as uint8; along `axis`, 32 / bits replace each word."""
    words = np.expand_dims(np.ascontiguousarray(words).view(np.uint32), axis + 1)
    shifts = np.arange(0, 32, bits, dtype=np.uint32).reshape((-1, 1) if axis == 0 else (1, -1))
    integers = (words >> shifts & np.uint32((1 << bits) - 1)).astype(np.uint8)
    shape = list(integers.shape)
    shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
    return integers.reshape(shape)


def _unpack_range(words: np.ndarray, start: int, stop: int, bits: int) -> np.ndarray:
    """Return rows `start` to `stop` of the integers in words that are packed along axis 0."""
    per_word = 32 // bits
    first = start // per_word
    integers = _unpack(words[first : -(-stop // per_word)], bits, 0)
    return integers[start - first * per_word : stop - first * per_word]


def _groups(
    name: str,
    g_idx: LazyTensor | None,
    num_columns: int,
    group_size: int,
    scales: LazyTensor,
    axis: int = 0,
) -> np.ndarray:
    """Return the index of the group of each input.

    It is `g_idx` if the file has it; else each run of `group_size` inputs is a group.
    """
    num_groups = scales.shape[axis]
    if g_idx is None:
        group = np.arange(num_columns) // (group_size or num_columns)
        is_valid = group[-1] + 1 == num_groups
    else:
        _check_integers(name + "g_idx", g_idx)
        _check_shape(name + "g_idx", g_idx, (num_columns,))
        group = np.asarray(g_idx.read(0, num_columns))
        is_valid = group.min() >= 0 and group.max() < num_groups
    if not is_valid:
        raise ValueError(
            f"{scales.path}: the {num_columns} inputs of {name}* are in groups {group.min()} to "
            f"{group.max()}, but there are scales for {num_groups} groups"
        )
    return group


def _take(
    name: str, parts: Mapping[str, LazyTensor], names: tuple[str, ...]
) -> tuple[LazyTensor, ...]:
    """Return the tensors `names` of a quantized weight, in this order.

    Each must have two axes, and integers unless it has the scales.
    """
    first = next(iter(parts.values()))
    if missing := [part for part in names if part not in parts]:
        raise ValueError(
            f"{first.path}: the tensor {name}{missing[0]} of a quantized weight is missing"
        )
    for part in names:
        if part == "shape":
            continue
        if not part.startswith("scale"):
            _check_integers(name + part, parts[part])
        if len(parts[part].shape) != 2 or 0 in parts[part].shape:
            raise ValueError(
                f"{parts[part].path}: {name}{part} must have two axes, got {parts[part].shape}"
            )
    return tuple(parts[part] for part in names)


def _check_integers(name: str, tensor: LazyTensor, dtypes: tuple[str, ...] = ("I32",)) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(
            f"{tensor.path}: {name} must have the dtype {dtypes[0]}, got {tensor.dtype}"
        )


def _check_shape(name: str, tensor: LazyTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{tensor.path}: {name} must have shape {shape}, got {tensor.shape}")
