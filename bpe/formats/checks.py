"""Read and check values of JSON files and GGUF metadata.

Every error names the file and the key, what was expected, and the value.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from bpe.log_once import warn_once

log = logging.getLogger(__name__)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: if the file is not JSON in UTF-8, or its value is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def get_required(mapping: Any, key: str, kind: type, where: str) -> Any:
    """Return the value of a key.

    Args:
        mapping: the object.
        key: the key.
        kind: the type that the value must have.
        where: the file and the object, for error messages.

    Raises:
        ValueError: if the value is missing or has another type.
    """
    value = mapping.get(key) if isinstance(mapping, Mapping) else None
    if not isinstance(value, kind):
        problem = "but it is missing" if value is None else f"got {type(value).__name__}"
        raise ValueError(f"{where}: expected {kind.__name__} for {key}, {problem}")
    return value


def get_array(metadata: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """Return an array of GGUF metadata, either a list or a NumPy array, as a list.

    Raises:
        ValueError: if the value is missing or has another type.
    """
    value = metadata.get(key)
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        problem = "but it is missing" if value is None else f"got {type(value).__name__}"
        raise ValueError(f"{where}: expected an array for {key}, {problem}")
    return list(value)


def get_numbers(metadata: Mapping[str, Any], key: str, where: str) -> list[float]:
    """Return an array of numbers of GGUF metadata as a list.

    Raises:
        ValueError: if the value is missing, or has another type.
    """
    values = get_array(metadata, key, where)
    for i, value in enumerate(values):
        if not isinstance(value, Real) or value != value:
            raise ValueError(f"{where}: expected a number for {key}[{i}], got {short_repr(value)}")
    return values


def get_id(metadata: Mapping[str, Any], key: str, where: str) -> int | None:
    """Return a token id of GGUF metadata; None if it is missing.

    Raises:
        ValueError: if the value is no integer.
    """
    value = metadata.get(key)
    if value is not None and not isinstance(value, Integral):
        raise ValueError(f"{where}: expected an integer for {key}, got {short_repr(value)}")
    return None if value is None else int(value)


def get_one_of(mapping: Mapping[str, Any], key: str, values: Sequence[Any], where: str) -> Any:
    """Return the value of a key, None if it is missing.

    Raises:
        ValueError: if the value is not in `values`.
    """
    value = mapping.get(key)
    if value not in values:
        allowed = ", ".join(map(repr, values))
        raise ValueError(f"{where}: {key} is {short_repr(value)}; supported values: {allowed}")
    return value


def warn_unknown_keys(mapping: Mapping[str, Any], known: Collection[str], source: str) -> None:
    """Log the keys that are not in `known`, once for each `source` and set of keys.

    Keys with the value None are not logged.
    """
    unknown = sorted(
        key for key, value in mapping.items() if value is not None and key not in known
    )
    if unknown:
        names = ", ".join(map(repr, unknown[:20]))
        warn_once(log, f"{source}: ignoring unknown keys: {names}")


def to_text(value: Any) -> str:
    """Return a string of GGUF metadata, which is a string or UTF-8 bytes; "" for None."""
    if value is None:
        return ""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def token_text(value: Any, where: str) -> str | None:
    """Return the text of a token in tokenizer_config.json, or None if the value is None.

    Raises:
        ValueError: if the value is neither a string nor an object with a string in `content`.
    """
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: expected a string, got {short_repr(value)}")
    return value


def short_repr(value: Any) -> str:
    """Return the repr of a value, shortened to 120 characters."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
