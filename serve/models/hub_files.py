"""Choose among the weights of a repository: safetensors, or one of its GGUF quantizations.

In memory a weight has 8, 16 or 32 bits. So a file with fewer than 8 bits per weight saves disk
space but no memory, and the precision of a file is lost if memory only suffices for a narrower
dtype. Of the files that fit, `choose` prefers one that the cache has already, then the most precise
one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from serve.exceptions import DoesNotFit, NotFound
from serve.models.disk import human_size

if TYPE_CHECKING:  # imports JAX
    from transformer.checkpoint import Dtype

_SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")
# The modules of sentence-transformers, such as 1_Pooling/config.json.
_MODULE_FILES = ("[0-9]_*/*.json", "[0-9]_*/*.safetensors")
_WEIGHT_INDEXES = ("*.safetensors.index.json", "*.bin.index.json")
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.(gguf|safetensors)")
_QUANTIZATION = re.compile(
    r"(?<![A-Z0-9])(I?Q\d(_[A-Z0-9]+)*|TQ\d_\d|MXFP4(_MOE)?|NVFP4|BF16|F16|FP16|F32|FP32)(?![A-Z0-9])"
)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its size, and its hash as in `Record.files`."""

    name: str
    size: int
    hash: str


@dataclass(frozen=True)
class Candidate:
    """Weights in a repository: safetensors, or a GGUF quantization.

    Attributes:
        label: "safetensors", or the quantization of a GGUF file.
        weights: the names of the files, those of a split model in order.
        size: the bytes of these files.
        bits: bits per weight, approximately.
    """

    label: str
    weights: tuple[str, ...]
    size: int
    bits: float

    @property
    def dtype(self) -> Dtype:
        """Return the narrowest dtype that keeps the precision of the file."""
        return "float32" if self.bits > 16 else "bfloat16" if self.bits > 9 else "int8"

    def memory(self, dtype: Dtype) -> int:
        """Return the bytes that the model needs in a dtype, without its KV cache."""
        from serve.models.dtypes import BYTES_PER_WEIGHT, WORKING_MEMORY

        return int(self.size * 8 / self.bits * BYTES_PER_WEIGHT[dtype]) + WORKING_MEMORY


def candidates(files: Iterable[RemoteFile], bits: float = 16) -> list[Candidate]:
    """Return all weights in a repository: its safetensors, and each quantization as GGUF.

    A split model that lacks a part is left out; the cache may have only some of its parts.

    Args:
        files: all files of the repository.
        bits: bits per weight of the safetensors.
    """
    sizes = {file.name: file.size for file in files}
    options = []
    top = [name for name in sizes if "/" not in name]
    single = [name for name in top if name == "model.safetensors"]
    shards = [name for name in top if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    for weights in [single] if single else _groups(shards).values():
        size = sum(sizes[name] for name in weights)
        options.append(Candidate("safetensors", tuple(weights), size, bits))
    ggufs = [
        name
        for name in sizes
        if name.endswith(".gguf") and not re.search("mmproj|imatrix", name, re.IGNORECASE)
    ]
    for (stem, _), weights in _groups(ggufs).items():
        labels = _QUANTIZATION.findall(stem.upper())
        label = labels[-1][0] if labels else "gguf"
        size = sum(sizes[name] for name in weights)
        options.append(Candidate(label, tuple(weights), size, _bits(label)))
    return options


def _groups(names: Iterable[str]) -> dict[tuple[str, int], list[str]]:
    """Return the files of each complete model, in order, by its stem and its number of files."""
    groups: dict[tuple[str, int], dict[int, str]] = {}
    for name in sorted(names):
        split = _SPLIT.fullmatch(name)
        key = (split["stem"], int(split["count"])) if split else (name, 1)
        groups.setdefault(key, {})[int(split["number"]) if split else 1] = name
    return {
        key: [parts[number] for number in sorted(parts)]
        for key, parts in groups.items()
        if sorted(parts) == list(range(1, key[1] + 1))
    }


def _bits(label: str) -> float:
    """Return the approximate bits per weight of a quantization, including the scales of blocks."""
    if label.endswith("32"):
        return 32
    if label.endswith("16"):
        return 16
    digit = re.search(r"\d", label)
    return float(digit[0]) + 0.5 if digit else 4.5


def choose(
    repo: str, options: Sequence[Candidate], file: str | None, free: int, cached: Iterable[str] = ()
) -> tuple[Candidate, Dtype]:
    """Return the weights to use, and the widest dtype, up to the file's precision, that fits.

    Of the files that fit into memory with their full precision, one that the cache has is
    preferred, then the most precise one, then safetensors. If none fits, the file whose precision
    is nearest to 8 bits is chosen.

    Args:
        repo: the name of the repository, for messages.
        options: all weights in the repository, as `candidates` returns them.
        file: the file or quantization that the user named.
        free: bytes of available memory.
        cached: the files that the cache has already.

    Raises:
        NotFound: the repository does not have `file`.
        DoesNotFit: the model does not fit into memory in any dtype.
    """
    if file is not None:
        name = file.lower()
        options = [
            option
            for option in options
            if name == option.label.lower()
            or any(name in (w.lower(), PurePosixPath(w).name.lower()) for w in option.weights)
        ] or _no_such_file(repo, file, options)
    cached = set(cached)

    def preference(option: Candidate) -> tuple[bool, bool, float, bool]:
        fits = option.memory(option.dtype) <= free
        bits = min(option.bits, 32) if fits else -abs(option.bits - 8)
        return fits, cached.issuperset(option.weights), bits, option.label == "safetensors"

    best = max(options, key=preference)
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16", "int8")
    start = dtypes.index(best.dtype)
    for dtype in dtypes[start:]:
        if best.memory(dtype) <= free:
            return best, dtype
    raise DoesNotFit(
        f"{repo} needs {human_size(best.memory('int8'))} of memory in int8, and "
        f"{human_size(free)} are available: choose a smaller model"
    )


def _no_such_file(repo: str, file: str, options: Sequence[Candidate]) -> list[Candidate]:
    names = ", ".join(f"{o.label} ({o.weights[0]})" for o in options)
    raise NotFound(f"{repo} has no weights {file!r}: use one of {names}")


def select_files(repo: str, names: Iterable[str], weights: Iterable[str]) -> list[str]:
    """Return the files to fetch: the weights, and the configuration, tokenizer and templates.

    A GGUF file contains all of these, so only the GGUF file is fetched.

    Args:
        repo: the name of the repository, for the message.
        names: all files of the repository.
        weights: the names of the chosen weight files.
    """
    weights = list(weights)
    if weights[0].endswith(".gguf"):
        return weights
    patterns = (*_SIDE_FILES, *_MODULE_FILES)
    side = [
        name
        for name in names
        if any(fnmatch(name, p) and p.count("/") == name.count("/") for p in patterns)
    ]
    indexes = [n for n in side if any(fnmatch(n, p) for p in _WEIGHT_INDEXES)]
    used = ["model.safetensors.index.json"] if len(weights) > 1 else []
    return [name for name in side if name not in indexes or name in used] + weights
