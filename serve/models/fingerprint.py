"""A short name for how a model computes here; it changes when answers may.

OpenAI's `system_fingerprint`: with the same fingerprint, seed and request, the answer is the same.
It is made of the bytes of the weights, the number format, the machine, the library, and the code
that computes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from pathlib import Path

import jax

import transformer
from serve import settings
from serve.models import hashes


def hash_weights(path: Path) -> str:
    """SHA-256 over all files of a model, in hex.

    Args:
        path: a file, or a folder whose files are taken together with their names.
    """
    home = settings.data_folder()
    if path.is_file():
        return hashes.sha256(path, home)
    files = sorted(file for file in path.iterdir() if file.is_file() and file.name[0] != ".")
    together = "".join(f"{file.name} {hashes.sha256(file, home)}\n" for file in files)
    return hashlib.sha256(together.encode()).hexdigest()


def machine_key(weights: str) -> str:
    """Names weights with this hash on this machine, for what is measured here; hex."""
    flags = os.environ.get("XLA_FLAGS", "")  # may limit the instructions that are used
    parts = [weights, jax.__version__, platform.machine(), _cpu_model(), os.cpu_count(), flags]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def system_fingerprint(weights: str, dtype: str) -> str:
    """The fingerprint of weights with this hash, computed in this format, here, by this code."""
    parts = [machine_key(weights), dtype, _code_hash()]
    return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:10]


@functools.cache
def _code_hash() -> str:
    """Everything between token ids in and token ids out."""
    folders = [Path(transformer.__file__).parent, Path(__file__).parent]
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
