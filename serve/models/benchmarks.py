"""What was measured on this machine: tokens a second and memory, by model.

A run of 32 tokens or more leaves its rate in `measured.json` of the data folder, where
`pellucid models` finds it. The last run counts; nothing is estimated.
"""

from pathlib import Path
from typing import TypedDict

from serve.models import json_cache

MEASUREMENTS_FILE = "measured.json"
MIN_TIMED_TOKENS = 32


class Measurement(TypedDict):
    """Decoding speed, and the memory of weights and cache in bytes, as they were loaded."""

    tokens_per_second: float
    memory: int


def read(home: Path) -> dict[str, Measurement]:
    """The measurements by model id; empty where there are none."""
    return json_cache.read(home / MEASUREMENTS_FILE)


def record(home: Path, id: str, *, tokens: int, seconds: float, memory: int) -> None:
    """Notes a run that decoded `tokens` in `seconds`, if it was long enough to mean something."""
    if tokens < MIN_TIMED_TOKENS or seconds <= 0 or not home.is_dir():
        return
    run = Measurement(tokens_per_second=round(tokens / seconds, 1), memory=memory)
    json_cache.add(home / MEASUREMENTS_FILE, id, run)
