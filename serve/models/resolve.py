"""From a model's files to its spec: those of the catalogue and of paths, and what was fine-tuned.

Headers are read at once, so that a damaged file or an unknown kind is known before a server
listens; weights are read when somebody asks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from serve.models import adapters, decoder, fingerprint, kinds
from serve.models.decoder import DecoderModel, load_adapter
from serve.models.spec import LoadOptions, ModelFiles, ModelSpec, stamp_of

log = logging.getLogger(__name__)


def describe(files: ModelFiles, options: LoadOptions) -> ModelSpec:
    """Return the model that files are, to be loaded when asked for.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged or of an unknown kind, or the options ask for more than it
            has.
    """
    return kinds.kind_of(files).describe(files, options)


class AdapterSpecs:
    """What the user has made, as offers; to be asked again whenever somebody wants to know.

    Args:
        home: the data folder.
        cache_budget: bytes for the keys and values of each model's conversations.
        bases: files of the models that can be a base, by id.
    """

    def __init__(self, home: Path, cache_budget: int, bases: Mapping[str, Path]):
        self._home, self._cache_budget, self._bases = home, cache_budget, bases
        self._specs_by_folder: dict[str, ModelSpec | None] = {}  # by the name of the folder
        self._specs_by_id: Mapping[str, ModelSpec] = {}  # by id

    def __call__(self) -> Mapping[str, ModelSpec]:
        """By id; the same object until something is made or deleted."""
        if (names := adapters.folder_names(self._home)) == self._specs_by_folder.keys():
            return self._specs_by_id
        for name in sorted(names - self._specs_by_folder.keys()):
            self._specs_by_folder[name] = None
            try:
                self._specs_by_folder[name] = self._read_spec(self._home / "made" / name)
            except (OSError, ValueError) as error:  # deleted since, or not of our making
                log.warning("%s is passed over: %s", name, error)
        for name in self._specs_by_folder.keys() - names:
            del self._specs_by_folder[name]
        found = [offer for offer in self._specs_by_folder.values() if offer is not None]
        by_age = sorted(found, key=lambda offer: offer.created)
        self._specs_by_id = {offer.id: offer for offer in by_age}
        return self._specs_by_id

    def _read_spec(self, folder: Path) -> ModelSpec:
        card = adapters.read_metadata(folder)

        def load(base: DecoderModel) -> DecoderModel:
            return load_adapted(
                folder, base, self._bases[card.base], max_batch_size=decoder.MAX_BATCH_SIZE
            )

        size = sum(file.stat().st_size for file in folder.iterdir())
        return ModelSpec(
            id=card.id,
            created=card.created,
            owned_by="local",
            memory=lambda: size + self._cache_budget,
            load=load,
            stamp=partial(stamp_of, folder, self._bases.get(card.base)),
            base=card.base,
        )


def load_adapted(
    folder: Path, base: DecoderModel, path: Path, *, max_batch_size: int = 2
) -> DecoderModel:
    """A model that was made here, from its folder and its base.

    Args:
        base: loaded, from the files at `path`.
        max_rows: see `load_adapter`.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is damaged, or was made of other weights.
    """
    card = adapters.read_metadata(folder)
    if (found := fingerprint.hash_weights(path)) != card.weights:
        raise ValueError(
            f"it was trained on other weights than {card.base} has now: "
            f"SHA-256 {card.weights[:12]}..., not {found[:12]}..."
        )
    return load_adapter(
        card.id, folder, base, created=card.created, owned_by="local", max_batch_size=max_batch_size
    )
