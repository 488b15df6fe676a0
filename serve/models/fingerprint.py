"""The system fingerprint of a model: it changes whenever responses may change.

It is OpenAI's `system_fingerprint`: the same fingerprint, seed and request give the same response.
It is a hash of the weights, the dtype, the machine, the versions of JAX and Numba, and the source
code of `transformer` and of this package.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

import jax

import transformer
from serve import settings
from serve.models import hashes
from transformer.checkpoint.gguf import split_files


def hash_weights(path: Path) -> str:
    """Return the SHA-256 of a model's files, in hex.

    Args:
        path: a file (the first one of a split GGUF model), or a folder, whose files are hashed
            with their names.

    Raises:
        OSError: a file cannot be read.
    """
    home = settings.data_folder()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file.name[0] != ".")
    elif len(files := split_files(path)) == 1:
        return hashes.sha256(path, home)
    listing = "".join(f"{file.name} {hashes.sha256(file, home)}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def machine_key(weights: str) -> str:
    """Return the cache key, in hex, of measurements that depend on the weights and this machine.

    Args:
        weights: the SHA-256 of the weights, in hex.
    """
    # The variables can restrict the CPU instructions that XLA and Numba use.
    names = ("XLA_FLAGS", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")
    flags = " ".join(os.environ.get(name, "") for name in names)
    versions = [jax.__version__, _version("numba")]
    parts = [weights, *versions, platform.machine(), _cpu_model(), os.cpu_count(), flags]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def system_fingerprint(weights: str, dtype: str) -> str:
    """Return the fingerprint of the weights with this hash, in a dtype, on this machine."""
    parts = [machine_key(weights), dtype, _code_hash()]
    return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:10]


@functools.cache
def _code_hash() -> str:
    """Return the SHA-256 of the source files that compute output from input token ids."""
    folders = [Path(transformer.__file__).parent, Path(__file__).parent]
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _version(package: str) -> str | None:
    """Return the version of an installed package, without importing it; None if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
