"""What commands share: from a `--model` option to files on this disk, and what loading raises."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from serve import catalogue, settings, sources, terminal
from serve.failures import Failure


def located(name: str | None) -> sources.Located:
    """The files that a `--model` option means, pulled if they are not here; the default for None.

    Raises:
        Failure: what `sources.locate` raises.
    """
    known = catalogue.load(settings.config_folder())
    name = name or known.default
    with terminal.Download(name) as progress:
        return sources.locate(
            name, known, settings.data_folder(), say=terminal.say, progress=progress
        )


@contextlib.contextmanager
def loading(place: sources.Located) -> Iterator[None]:
    """Around what reads a model's files: what goes wrong becomes one line that names them."""
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        raise Failure(f"cannot load {place.path}: {error}") from None
