"""A loaded Whisper model, and the type of the callback that runs its computations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from audio import checkpoint, tokenizer
from audio.config import Config
from audio.model import Params
from audio.tokenizer import WhisperTokenizer

T = TypeVar("T")

# A function that calls the function it is given (a computation of limited duration on the device)
# and returns its result. A server passes one that queues the call behind those of other requests;
# the default calls it at once.
RunOnDevice = Callable[[Callable[[], T]], T]


def run_inline(work_item: Callable[[], T]) -> T:
    """Call a function at once and return its result; the default of all parameters `run`."""
    return work_item()


@dataclass(frozen=True)
class Whisper:
    """Weights, config and tokenizer of one model."""

    params: Params
    cfg: Config
    tokenizer: WhisperTokenizer


def load_model(folder: str | Path, *, dtype: checkpoint.Dtype = "float32") -> Whisper:
    """Load a model from a folder.

    Args:
        folder: holds config.json, tokenizer.json, and model.safetensors or model.bin.
        dtype: dtype of the weights; see `checkpoint.load`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or is not that of a Whisper model.
    """
    params, cfg = checkpoint.load(Path(folder), dtype=dtype)
    return Whisper(params, cfg, tokenizer.load(Path(folder), cfg.vocab_size))
