"""Checkpoints: folders that are written atomically.

    checkpoints/step-000100/state.safetensors     weights, optimizer state and EMA, by name
    checkpoints/step-000100/checkpoint.json       settings of the run, and the best validation loss

A folder is written under a temporary name, flushed to the disk, then renamed. If the run is killed
while it writes, the previous checkpoint remains, and the next run removes the temporary folder.
Nothing is pickled. The array names, shapes and dtypes of a checkpoint must equal those of the run
that loads it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from training import tree_io
from training.config import MUTABLE_FIELDS, TrainConfig
from training.state import State

_TENSORS, _METADATA = "state.safetensors", "checkpoint.json"
_NAME = re.compile(r"step-(\d{6,})")
_FORMAT_VERSION = 1


def save(folder: Path, state: State, config: TrainConfig, progress: dict[str, Any]) -> Path:
    """Write the checkpoint of `state.step`, then remove all but the last `config.keep` checkpoints.

    Args:
        folder: the folder `checkpoints` of the run.
        state: the state to save.
        config: the settings of the run.
        progress: other values of the training loop, which can be encoded as JSON; `load` returns
            them.

    Returns:
        The folder of the checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clean_up(folder)
    step = int(state.step)
    metadata = {
        "format": _FORMAT_VERSION,
        "step": step,
        "config": asdict(config),
        "progress": progress,
    }
    draft, final = folder / f".step-{step:06d}", folder / f"step-{step:06d}"
    draft.mkdir()
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in tree_io.to_named(state).items()}
    save_file(arrays, draft / _TENSORS)
    (draft / _METADATA).write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
    for path in (draft / _TENSORS, draft / _METADATA, draft):
        _flush(path)
    if final.exists():  # a run that was stopped at this step and resumed saves it again
        shutil.rmtree(final)
    draft.rename(final)
    _flush(folder)
    for number in saved_steps(folder)[: -config.keep]:
        shutil.rmtree(folder / f"step-{number:06d}")
    return final


def saved_steps(folder: Path) -> list[int]:
    """Return the numbers of the steps that have a checkpoint, in order.

    Args:
        folder: the folder `checkpoints` of the run; if it is missing, the result is empty.
    """
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def load(folder: Path, like: State, config: TrainConfig) -> tuple[State, dict[str, Any]] | None:
    """Load the last checkpoint.

    Args:
        folder: the folder `checkpoints` of the run.
        like: a state of the expected structure; only shape and dtype of its leaves are used.
        config: the settings of the run.

    Returns:
        The state, and the `progress` that was saved with it; None if there is no checkpoint.

    Raises:
        ValueError: the checkpoint is damaged, or its run had other settings or another model.
    """
    if not (steps := saved_steps(folder)):
        return None
    path = folder / f"step-{steps[-1]:06d}"
    metadata = _read_metadata(path / _METADATA)
    if metadata["step"] != steps[-1]:
        raise ValueError(
            f"{path / _METADATA}: step must be {steps[-1]} as in the name of the folder, "
            f"got {metadata['step']}"
        )
    _check_config(path, TrainConfig.from_json(metadata["config"]), config)
    try:
        with safe_open(path / _TENSORS, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{path}: the file {_TENSORS} is missing") from None
    except Exception as error:  # safetensors has no public exception for a damaged file
        raise ValueError(f"{path / _TENSORS}: not a readable safetensors file ({error})") from error
    try:
        state = tree_io.from_named(arrays, like)
    except ValueError as error:
        raise ValueError(f"{path / _TENSORS}: does not match this run: {error}") from error
    return state, metadata["progress"]


def clean_up(folder: Path) -> None:
    """Remove the incomplete checkpoints that a killed run left in a folder."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    keys = {"format", "step", "config", "progress"}
    if not isinstance(metadata, dict) or metadata.keys() != keys:
        raise ValueError(
            f"{path}: must contain a JSON object with the keys {', '.join(sorted(keys))}"
        )
    if metadata["format"] != _FORMAT_VERSION:
        raise ValueError(f"{path}: format must be {_FORMAT_VERSION}, got {metadata['format']!r}")
    return metadata


def _check_config(path: Path, saved: TrainConfig, config: TrainConfig) -> None:
    saved_values = asdict(saved)
    for name, value in asdict(config).items():
        if name not in MUTABLE_FIELDS and value != saved_values[name]:
            raise ValueError(
                f"{path}: the run was started with {name}={saved_values[name]!r}, got {value!r}; "
                "resume with the same value, or train in another folder"
            )


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def abstract(state: State) -> State:
    """Return a state with a `jax.ShapeDtypeStruct` in place of each array."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
