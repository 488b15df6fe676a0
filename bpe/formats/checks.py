"""Checks of structure: each error names the file, the key, the value and what would work."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from bpe.log_once import warn_once

log = logging.getLogger(__name__)


SENTENCEPIECE = (
    "a SentencePiece vocabulary, which cannot be read; byte-level BPE vocabularies, as of GPT-2, "
    "Llama 3 and Qwen, can"
)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; ValueError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def get_required(mapping: Any, key: str, kind: type, where: str) -> Any:
    """Return the value of a key; ValueError where it is missing or of another type."""
    value = mapping.get(key) if isinstance(mapping, Mapping) else None
    if not isinstance(value, kind):
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"{where}: {key} is {found}, not a {kind.__name__}")
    return value


def get_array(metadata: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """An array of GGUF metadata, which readers give as a list or as an array of numpy's."""
    value = metadata.get(key)
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"{where}: {key} is {found}, not an array")
    return list(value)


def get_one_of(mapping: Mapping[str, Any], key: str, values: Sequence[Any], where: str) -> Any:
    """Return the value of a key, None where it is missing; ValueError unless it is in `values`."""
    value = mapping.get(key)
    if value not in values:
        allowed = ", ".join(map(repr, values))
        raise ValueError(
            f"{where}: {key} is {short_repr(value)}; of what we can read, it is {allowed}"
        )
    return value


def warn_unknown_keys(mapping: Mapping[str, Any], known: Collection[str], source: str) -> None:
    """Log, once for each set of keys, that keys which nothing reads are passed over."""
    others = sorted(key for key, value in mapping.items() if value is not None and key not in known)
    if others:
        names = ", ".join(map(repr, others[:20]))
        warn_once(log, f"{source}: passing over keys not known to change the ids: {names}")


def to_text(value: Any) -> str:
    """Return a text of GGUF metadata, which readers give as text or as UTF-8; "" for None."""
    if value is None:
        return ""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def token_text(value: Any, where: str) -> str | None:
    """A token in tokenizer_config.json: a string, or an object with the string in it."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} is {short_repr(value)}, not a string")
    return value


def short_repr(value: Any) -> str:
    """Return the repr of a value, of at most 120 characters."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
