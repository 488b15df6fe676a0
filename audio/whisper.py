"""A model and its vocabulary, read from one folder, and how its work reaches a device."""

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

# Has one bounded piece of device work done and gives what it returns. A server passes a function
# that queues the piece behind the work of others; by default it is done on the spot.
RunOnDevice = Callable[[Callable[[], T]], T]


def run_inline(piece: Callable[[], T]) -> T:
    """The `Run` that does a piece of work on the spot."""
    return piece()


@dataclass(frozen=True)
class Whisper:
    """Weights, sizes and vocabulary of one model."""

    params: Params
    cfg: Config
    tokenizer: WhisperTokenizer


def load_model(folder: str | Path, *, dtype: checkpoint.Dtype = "float32") -> Whisper:
    """Reads a model folder: config.json, tokenizer.json, and model.safetensors or model.bin.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or not of a Whisper.
    """
    params, cfg = checkpoint.load(Path(folder), dtype=dtype)
    return Whisper(params, cfg, tokenizer.load(Path(folder), cfg.vocab_size))
