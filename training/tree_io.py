"""Trees of arrays to named arrays and back: how weights and optimiser states lie in files.

A name is the path of a leaf, its steps joined by dots: `layers.3.q.weight`, `1.mu.0.down.a`. What
comes back must fit the tree it is for, name by name, shape by shape, dtype by dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def to_named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their names."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def from_named(arrays: Mapping[str, np.ndarray], like: Any) -> Any:
    """The inverse of `named`.

    Args:
        like: a tree of the structure wanted, whose leaves have a shape and a dtype.

    Raises:
        ValueError: an array is missing, superfluous, or of another shape or dtype.
    """
    wanted = to_named(like)
    if missing := [name for name in wanted if name not in arrays]:
        raise ValueError(f"lacks {missing[0]!r}, and {len(missing) - 1} others")
    if unknown := sorted(arrays.keys() - wanted.keys()):
        raise ValueError(f"holds {unknown[0]!r}, for which there is no place")
    for name, leaf in wanted.items():
        found = arrays[name]
        if found.shape != leaf.shape or found.dtype != leaf.dtype:
            raise ValueError(
                f"{name!r} must be {leaf.dtype} {leaf.shape}, got {found.dtype} {found.shape}"
            )
    leaves = [jax.numpy.asarray(arrays[name]) for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
