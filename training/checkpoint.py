"""Checkpoints: folders that are there whole or not at all.

    checkpoints/step-000100/state.safetensors     weights, optimiser state, running mean, by name
    checkpoints/step-000100/checkpoint.json       the config, and how validation went so far

A folder is written under another name, flushed to the disk, then renamed: whoever is killed
meanwhile leaves the checkpoint before, and some litter that the next run sweeps away. Nothing is
pickled. What is read must fit the run that reads it, name by name; nothing is filled in.
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
    """Writes the checkpoint of a step, then removes those beyond the last `config.keep`.

    Args:
        folder: the run's `checkpoints`.
        progress: what else the loop wants back, as JSON.

    Returns:
        The checkpoint's own folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clean_up(folder)
    step = int(state.step)
    rest = {"format": _FORMAT_VERSION, "step": step, "config": asdict(config), "progress": progress}
    draft, final = folder / f".step-{step:06d}", folder / f"step-{step:06d}"
    draft.mkdir()
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in tree_io.to_named(state).items()}
    save_file(arrays, draft / _TENSORS)
    (draft / _METADATA).write_text(json.dumps(rest, indent=2) + "\n", "utf-8")
    for path in (draft / _TENSORS, draft / _METADATA, draft):
        _flush(path)
    if final.exists():  # of a run that was stopped at this very step and asked to save again
        shutil.rmtree(final)
    draft.rename(final)
    _flush(folder)
    for number in saved_steps(folder)[: -config.keep]:
        shutil.rmtree(folder / f"step-{number:06d}")
    return final


def saved_steps(folder: Path) -> list[int]:
    """The steps of which there is a checkpoint, in order."""
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def load(folder: Path, like: State, config: TrainConfig) -> tuple[State, dict[str, Any]] | None:
    """Reads the last checkpoint.

    Args:
        folder: the run's `checkpoints`.
        like: a state of the structure wanted, whose leaves have a shape and a dtype.

    Returns:
        The state, and the `progress` saved with it; None if there is no checkpoint.

    Raises:
        ValueError: it is damaged, or was made with other settings or of another model.
    """
    if not (steps := saved_steps(folder)):
        return None
    path = folder / f"step-{steps[-1]:06d}"
    rest = _read_metadata(path / _METADATA)
    if rest["step"] != steps[-1]:
        raise ValueError(f"{path / _METADATA}: is of step {rest['step']}")
    _check_config(path, TrainConfig.from_json(rest["config"]), config)
    try:
        with safe_open(path / _TENSORS, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{path}: lacks {_TENSORS}") from None
    except Exception as error:  # the package has no public exception for a damaged file
        raise ValueError(f"{path / _TENSORS}: not a readable safetensors file ({error})") from error
    try:
        state = tree_io.from_named(arrays, like)
    except ValueError as error:
        raise ValueError(f"{path / _TENSORS}: does not fit this run: {error}") from error
    return state, rest["progress"]


def clean_up(folder: Path) -> None:
    """Removes what a killed run left half-written."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        rest = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    keys = {"format", "step", "config", "progress"}
    if not isinstance(rest, dict) or rest.keys() != keys:
        raise ValueError(f"{path}: must be an object with exactly {', '.join(sorted(keys))}")
    if rest["format"] != _FORMAT_VERSION:
        raise ValueError(
            f"{path}: has format {rest['format']!r}; this version reads {_FORMAT_VERSION}"
        )
    return rest


def _check_config(path: Path, saved: TrainConfig, config: TrainConfig) -> None:
    saved, wanted = asdict(saved), asdict(config)
    for name, value in wanted.items():
        if name not in MUTABLE_FIELDS and value != saved[name]:
            raise ValueError(
                f"{path}: was made with {name}={saved[name]!r}, not {value!r}; go on with the "
                "same, or train in another folder"
            )


def _flush(path: Path) -> None:
    """Waits until the disk has a file, or a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def abstract(state: State) -> State:
    """The structure of a state, with a shape and a dtype at each leaf, and no memory."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
