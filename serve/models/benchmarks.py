"""Measurements of models on this machine: tokens per second and memory.

The speed of a generation of 32 tokens or more is written to `measured.json` in the data folder,
and `pellucid models` shows it. A new measurement replaces the previous one of the same model.
"""

from pathlib import Path
from typing import TypedDict

from serve.models import json_cache

MEASUREMENTS_FILE = "measured.json"
MIN_TIMED_TOKENS = 32


class Measurement(TypedDict):
    """The decoding speed of a model, and the bytes of its weights and KV cache."""

    tokens_per_second: float
    memory: int


def read(home: Path) -> dict[str, Measurement]:
    """Return the measurements by model id; empty if there are none."""
    return json_cache.read(home / MEASUREMENTS_FILE)


def record(home: Path, id: str, *, tokens: int, seconds: float, memory: int) -> None:
    """Record the speed of a generation, unless it is shorter than `MIN_TIMED_TOKENS`.

    Args:
        home: the data folder.
        id: the id of the model.
        tokens: the number of decoded tokens.
        seconds: the time they took.
        memory: bytes of weights and KV cache.
    """
    if tokens < MIN_TIMED_TOKENS or seconds <= 0 or not home.is_dir():
        return
    run = Measurement(tokens_per_second=round(tokens / seconds, 1), memory=memory)
    json_cache.add(home / MEASUREMENTS_FILE, id, run)
