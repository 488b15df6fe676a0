"""What was measured on this machine: tokens a second and memory, by model.

A run of 32 tokens or more leaves its rate in `measured.json` of the data folder, where
`pellucid models` finds it. The last run counts; nothing is estimated.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import TypedDict

ENOUGH_TOKENS = 32


class Measured(TypedDict):
    """Decoding speed, and the memory of weights and cache in bytes, as they were loaded."""

    tokens_per_second: float
    memory: int


def read(home: Path) -> dict[str, Measured]:
    """The measurements by model id; empty where there are none."""
    try:
        found = json.loads((home / "measured.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def record(home: Path, id: str, *, tokens: int, seconds: float, memory: int) -> None:
    """Notes a run that decoded `tokens` in `seconds`, if it was long enough to mean something."""
    if tokens < ENOUGH_TOKENS or seconds <= 0 or not home.is_dir():
        return
    found = read(home)
    found[id] = {"tokens_per_second": round(tokens / seconds, 1), "memory": memory}
    temporary = home / f".measured-{os.getpid()}"
    with contextlib.suppress(OSError):  # a folder we may not write to: then it is not noted
        temporary.write_text(json.dumps(found, indent=1))
        os.replace(temporary, home / "measured.json")
