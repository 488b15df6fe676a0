"""From a model's files on this disk to what a server offers: how it would be loaded, and its size.

The files' headers are read here, so that what is damaged or of an unknown kind is known before a
server listens; weights are read when somebody asks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from audio.checkpoint import is_whisper
from serve.models import adapters, benchmarks, dtypes, fingerprint, sampling
from serve.models.decoder import ServedModel, load_adapter, load_model, weights_file
from serve.models.download import Located, draws
from serve.models.dtypes import FORMATS
from serve.models.encoder import FORMATS as EMBEDDING_FORMATS
from serve.models.encoder import EmbeddingModel, load_embedder, with_max_tokens
from serve.models.images import DrawingModel, load_painter
from serve.models.registry import Offer
from serve.models.speech import FORMATS as SPEECH_FORMATS
from serve.models.speech import SpeechModel, load_speech
from transformer import checkpoint
from transformer.checkpoint import bert
from transformer.checkpoint.safetensors import read_object

log = logging.getLogger(__name__)

MAX_ROWS = 16  # of a decoding step, on a server
RECORD_SECONDS = 60.0  # between two notes of a model's speed


def offer(
    place: Located,
    *,
    cache_budget: int,
    dtype: str,
    home: Path,
    notify: Callable[[str], None],
    memory_limit: int | None = None,
    sampling_defaults: sampling.Defaults = "model",
    max_embedding_tokens: int | None = None,
) -> Offer:
    """A model to be loaded when asked for.

    Args:
        place: its files.
        cache_budget: bytes for the keys and values of its conversations.
        dtype: see `load_model`. An encoder that cannot be had in it takes its own choice.
        home: the data folder, where its speed is noted.
        notify: told a line for each thing that takes long.
        memory_limit: bytes that it may take at most; None for what is free.
        sampling_defaults: "model" for its own defaults, "openai" for those of OpenAI's API.
        max_embedding_tokens: of the longest input of an encoder; None for its own limit.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged or of an unknown kind, or an encoder has fewer positions.
    """
    if is_painter(place):
        return _offer_of_painter(place, notify)
    if is_encoder(place):
        return _offer_of_encoder(place, dtype, max_embedding_tokens, notify)
    if is_speech(place):
        return _offer_of_speech(place, dtype, notify)
    cfg = checkpoint.read_config(place.path)
    sha256 = place.model.files[0].sha256 if place.model else None
    good = place.model.formats if place.model else ()
    defaults = sampling_of(place, notify) if sampling_defaults == "model" else {}

    def memory() -> int:
        name = fingerprint.on_machine(sha256 or fingerprint.of_weights(place.path))
        format = dtypes.expected(cfg, name, cache_budget, good, memory_limit)
        if dtype in FORMATS:
            format = FORMATS[FORMATS.index(dtype)]
        return dtypes.weight_bytes(cfg, format) + cache_budget

    def load() -> ServedModel:
        noted = 0.0

        def on_speed(tokens: int, seconds: float) -> None:
            nonlocal noted
            if (now := time.monotonic()) - noted > RECORD_SECONDS or not noted:
                noted = now
                benchmarks.record(
                    home, place.id, tokens=tokens, seconds=seconds, memory=served.memory
                )

        served = load_model(
            place.id,
            place.path,
            owned_by=place.publisher,
            cache_budget=cache_budget,
            dtype=dtype,
            max_rows=MAX_ROWS,
            sha256=sha256,
            good=good,
            memory_limit=memory_limit,
            sampling=defaults,
            notify=notify,
            on_speed=on_speed,
        )
        return served

    return Offer(
        id=place.id,
        created=int(weights_file(place.path).stat().st_mtime),
        owned_by=place.publisher,
        memory=memory,
        load=load,
        stamp=partial(_stamp, place.path),
        path=place.path,
        sampling=defaults,
    )


def sampling_of(place: Located, notify: Callable[[str], None]) -> dict[str, float]:
    """The sampling defaults of a decoder; see `sampling.of_model`."""
    return sampling.of_model(place.model.sampling if place.model else {}, place.path, notify)


class Shelf:
    """What the user has made, as offers; to be asked again whenever somebody wants to know.

    Args:
        home: the data folder.
        cache_budget: bytes for the keys and values of each model's conversations.
        bases: files of the models that can be a base, by id.
    """

    def __init__(self, home: Path, cache_budget: int, bases: Mapping[str, Path]):
        self._home, self._cache_budget, self._bases = home, cache_budget, bases
        self._offers: dict[str, Offer | None] = {}  # by the name of the folder
        self._known: Mapping[str, Offer] = {}  # by id

    def __call__(self) -> Mapping[str, Offer]:
        """By id; the same object until something is made or deleted."""
        if (names := adapters.names(self._home)) == self._offers.keys():
            return self._known
        for name in sorted(names - self._offers.keys()):
            self._offers[name] = None
            try:
                self._offers[name] = self._offer(self._home / "made" / name)
            except (OSError, ValueError) as error:  # deleted since, or not of our making
                log.warning("%s is passed over: %s", name, error)
        for name in self._offers.keys() - names:
            del self._offers[name]
        found = [offer for offer in self._offers.values() if offer is not None]
        by_age = sorted(found, key=lambda offer: offer.created)
        self._known = {offer.id: offer for offer in by_age}
        return self._known

    def _offer(self, folder: Path) -> Offer:
        card = adapters.read(folder)

        def load(base: ServedModel) -> ServedModel:
            return adapted(folder, base, self._bases[card.base], max_rows=MAX_ROWS)

        size = sum(file.stat().st_size for file in folder.iterdir())
        return Offer(
            id=card.id,
            created=card.created,
            owned_by="local",
            memory=lambda: size + self._cache_budget,
            load=load,
            stamp=partial(_stamp, folder, self._bases.get(card.base)),
            base=card.base,
        )


def adapted(folder: Path, base: ServedModel, path: Path, *, max_rows: int = 2) -> ServedModel:
    """A model that was made here, from its folder and its base.

    Args:
        base: loaded, from the files at `path`.
        max_rows: see `load_adapter`.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is damaged, or was made of other weights.
    """
    card = adapters.read(folder)
    if (found := fingerprint.of_weights(path)) != card.weights:
        raise ValueError(
            f"it was trained on other weights than {card.base} has now: "
            f"SHA-256 {card.weights[:12]}..., not {found[:12]}..."
        )
    return load_adapter(
        card.id, folder, base, created=card.created, owned_by="local", max_rows=max_rows
    )


def is_encoder(place: Located) -> bool:
    """Whether a model makes embeddings: as the catalogue says, or its own config.json."""
    if place.model is not None:
        return place.model.kind == "encoder"
    return place.path.is_dir() and bert.is_bert(place.path)


def is_speech(place: Located) -> bool:
    """Whether a model writes down speech: as the catalogue says, or its own config.json."""
    if place.model is not None:
        return place.model.kind == "speech"
    return place.path.is_dir() and is_whisper(place.path)


def _offer_of_speech(place: Located, dtype: str, notify: Callable[[str], None]) -> Offer:
    weights = [place.path / name for name in ("model.bin", "model.safetensors")]

    def load() -> SpeechModel:
        return load_speech(
            place.id,
            place.path,
            owned_by=place.publisher,
            dtype=dtype if dtype in SPEECH_FORMATS else "auto",
            notify=notify,
        )

    return Offer(
        id=place.id,
        created=int(weights_file(place.path).stat().st_mtime),
        owned_by=place.publisher,
        memory=lambda: sum(path.stat().st_size for path in weights if path.is_file()),
        load=load,
        stamp=partial(_stamp, place.path),
        kind="speech",
    )


def is_painter(place: Located) -> bool:
    """Whether a model draws: as the catalogue says, or what is in its folder."""
    if place.model is not None:
        return place.model.kind == "images"
    return place.path.is_dir() and draws(place.path)


def _offer_of_painter(place: Located, notify: Callable[[str], None]) -> Offer:
    assert place.encoder is not None
    encoder = place.encoder
    parts = [place.path / "denoiser", place.path / "upscaler", encoder]
    weights = [part / "model.safetensors" for part in parts]
    for part in parts:
        read_object(part / "config.json")  # raises now, not when somebody asks

    def load() -> DrawingModel:
        return load_painter(place.id, place.path, encoder, owned_by=place.publisher, notify=notify)

    return Offer(
        id=place.id,
        created=int((parts[0] / "config.json").stat().st_mtime),
        owned_by=place.publisher,
        memory=lambda: 2 * sum(path.stat().st_size for path in weights),  # stored in half as much
        load=load,
        stamp=partial(_stamp, *parts),
        kind="images",
    )


def _offer_of_encoder(
    place: Located, dtype: str, max_tokens: int | None, notify: Callable[[str], None]
) -> Offer:
    with_max_tokens(bert.read_config(place.path), max_tokens)  # raises now, not at a request

    def load() -> EmbeddingModel:
        return load_embedder(
            place.id,
            place.path,
            owned_by=place.publisher,
            dtype=dtype if dtype in EMBEDDING_FORMATS else "auto",
            max_tokens=max_tokens,
            notify=notify,
        )

    return Offer(
        id=place.id,
        created=int(weights_file(place.path).stat().st_mtime),
        owned_by=place.publisher,
        memory=lambda: (place.path / "model.safetensors").stat().st_size,
        load=load,
        stamp=partial(_stamp, place.path),
        kind="encoder",
    )


def _stamp(*paths: Path | None) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files; another list when one of them changes."""
    files = [
        file
        for path in paths
        if path is not None
        for file in (sorted(path.iterdir()) if path.is_dir() else [path])
    ]
    return [(str(file), (found := file.stat()).st_size, found.st_mtime_ns) for file in files]
