"""Where Pellucid keeps its files.

Two folders belong to Pellucid. The data folder holds pulled models and what was measured here; the
configuration folder holds the user's own `models.toml` (see `catalogue.py`). `PELLUCID_HOME`, when
set, is both; otherwise they are where the platform puts such things.
"""

import os
from pathlib import Path

import platformdirs


def data_folder() -> Path:
    """The folder for pulled models and measurements. It need not exist yet."""
    if home := os.environ.get("PELLUCID_HOME"):
        return Path(home).expanduser().absolute()
    return platformdirs.user_data_path("pellucid", appauthor=False)


def config_folder() -> Path:
    """The folder for the user's own `models.toml`. It need not exist."""
    if home := os.environ.get("PELLUCID_HOME"):
        return Path(home).expanduser().absolute()
    return platformdirs.user_config_path("pellucid", appauthor=False)


def make_private_folder(path: Path) -> Path:
    """Makes `path` readable by its owner only, if it is not there yet, and returns it.

    A folder that exists is left as it is: it may be one the user shares on purpose.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.mkdir(exist_ok=True, mode=0o700)
    return path
