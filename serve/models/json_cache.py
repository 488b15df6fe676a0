"""Small JSON files that only save time: what was hashed, measured, chosen before.

Of two processes that write one at the same time the later wins, and the other's entry is found out
again.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from serve.models import disk


def read(path: Path) -> dict[str, Any]:
    """What is noted there; nothing, if there is no such file or it is damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def add(path: Path, key: str, value: Any) -> None:
    """Notes one thing more. Where we may not write it is not noted, and costs time again."""
    with contextlib.suppress(OSError):
        disk.replace_text(path, json.dumps(read(path) | {key: value}, indent=1))
