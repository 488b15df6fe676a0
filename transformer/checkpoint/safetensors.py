"""Reading and writing safetensors folders, the layout of Hugging Face checkpoints.

A folder holds `config.json` and `model.safetensors`, or else several shards listed in
`model.safetensors.index.json`. The `safetensors` package maps the files and checks their headers.
Pickled weights (`pytorch_model.bin`, `.pt`) are refused: unpickling runs whatever code a file says.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from transformer.checkpoint.gguf import LazyTensor

_FLOATS = ("F32", "F16", "BF16", "F64")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read(
    folder: Path, *, ignore: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Reads `config.json` and opens the tensors of a folder.

    Args:
        ignore: endings of names of tensors that may be there, of any type, and are not wanted.

    Raises:
        FileNotFoundError: no config.json, or no safetensors file.
        ValueError: only pickled weights, or an index that names what is not there.
    """
    config = read_json_object(folder / "config.json")
    shards = _weight_files(folder)
    tensors: dict[str, LazyTensor] = {}
    for shard in shards:
        found = read_tensors(shard, ignore=ignore)
        if twice := sorted(found.keys() & tensors.keys()):
            raise ValueError(f"{shard}: the tensor {twice[0]!r} stands in two shards")
        tensors |= found
    return config, tensors


def _weight_files(folder: Path) -> list[Path]:
    """`model.safetensors`, or else the shards that the index names; the order of transformers.

    So a single file counts where an index of earlier shards was left beside it.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        if pickles := [p.name for glob in _PICKLES for p in folder.glob(glob)]:
            raise ValueError(
                f"{folder}: holds only pickled weights ({pickles[0]}), which are never opened "
                "because unpickling runs code from the file; convert them to safetensors first"
            )
        found = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3])
        raise FileNotFoundError(
            f"{folder}: no model.safetensors, and no {index.name} that says which tensors its "
            f"shards hold{f' (found: {found})' if found else ''}"
        )
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
        raise ValueError(f"{index}: weight_map must give a file name for each tensor")
    names = sorted(set(places.values()))
    if bad := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index}: shards must lie in the same folder, got {bad[0]!r}")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{index}: names {absent[0]!r}, which is not in the folder")
    return [folder / name for name in names]


def read_tensors(path: Path, *, ignore: Collection[str] = ()) -> dict[str, LazyTensor]:
    """Opens the tensors of one file; see `read`."""
    from safetensors import safe_open

    try:
        file = safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise
    except Exception as error:  # the package has no public exception for a damaged header
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    tensors: dict[str, LazyTensor] = {}
    for name in file.keys():  # noqa: SIM118 (not a dict)
        if name.endswith(tuple(ignore)):
            continue
        rows = file.get_slice(name)
        if (dtype := rows.get_dtype()) not in _FLOATS:
            raise ValueError(f"{path}: {name!r} must be one of {_FLOATS}, got {dtype}")
        tensors[name] = LazyTensor(tuple(rows.get_shape()), _row_reader(rows))
    return tensors


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; ValueError, naming the file, if it holds no such thing."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def _row_reader(rows: Any):
    return lambda start, stop: np.asarray(rows[start:stop]).astype(np.float32)


def write(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    *,
    names: tuple[str, str] = ("config.json", "model.safetensors"),
) -> None:
    """Writes the config and the tensors; each file appears whole or not at all."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{names[1]}.tmp"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.replace(folder / names[1])
    text = folder / f"{names[0]}.tmp"
    text.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    text.replace(folder / names[0])
