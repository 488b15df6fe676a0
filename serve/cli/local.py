"""What commands share: from a `--model` option to files on this disk, and what loading raises."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from serve import settings
from serve.cli import console
from serve.exceptions import Corrupt, Failure, WrongUsage
from serve.models import adapters, catalogue, download
from serve.models.spec import ModelFiles

if TYPE_CHECKING:
    from serve.models.decoder import ServedModel

STOP_SECONDS = 5.0  # for the engines to finish the step they are in


def located(name: str | None) -> ModelFiles:
    """The files that a `--model` option means, pulled if they are not here; the default for None.

    Raises:
        Failure: what `download.locate` raises.
    """
    known, home = catalogue.load(settings.config_folder()), settings.data_folder()
    name = name or known.default
    if adapters.exists(home, name):
        return _made(adapters.folder(home, name), known)
    with console.Download(name) as progress:
        return download.locate(name, known, home, say=console.say, progress=progress)


def _made(folder: Path, known: catalogue.Catalogue) -> ModelFiles:
    """A model that the user fine-tuned: the files of its base, and its own."""
    try:
        card = adapters.read(folder)
    except (OSError, ValueError) as error:
        raise Corrupt(str(error)) from None
    name = card.base if known.get(card.base) else f"{card.base}={card.path}"
    return replace(located(name), id=card.id, publisher="local", adapter=folder)


def of_kind(name: str | None, kind: str, hint: str) -> ModelFiles:
    """The files that a `--model` option means, which must be a model of a kind.

    Args:
        name: as of `located`.
        kind: as in `kinds.KINDS`.
        hint: what to use instead.

    Raises:
        WrongUsage: it is of another kind.
        Failure: what `located` raises.
    """
    from serve.models import kinds  # brings JAX along

    place = located(name)
    if kinds.kind_of(place).name != kind:
        raise WrongUsage(f"{place.id} does not {kinds.KINDS[kind].does}: {hint}")
    return place


def trainable(name: str | None) -> ModelFiles:
    """The files that a `--model` option means, which must be a model that can be fine-tuned."""
    return of_kind(name, "decoder", "only models that do can be fine-tuned")


@contextlib.contextmanager
def loading(place: ModelFiles) -> Iterator[None]:
    """Around what reads a model's files: what goes wrong becomes one line that names them."""
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        raise Failure(f"cannot load {place.path}: {error}") from None


@contextlib.contextmanager
def loaded(place: ModelFiles, cache_budget: int) -> Iterator[ServedModel]:
    """A model and its engine in this process. What still runs at the end is cancelled."""
    from serve.models import resolve
    from serve.models.decoder import load_model, sampling_of

    with loading(place):
        served = load_model(
            place.id,
            place.path,
            owned_by=place.publisher,
            cache_budget=cache_budget,
            sha256=place.model.files[0].sha256 if place.model and place.model.files else None,
            good=place.model.formats if place.model else (),
            sampling=sampling_of(place, console.say),
            notify=console.say,
        )
        if place.adapter is not None:
            served = resolve.adapted(place.adapter, served, place.path)
    try:
        yield served
    finally:
        served.engine.close(drain=False, timeout=STOP_SECONDS)
