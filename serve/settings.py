"""Paths of Pellucid's files.

Pellucid has two folders. The data folder has the pulled models, the server's files and jobs, and
benchmark results; the configuration folder has the user's `models.toml` (see
`models/catalogue.py`). `PELLUCID_HOME`, if set, is both; otherwise they are the platform's usual
folders.
"""

import os
from pathlib import Path

import platformdirs


def data_folder() -> Path:
    """Return the data folder, which need not exist."""
    if home := os.environ.get("PELLUCID_HOME"):
        return Path(home).expanduser().absolute()
    return platformdirs.user_data_path("pellucid", appauthor=False)


def config_folder() -> Path:
    """Return the folder of the user's `models.toml`, which need not exist."""
    if home := os.environ.get("PELLUCID_HOME"):
        return Path(home).expanduser().absolute()
    return platformdirs.user_config_path("pellucid", appauthor=False)


def make_private_folder(path: Path) -> Path:
    """Create a folder readable by its owner only, if it does not exist, and return its path.

    The permissions of an existing folder are not changed: the user may share it on purpose.

    Raises:
        OSError: the folder could not be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.mkdir(exist_ok=True, mode=0o700)
    return path
