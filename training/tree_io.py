"""Conversion of pytrees to named arrays and back, to store weights and optimizer states.

The name of a leaf is its path, joined by dots: `layers.3.q.weight`, `1.mu.0.down.a`. On
loading, every name, shape and dtype must match the pytree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def to_named(tree: Any) -> dict[str, Any]:
    """Return a dict from name to leaf of a pytree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def from_named(arrays: Mapping[str, np.ndarray], like: Any) -> Any:
    """Return a pytree with the named arrays as leaves; the inverse of `to_named`.

    Args:
        arrays: a dict from name to array, as from `to_named`.
        like: a pytree of the expected structure; only shape and dtype of its leaves are used.

    Raises:
        ValueError: an array is missing or unexpected, or has the wrong shape or dtype.
    """
    expected = to_named(like)
    if missing := [name for name in expected if name not in arrays]:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"missing arrays: {missing[0]!r}{others}")
    if unknown := sorted(arrays.keys() - expected.keys()):
        raise ValueError(f"the array {unknown[0]!r} is unexpected")
    for name, leaf in expected.items():
        array = arrays[name]
        if array.shape != leaf.shape or array.dtype != leaf.dtype:
            raise ValueError(
                f"{name!r} must be {leaf.dtype} {leaf.shape}, got {array.dtype} {array.shape}"
            )
    leaves = [jax.numpy.asarray(arrays[name]) for name in expected]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
