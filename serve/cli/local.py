"""Find the files of the model that a `--model` option names, and load it in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from serve import settings
from serve.cli import console
from serve.exceptions import Corrupt, DoesNotFit, Unusable, WrongUsage
from serve.models import adapters, catalogue, download
from serve.models.spec import ModelFiles

if TYPE_CHECKING:
    from serve.models.decoder import DecoderModel

STOP_SECONDS = 5.0  # maximum time for an engine to finish its current forward pass


def locate_model(name: str | None) -> ModelFiles:
    """Return the files of the model that a `--model` option names; download them if needed.

    Args:
        name: an id, NAME=PATH, or the id of a fine-tuned model; None for the default model.

    Raises:
        Failure: as in `download.resolve_model`.
        Corrupt: the metadata of a fine-tuned model cannot be read.
    """
    known_models, home = catalogue.load(settings.config_folder()), settings.data_folder()
    name = name or known_models.default
    if adapters.exists(home, name):
        return _locate_adapter(adapters.adapter_folder(home, name), known_models)
    with console.DownloadProgress(name) as progress:
        return download.resolve_model(
            name, known_models, home, notify=console.info, progress=progress
        )


def _locate_adapter(folder: Path, known_models: catalogue.Catalogue) -> ModelFiles:
    """Return the files of a fine-tuned model: the base model's files and the adapter."""
    try:
        metadata = adapters.read_metadata(folder)
    except (OSError, ValueError) as error:
        raise Corrupt(str(error)) from None
    in_catalogue = known_models.get(metadata.base) is not None
    name = metadata.base if in_catalogue else f"{metadata.base}={metadata.path}"
    return replace(locate_model(name), id=metadata.id, publisher="local", adapter=folder)


def locate_model_of_kind(name: str | None, kind: str, hint: str) -> ModelFiles:
    """Return the files of a model, and check that the model does the task of a command.

    Args:
        name: as for `locate_model`.
        kind: the required model kind: a key of `kinds.KINDS`, such as "decoder".
        hint: the end of the error message: which model to use instead.

    Raises:
        WrongUsage: the model does another task.
        Failure: as in `locate_model`.
    """
    from serve.models import kinds  # imports JAX

    files = locate_model(name)
    if kinds.kind_of(files).name != kind:
        raise WrongUsage(f"{files.id} does not {kinds.KINDS[kind].task}: {hint}")
    return files


def locate_trainable(name: str | None) -> ModelFiles:
    """Return the files of a model, and check that it can be fine-tuned.

    Raises:
        WrongUsage: the model is not a decoder.
        Failure: as in `locate_model`.
    """
    return locate_model_of_kind(name, "decoder", "fine-tuning needs a model that does")


@contextlib.contextmanager
def report_load_errors(files: ModelFiles) -> Iterator[None]:
    """Convert errors that the `with` block raises while it loads `files` to a `Failure`.

    Raises:
        DoesNotFit: the memory is too small.
        Unusable: a file is damaged, missing or of an unsupported kind.
    """
    try:
        yield
    except MemoryError as error:
        raise DoesNotFit(f"cannot load {files.path}: {error}") from None
    except (ValueError, OSError) as error:
        raise Unusable(f"cannot load {files.path}: {error}") from None


@contextlib.contextmanager
def open_model(files: ModelFiles, cache_budget: int) -> Iterator[DecoderModel]:
    """Load a decoder and start its engine; at exit cancel its requests and stop the engine.

    Args:
        files: the files of the model, with an adapter or without.
        cache_budget: bytes for the KV cache.

    Raises:
        DoesNotFit: the memory is too small.
        Unusable: the files cannot be loaded.
    """
    from serve.models import resolve
    from serve.models.decoder import load_decoder, load_default_sampling

    with report_load_errors(files):
        served = load_decoder(
            files.id,
            files.path,
            owned_by=files.publisher,
            cache_budget=cache_budget,
            sha256=files.entry.files[0].sha256 if files.entry and files.entry.files else None,
            accepted_dtypes=files.entry.dtypes if files.entry else (),
            default_sampling=load_default_sampling(files, console.info),
            notify=console.info,
        )
        if files.adapter is not None:
            served = resolve.load_adapted(files.adapter, served, files.path)
    try:
        yield served
    finally:
        served.engine.close(drain=False, timeout=STOP_SECONDS)
