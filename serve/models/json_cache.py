"""Small JSON files that cache hashes, measurements and chosen dtypes.

If two processes write a file at the same time, the file has the entry of the later one; the entry
of the other process is computed again.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from serve.models import disk


def read(path: Path) -> dict[str, Any]:
    """Return the entries of a JSON cache file; an empty dict if it is missing or damaged."""
    try:
        entries = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def add(path: Path, key: str, value: Any) -> None:
    """Set an entry of a JSON cache file. If the file cannot be written, do nothing."""
    with contextlib.suppress(OSError):
        disk.replace_text(path, json.dumps(read(path) | {key: value}, indent=1))
