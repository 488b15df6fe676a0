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
    from serve.models.decoder import DecoderModel

STOP_SECONDS = 5.0  # for the engines to finish the step they are in


def locate_model(name: str | None) -> ModelFiles:
    """The files that a `--model` option means, pulled if they are not here; the default for None.

    Raises:
        Failure: what `download.locate` raises.
    """
    known, home = catalogue.load(settings.config_folder()), settings.data_folder()
    name = name or known.default
    if adapters.exists(home, name):
        return _locate_adapter(adapters.adapter_folder(home, name), known)
    with console.DownloadProgress(name) as progress:
        return download.resolve_model(name, known, home, notify=console.info, progress=progress)


def _locate_adapter(folder: Path, known: catalogue.Catalogue) -> ModelFiles:
    """A model that the user fine-tuned: the files of its base, and its own."""
    try:
        card = adapters.read_metadata(folder)
    except (OSError, ValueError) as error:
        raise Corrupt(str(error)) from None
    name = card.base if known.get(card.base) else f"{card.base}={card.path}"
    return replace(locate_model(name), id=card.id, publisher="local", adapter=folder)


def locate_model_of_kind(name: str | None, kind: str, hint: str) -> ModelFiles:
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

    place = locate_model(name)
    if kinds.kind_of(place).name != kind:
        raise WrongUsage(f"{place.id} does not {kinds.KINDS[kind].task}: {hint}")
    return place


def locate_trainable(name: str | None) -> ModelFiles:
    """The files that a `--model` option means, which must be a model that can be fine-tuned."""
    return locate_model_of_kind(name, "decoder", "only models that do can be fine-tuned")


@contextlib.contextmanager
def report_load_errors(place: ModelFiles) -> Iterator[None]:
    """Around what reads a model's files: what goes wrong becomes one line that names them."""
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        raise Failure(f"cannot load {place.path}: {error}") from None


@contextlib.contextmanager
def open_model(place: ModelFiles, cache_budget: int) -> Iterator[DecoderModel]:
    """A model and its engine in this process. What still runs at the end is cancelled."""
    from serve.models import resolve
    from serve.models.decoder import load_decoder, load_default_sampling

    with report_load_errors(place):
        served = load_decoder(
            place.id,
            place.path,
            owned_by=place.publisher,
            cache_budget=cache_budget,
            sha256=place.entry.files[0].sha256 if place.entry and place.entry.files else None,
            accepted_dtypes=place.entry.dtypes if place.entry else (),
            default_sampling=load_default_sampling(place, console.info),
            notify=console.info,
        )
        if place.adapter is not None:
            served = resolve.load_adapted(place.adapter, served, place.path)
    try:
        yield served
    finally:
        served.engine.close(drain=False, timeout=STOP_SECONDS)
