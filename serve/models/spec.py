"""The types of a model: its files, its spec, and the loaded model.

    ModelFiles  the paths of a model's files
    ModelSpec   its description, read from the headers of the files, and how to load it
    LoadedModel the model in memory; each kind has its own class with this protocol
    Kind        a kind of model, such as decoder or encoder; `kinds.py` holds the table

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from serve.models import generation_config
from serve.models.catalogue import CatalogueEntry


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model on this disk.

    Attributes:
        id: the id it is served under.
        path: a GGUF file, or a folder of several files.
        publisher: the publisher, `owned_by` in the API.
        entry: its entry in the catalogue, if it has one.
        adapter: the folder of a fine-tuned model based on it, if that is served.
        encoder: the folder of the text encoder of an image or moderation model.
    """

    id: str
    path: Path
    publisher: str
    entry: CatalogueEntry | None = None
    adapter: Path | None = None
    encoder: Path | None = None


# In the notation that the model was trained with, or in one that the prompt explains.
ToolSupport = Literal["trained", "prompted"]


class LoadedModel(Protocol):
    """A model in memory: the attributes and methods that all kinds of models have."""

    kind: ClassVar[str]

    @property
    def id(self) -> str:
        """Return the id under which the model is served."""
        ...

    @property
    def created(self) -> int:
        """Return the creation time of the model in seconds since 1970."""
        ...

    @property
    def owned_by(self) -> str:
        """Return the publisher of the model."""
        ...

    @property
    def context(self) -> int:
        """Return the maximum number of tokens: of prompt and completion, or of an input."""
        ...

    @property
    def dtype(self) -> str:
        """Return the dtype of the weights."""
        ...

    @property
    def fingerprint(self) -> str:
        """Return the system fingerprint of the model; see `fingerprint.py`."""
        ...

    @property
    def memory(self) -> int:
        """Return the bytes of memory that the model takes."""
        ...

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""
        ...

    def close(self, timeout: float) -> None:
        """Cancel all requests within `timeout` seconds, and accept no more."""
        ...


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The description of a model that is loaded when it is first requested.

    Attributes:
        id: the id it is served under.
        created: seconds since 1970.
        owned_by: the publisher.
        memory: returns the bytes of memory that the model will take, approximately; the maximum if
            its dtype is not chosen yet.
        load: loads the model, which takes seconds. Its argument is the loaded base model if `base`
            is set; else it has none.
        stamp: returns a value that changes when the files change.
        kind: the name of its `Kind`.
        base: the id of the base model whose weights it shares.
        path: the GGUF file or folder, if the model can be fine-tuned.
        default_sampling: default sampling parameters, if the model generates text.
        context: the maximum number of tokens, if it is known before loading.
        capabilities: the API tasks, as `serves` in `models.toml`; empty for all tasks of its kind.
        tools: how the model calls tools; None if it does not chat.
        evaluation: results on held-out data, for the model's card.
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
    context: int | None = None
    capabilities: tuple[str, ...] = ()
    tools: ToolSupport | None = None
    evaluation: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The options of a server for loading models.

    Attributes:
        cache_budget: bytes of the KV cache of a model.
        dtype: "float32", "bfloat16", "int8" or "auto". A kind without this dtype uses "auto".
        home: the data folder, where speeds are recorded.
        notify: called with a message for each slow operation.
        memory_limit: the maximum bytes of a model; None for the available memory.
        sampling_defaults: "model" for a model's own defaults, "openai" for those of OpenAI's API.
        max_embedding_tokens: the maximum tokens of an encoder's input; None for the model's own.
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
    """An example request, for the start banner and the documentation.

    Attributes:
        route: the path below /v1.
        call: the method of the official client; empty if it has none.
        result: the part of the response to print.
        fields: the fields of the request, except `model`.
        file: the name of a file to upload with it, if any.
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
        name: the name, as in `models.toml` and in the API's "kind".
        task: the task as a verb phrase, for messages ("... does not generate text").
        recognizes: whether a file or folder is of this kind, by its first bytes or config.json.
        describe: returns the spec of a model from the headers of its files. It raises OSError if a
            file cannot be read, and ValueError if a file is damaged or the options do not suit the
            model.
        example: returns an example request to a loaded model.
        has_encoder: whether models of this kind need a model of kind "encoder" for their texts.
    """

    name: str
    task: str
    recognizes: Callable[[Path], bool]
    describe: Callable[[ModelFiles, LoadOptions], ModelSpec]
    example: Callable[[Any], Example]
    has_encoder: bool = False


def stamp_of(*paths: Path | None) -> list[tuple[str, int, int]]:
    """Return names, sizes and modification times of files, to detect changes.

    Args:
        paths: files, or folders whose files are taken; None is skipped.

    Raises:
        OSError: a path does not exist.
    """
    files = [
        file
        for path in paths
        if path is not None
        for file in (sorted(path.iterdir()) if path.is_dir() else [path])
    ]
    return [(str(file), (status := file.stat()).st_size, status.st_mtime_ns) for file in files]
