"""One model, one type: its files, what they are, and what is loaded of them.

    ModelFiles  where a model's files are on this disk
    ModelSpec   what they are, read from their headers, and how they would be loaded
    LoadedModel the model in memory; each kind has its own class with this protocol
    Kind        what Pellucid knows of a kind of model; `kinds.py` is the table

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from serve.models import generation_config
from serve.models.catalogue import CatalogueEntry


@dataclass(frozen=True)
class ModelFiles:
    """A model on this disk.

    Attributes:
        id: The name it is served under.
        path: A GGUF file, or a folder of several files.
        publisher: Who made it, as `owned_by` of the API says.
        model: What the catalogue says of it, if it is in there.
        adapter: What was made of it here: the folder of a model that the user fine-tuned.
        encoder: The folder of the model that reads its prompts, if it draws.
    """

    id: str
    path: Path
    publisher: str
    entry: CatalogueEntry | None = None
    adapter: Path | None = None
    encoder: Path | None = None


class LoadedModel(Protocol):
    """A model in memory."""

    kind: ClassVar[str]

    @property
    def id(self) -> str: ...
    @property
    def created(self) -> int:
        """Seconds since 1970."""
        ...

    @property
    def owned_by(self) -> str: ...
    @property
    def context(self) -> int:
        """Tokens that it reads at most."""
        ...

    @property
    def dtype(self) -> str:
        """The dtype of its weights."""
        ...

    @property
    def fingerprint(self) -> str: ...
    @property
    def memory(self) -> int:
        """Bytes that it takes."""
        ...

    @property
    def is_idle(self) -> bool:
        """Whether nobody is being answered by it."""
        ...

    def close(self, timeout: float) -> None:
        """Cancel what is being answered, within `timeout` seconds, and answer nobody any more."""
        ...


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model that is loaded when somebody asks for it.

    Attributes:
        id, created, owned_by: as of the model it becomes.
        kind: the name of its `Kind`.
        memory: says how many bytes it will take, about; of a model that was not measured yet, at
            most.
        load: loads it; blocks for seconds. Given the loaded base, where there is one.
        stamp: gives another value when its files have changed.
        base: the id of the model whose weights it shares.
        path: its files, where it can be trained further.
        sampling: its defaults, where it generates text.
    """

    id: str
    created: int
    owned_by: str
    memory: Callable[[], int]
    load: Callable[..., LoadedModel]
    stamp: Callable[[], object] = lambda: None
    kind: str = "decoder"
    base: str | None = None
    path: Path | None = None
    default_sampling: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What a server decides about its models.

    Attributes:
        cache_budget: bytes for the keys and values of a model's conversations.
        dtype: "float32", "bfloat16", "int8" or "auto". A kind that lacks it takes its own choice.
        home: the data folder, where speeds are noted.
        notify: told a line for each thing that takes long.
        memory_limit: bytes that a model may take at most; None for what is free.
        sampling_defaults: "model" for a model's own defaults, "openai" for those of OpenAI's API.
        max_embedding_tokens: of the longest input of an encoder; None for its own limit.
    """

    cache_budget: int
    dtype: str
    home: Path
    notify: Callable[[str], None]
    memory_limit: int | None = None
    sampling_defaults: generation_config.DefaultsSource = "model"
    max_embedding_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    """A request to show people: a route below /v1, the official client's call, what to print.

    Attributes:
        fields: of the request, beside `model`.
        file: the name of a file that goes with it, as a form.
    """

    route: str
    call: str
    result: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    file: str | None = None


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of model.

    Attributes:
        name: as in `models.toml` and in the API's "kind".
        does: what such models do, behind "does not": "generate text".
        recognizes: whether a file or folder is one, by its first bytes or its config.json.
        describe: reads the headers of its files. Raises OSError where a file cannot be read, and
            ValueError where it is damaged or the options ask for what it does not have.
        example: a request to a loaded one.
        has_encoder: whether it needs a model of kind "encoder" that reads its prompts.
    """

    name: str
    task: str
    recognizes: Callable[[Path], bool]
    describe: Callable[[ModelFiles, LoadOptions], ModelSpec]
    example: Callable[[Any], Example]
    has_encoder: bool = False


def stamp_of(*paths: Path | None) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files; another list when one of them changes."""
    files = [
        file
        for path in paths
        if path is not None
        for file in (sorted(path.iterdir()) if path.is_dir() else [path])
    ]
    return [(str(file), (found := file.stat()).st_size, found.st_mtime_ns) for file in files]
