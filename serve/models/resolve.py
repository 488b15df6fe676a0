"""From the files of a model to its `ModelSpec`: catalogue, hub, local and fine-tuned models.

The headers of the files are read at once, so that a damaged file or an unknown kind is reported
before a server starts; weights are read when the model is first requested.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from serve.exceptions import Corrupt, Failure
from serve.models import adapters, catalogue, decoder, disk, download, fingerprint, hub, kinds
from serve.models.decoder import DecoderModel, load_adapter
from serve.models.spec import LoadOptions, ModelFiles, ModelSpec, stamp_of

log = logging.getLogger(__name__)


def describe(files: ModelFiles, options: LoadOptions) -> ModelSpec:
    """Return the spec of a model, from the headers of its files.

    Args:
        files: the files of the model.
        options: how to load it.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged or of an unknown kind, or the options do not suit the model.
        Failure: the files or the options do not suit the model.
    """
    return kinds.kind_of(files).describe(files, options)


class AdapterSpecs:
    """The specs of all fine-tuned models in a data folder. Each call looks for changes there.

    Args:
        home: the data folder.
        cache_budget: bytes for the keys and values of each model.
        bases: the files of possible base models, by id; `PulledSpecs` adds to them.
    """

    def __init__(self, home: Path, cache_budget: int, bases: Mapping[str, Path]):
        self._home, self._cache_budget, self._bases = home, cache_budget, bases
        self._specs_by_folder: dict[str, ModelSpec | None] = {}  # None if unreadable
        self._specs_by_id: Mapping[str, ModelSpec] = {}

    def __call__(self) -> Mapping[str, ModelSpec]:
        """Return the specs by id; the same object until a model is added or deleted."""
        if (names := adapters.folder_names(self._home)) == self._specs_by_folder.keys():
            return self._specs_by_id
        for name in sorted(names - self._specs_by_folder.keys()):
            self._specs_by_folder[name] = None
            try:
                self._specs_by_folder[name] = self._read_spec(self._home / "made" / name)
            except (OSError, ValueError) as error:  # just deleted, or not written by Pellucid
                log.warning("the fine-tuned model in %s is skipped: %s", name, error)
        for name in self._specs_by_folder.keys() - names:
            del self._specs_by_folder[name]
        specs = [spec for spec in self._specs_by_folder.values() if spec is not None]
        specs.sort(key=lambda spec: spec.created)
        self._specs_by_id = {spec.id: spec for spec in specs}
        return self._specs_by_id

    def _read_spec(self, folder: Path) -> ModelSpec:
        metadata = adapters.read_metadata(folder)

        def load(base: DecoderModel) -> DecoderModel:
            return load_adapted(
                folder, base, self._bases[metadata.base], max_batch_size=decoder.MAX_BATCH_SIZE
            )

        size = sum(file.stat().st_size for file in folder.iterdir())
        return ModelSpec(
            id=metadata.id,
            created=metadata.created,
            owned_by="local",
            memory=lambda: size + self._cache_budget,
            load=load,
            stamp=partial(stamp_of, folder, self._bases.get(metadata.base)),
            base=metadata.base,
        )


class PulledSpecs:
    """The specs of the pulled models, of the catalogue and of the hub.

    Each call looks for pulled and removed models. A model that cannot be used is skipped with a
    warning.

    Args:
        known_models: the catalogue.
        options: how to load the models.
        paths: the files, by id, of the models that the server was started with. The files of the
            pulled models are added.
    """

    def __init__(
        self, known_models: catalogue.Catalogue, options: LoadOptions, paths: dict[str, Path]
    ):
        self._known_models, self._options, self._paths = known_models, options, paths
        self._served_anyway = frozenset(paths)
        self._lock = threading.Lock()
        self._stamp: object = None
        self._specs: dict[str, tuple[ModelFiles, ModelSpec]] = {}
        self._specs_by_id: Mapping[str, ModelSpec] = {}

    @property
    def is_current(self) -> bool:
        """Whether no model was pulled or removed since the last call."""
        return self._changed_at() == self._stamp

    def __call__(self) -> Mapping[str, ModelSpec]:
        """Return the specs by id; the same object until a model is pulled or removed."""
        with self._lock:
            if (stamp := self._changed_at()) != self._stamp:
                self._read()
                self._stamp = stamp
            return self._specs_by_id

    def _read(self) -> None:
        specs: dict[str, tuple[ModelFiles, ModelSpec]] = {}
        for files in self._find():
            if files.id in self._served_anyway or files.id in specs:
                used = specs[files.id][0].path if files.id in specs else self._paths[files.id]
                if files.path != used:
                    log.warning("%s is skipped: the id %s means %s", files.path, files.id, used)
                continue
            if (old := self._specs.get(files.id)) is not None and old[0] == files:
                specs[files.id] = old
                continue
            try:
                specs[files.id] = files, describe(files, self._options)
            except (OSError, ValueError, Failure) as error:
                log.warning("the pulled model %s is skipped: %s", files.id, error)
        self._specs = specs
        self._paths |= {id: files.path for id, (files, _) in specs.items()}
        self._specs_by_id = {id: spec for id, (_, spec) in specs.items()}

    def _changed_at(self) -> object:
        try:
            return (self._options.home / disk.CHANGED_FILE).stat().st_mtime_ns
        except OSError:
            return "never"

    def _find(self) -> Iterator[ModelFiles]:
        home = self._options.home
        for model in self._known_models.models.values():
            with contextlib.suppress(Corrupt):  # `pellucid models` shows it as changed
                if files := download.find_pulled(model, home):
                    yield files
        for record in hub.records(home):
            if record.is_complete:
                try:
                    yield download.files_of_record(record)
                except (OSError, Failure) as error:
                    log.warning("the pulled model %s is skipped: %s", record.name, error)


def load_adapted(
    folder: Path, base: DecoderModel, path: Path, *, max_batch_size: int = 2
) -> DecoderModel:
    """Load a fine-tuned model from its folder and its base model.

    Args:
        folder: the folder of the fine-tuned model.
        base: the base model, loaded from the files at `path`.
        path: the files of the base model.
        max_batch_size: as for `load_adapter`.

    Raises:
        OSError: a file cannot be read.
        ValueError: the adapter is damaged, or was trained on other weights.
    """
    metadata = adapters.read_metadata(folder)
    if (digest := fingerprint.hash_weights(path)) != metadata.weights:
        raise ValueError(
            f"the adapter was trained on other weights than {metadata.base} has now: expected "
            f"SHA-256 {metadata.weights[:12]}..., got {digest[:12]}..."
        )
    return load_adapter(
        metadata.id,
        folder,
        base,
        created=metadata.created,
        owned_by="local",
        max_batch_size=max_batch_size,
    )
