"""Read and write folders with safetensors files, the layout of Hugging Face checkpoints.

A folder has `config.json` and either `model.safetensors` or several shards that are listed in
`model.safetensors.index.json`. The `safetensors` package maps the files and checks their headers.
Pickled weights (`pytorch_model.bin`, `.pt`) are rejected, because unpickling runs code from the
file.
"""

from __future__ import annotations

import fnmatch
import functools
import glob
import json
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from transformer import config_keys
from transformer.checkpoint import fp8, mxfp4, quantized
from transformer.checkpoint.gguf import LazyTensor

_FLOATS = ("F32", "F16", "BF16", "F64")
_FLOATS8 = {"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2}
_INTEGERS = {  # of quantized weights
    "U8": np.uint8, "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
}  # fmt: skip
_INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Names of transformers and of Meta's Llama; adapters and old files have others.
_WEIGHT_PICKLES = ("pytorch_model*.bin", "consolidated*.pth")


def read(
    folder: Path, *, ignore: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Read `config.json` and open the tensors of a folder.

    Args:
        folder: The folder.
        ignore: Suffixes of the names of tensors to ignore; their dtype is not checked.

    Returns:
        The content of config.json, and the tensors by name. Quantized weights are dequantized when
        they are read, and config.json is returned without their quantization.

    Raises:
        FileNotFoundError: config.json, the weights, or a shard that the index lists does not exist.
        ValueError: A file is damaged, a tensor is in two shards or not in the shard that the index
            names, the weights are pickled, or quantized in a format that is
            not supported.
    """
    config = read_json_object(folder / "config.json")
    shards = _weight_files(folder)
    tensors: dict[str, LazyTensor] = {}
    for shard, indexed in shards.items():
        shard_tensors = _read_tensors(shard, ignore)
        if duplicates := sorted(shard_tensors.keys() & tensors.keys()):
            raise ValueError(f"{shard}: the tensor {duplicates[0]!r} is in two shards")
        absent = [n for n in indexed if n not in shard_tensors and not n.endswith(tuple(ignore))]
        if absent:
            raise ValueError(
                f"{shard}: the tensor {absent[0]!r} is missing, which {_INDEX} lists for this shard"
            )
        tensors |= shard_tensors
    config, tensors = fp8.dequantize(*mxfp4.dequantize(config, tensors))
    config, tensors = quantized.dequantize(config, tensors)
    config_keys.check_quantization(config)
    _check_floats(tensors)
    return config, tensors


def conversion_command(path: Path, names: Sequence[str] = ()) -> str:
    """Return the command that converts pickled weights of PyTorch to safetensors.

    The command needs torch; with `weights_only`, torch unpickles tensors and nothing else. Tied
    weights are stored twice. The command stops if it finds no file with weights, and at shards that
    each have a part of every tensor, such as those of Meta's Llama.

    Args:
        path: A file with pickled weights, or a folder with one or several of them.
        names: The names of the pickles in the folder.
    """
    is_file = path.suffix in PICKLE_SUFFIXES
    folder = path.parent if is_file else path
    name = path.name if is_file else weight_pickles(names)
    pattern = f"{glob.escape(str(folder))}/{name}"
    code = (
        f"import glob, sys; files = sorted(glob.glob({pattern!r})) "
        f"or sys.exit({f'no file matches {pattern}'!r}); "
        "import torch; from safetensors.torch import save_file; "
        "p = [torch.load(f, map_location='cpu', weights_only=True) for f in files]; "
        "w = {k: v for t in p for k, v in t.items()}; "
        "len(w) < sum(map(len, p)) and "
        "sys.exit('two files have parts of one tensor: convert them with their own program'); "
        "save_file({k: v.clone().contiguous() for k, v in w.items()}, "
        f"{str(folder / 'model.safetensors')!r}, {{'format': 'pt'}})"
    )
    return f"python -c {shlex.quote(code)}"


def weight_pickles(names: Sequence[str]) -> str:
    """Return the pattern of the files with weights among the pickles of a folder.

    Other pickles, such as `training_args.bin`, have no weights.
    """
    for pattern in _WEIGHT_PICKLES:
        if fnmatch.filter(names, pattern):
            return pattern
    return glob.escape(names[0]) if names else _WEIGHT_PICKLES[0]


def _weight_files(folder: Path) -> dict[Path, list[str]]:
    """Return a dictionary from each file with weights to the tensor names that it must contain.

    If `model.safetensors` exists, it is the only file, without names: as in transformers, an index
    next to it is ignored. Otherwise the files are the shards that the index lists.
    """
    single, index = folder / "model.safetensors", folder / _INDEX
    if single.exists():
        return {single: []}
    if not index.exists():
        if pickles := sorted(p.name for p in folder.glob("*") if p.suffix in PICKLE_SUFFIXES):
            weights = fnmatch.filter(pickles, weight_pickles(pickles))
            raise ValueError(
                f"{folder}: has only pickled weights ({weights[0]}), which are never opened "
                "because unpickling runs code from the file; convert them in an isolated "
                f"environment: {conversion_command(folder, pickles)}"
            )
        others = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3])
        raise FileNotFoundError(
            f"{folder}: has neither model.safetensors nor {index.name}"
            f"{f', only {others}' if others else ''}"
        )
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise ValueError(f"{index}: weight_map must be an object of tensor names and file names")
    names = sorted(set(weight_map.values()))
    if invalid := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index}: shards must be in the same folder, got {invalid[0]!r}")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{index}: the shard {absent[0]!r} is missing from the folder")
    return {
        folder / name: sorted(tensor for tensor, shard in weight_map.items() if shard == name)
        for name in names
    }


def read_tensors(path: Path, *, ignore: Collection[str] = ()) -> dict[str, LazyTensor]:
    """Open the tensors of one file.

    Args:
        path: The safetensors file.
        ignore: Suffixes of the names of tensors to ignore; their dtype is not checked.

    Returns:
        The tensors by name.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, or a tensor has no float dtype.
    """
    tensors = _read_tensors(path, ignore)
    _check_floats(tensors)
    return tensors


def _check_floats(tensors: Mapping[str, LazyTensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype in _INTEGERS:
            names = (*_FLOATS, *_FLOATS8)
            raise ValueError(
                f"{tensor.path}: the dtype of {name!r} must be one of {names}, got {tensor.dtype}"
            )


def _read_tensors(path: Path, ignore: Collection[str]) -> dict[str, LazyTensor]:
    """Return the tensors of one file.

    `LazyTensor.read` converts floats to float32, and leaves integers unconverted.
    """
    from safetensors import safe_open

    try:
        file = safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise
    except Exception as error:  # the package has no public exception for a damaged header
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    tensors: dict[str, LazyTensor] = {}
    mapped = functools.cache(_map_file)
    for name in file.keys():  # noqa: SIM118 (not a dict)
        if name.endswith(tuple(ignore)):
            continue
        rows = file.get_slice(name)
        shape, dtype = tuple(rows.get_shape()), rows.get_dtype()
        if dtype in _FLOATS8 or dtype in _INTEGERS:
            kind = np.dtype((_FLOATS8 | _INTEGERS)[dtype])
            read = _mapped_reader(mapped(path)(name).view(kind).reshape(shape))
        elif dtype in _FLOATS:
            read = _row_reader(rows) if shape else _scalar_reader(file.get_tensor(name))
        else:
            names = (*_FLOATS, *_FLOATS8)
            raise ValueError(f"{path}: the dtype of {name!r} must be one of {names}, got {dtype}")
        tensors[name] = LazyTensor(shape, read, path, dtype)
    return tensors


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The content is not valid JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must contain a JSON object, got {type(value).__name__}")
    return value


def _row_reader(rows: Any) -> Callable[[int, int], np.ndarray]:
    return lambda start, stop: np.asarray(rows[start:stop]).astype(np.float32)


def _scalar_reader(value: np.ndarray) -> Callable[[int, int], np.ndarray]:
    return lambda start, stop: np.asarray(value).astype(np.float32)


def _map_file(path: Path) -> Callable[[str], np.ndarray]:
    """Map a safetensors file, and return a function from the name of a tensor to its bytes.

    `safe_open` cannot convert tensors of 8-bit floats to NumPy.

    `safe_open` has already checked the size of the header, and that each tensor is inside the
    file.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    data = np.memmap(path, np.uint8, "r", 8 + size)
    return lambda name: data[slice(*header[name]["data_offsets"])]


def _mapped_reader(values: np.ndarray) -> Callable[[int, int], np.ndarray]:
    """Return `LazyTensor.read` of a mapped tensor, which does not copy integers."""
    if values.dtype in _INTEGERS.values():
        return lambda start, stop: values[start:stop]
    return lambda start, stop: np.asarray(values[start:stop]).astype(np.float32)


def write(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    *,
    names: tuple[str, str] = ("config.json", "model.safetensors"),
) -> None:
    """Write the config and the tensors, each file atomically.

    Args:
        folder: Folder to write to; it is created if it does not exist.
        config: Content of the JSON file.
        tensors: Tensors by name.
        names: File names of the config and of the tensors.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{names[1]}.tmp"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.replace(folder / names[1])
    text = folder / f"{names[0]}.tmp"
    text.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    text.replace(folder / names[0])
