"""From a model's files on this disk to what a server offers: how it would be loaded, and its size.

The files' headers are read here, so that what is damaged or of an unknown kind is known before a
server listens; weights are read when somebody asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from serve import measured
from serve.engine import ServedModel, load_model
from serve.engine.formats import FORMATS, weight_bytes
from serve.engine.load import weights_file
from serve.registry import Offer
from serve.sources import Located
from transformer import checkpoint

MAX_ROWS = 16  # of a decoding step, on a server
RECORD_SECONDS = 60.0  # between two notes of a model's speed


def offer(
    place: Located, *, cache_budget: int, dtype: str, home: Path, notify: Callable[[str], None]
) -> Offer:
    """A model to be loaded when asked for.

    Args:
        place: its files.
        cache_budget: bytes for the keys and values of its conversations.
        dtype: see `load_model`.
        home: the data folder, where its speed is noted.
        notify: told a line for each thing that takes long.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged or of an unknown kind.
    """
    cfg = checkpoint.read_config(place.path)
    # What is chosen for "auto" is known when it is loaded; the smallest may be it.
    smallest = next((format for format in FORMATS if format == dtype), FORMATS[0])

    def load() -> ServedModel:
        noted = 0.0

        def on_speed(tokens: int, seconds: float) -> None:
            nonlocal noted
            if (now := time.monotonic()) - noted > RECORD_SECONDS or not noted:
                noted = now
                measured.record(
                    home, place.id, tokens=tokens, seconds=seconds, memory=served.memory
                )

        served = load_model(
            place.id,
            place.path,
            owned_by=place.publisher,
            cache_budget=cache_budget,
            dtype=dtype,
            max_rows=MAX_ROWS,
            sha256=place.model.files[0].sha256 if place.model else None,
            notify=notify,
            on_speed=on_speed,
        )
        return served

    return Offer(
        id=place.id,
        created=int(weights_file(place.path).stat().st_mtime),
        owned_by=place.publisher,
        memory=weight_bytes(cfg, smallest) + cache_budget,
        load=load,
    )
