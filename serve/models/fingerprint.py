"""A short name for how a model computes here; it changes when answers may.

OpenAI's `system_fingerprint`: with the same fingerprint, seed and request, the answer is the same.
It is made of the bytes of the weights, the number format, the machine, the library, and the code
that computes. Hashing gigabytes takes seconds, so the hash of a file is remembered with its size
and time of change.
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
from serve.models import json_cache


def of_weights(path: Path) -> str:
    """SHA-256 over all files of a model, in hex.

    Args:
        path: a file, or a folder whose files are taken together with their names.
    """
    if path.is_file():
        return _of_file(path)
    files = sorted(file for file in path.iterdir() if file.is_file() and file.name[0] != ".")
    together = "".join(f"{file.name} {_of_file(file)}\n" for file in files)
    return hashlib.sha256(together.encode()).hexdigest()


def on_machine(weights: str) -> str:
    """Names weights with this hash on this machine, for what is measured here; hex."""
    flags = os.environ.get("XLA_FLAGS", "")  # may limit the instructions that are used
    parts = [weights, jax.__version__, platform.machine(), _processor(), os.cpu_count(), flags]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def of_model(weights: str, format: str) -> str:
    """The fingerprint of weights with this hash, computed in this format, here, by this code."""
    parts = [on_machine(weights), format, _code()]
    return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:10]


@functools.cache
def _code() -> str:
    """Everything between token ids in and token ids out."""
    folders = [Path(transformer.__file__).parent, Path(__file__).parent]
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _of_file(path: Path) -> str:
    remembered = settings.data_folder() / "hashes.json"
    known = json_cache.read(remembered)
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    key = str(path.resolve())
    if isinstance(known.get(key), list) and known[key][1:] == stamp:
        return known[key][0]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    json_cache.add(remembered, key, [digest, *stamp])
    return digest


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
