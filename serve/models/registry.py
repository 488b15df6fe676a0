"""The models of a server: lookup by id or alias, loading and unloading.

`catalogue.py` lists the models that can be pulled; this file holds the models that are served. A
name that is neither an id nor an alias of a served model, and matches no pattern of names, raises
`UnknownModel`; there is no fallback to another model.

A model is loaded when it is first requested. When memory is short, the least recently used idle
models are unloaded. Unloading only drops the registry's reference: a request handler that holds the
model may still use it.

Fine-tuned and pulled models can be added and removed while a server runs. So each lookup and each
listing first looks for changes in the data folder.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from serve.exceptions import CannotLoad, Failure, UnknownModel
from serve.models.catalogue import NamePattern, match_pattern
from serve.models.spec import LoadedModel, ModelSpec

Specs = Callable[[], Mapping[str, ModelSpec]]


class PulledSource(Protocol):
    """Returns the current pulled models by id. It may be called on any thread."""

    @property
    def is_current(self) -> bool:
        """Whether a call returns at once: no model was pulled or removed since the last one."""
        ...

    def __call__(self) -> Mapping[str, ModelSpec]:
        """Return the specs by id; reads the headers of new models, up to seconds."""
        ...


@dataclass(frozen=True)
class ModelStatus:
    """The status of a served model.

    Attributes:
        id: the id of the model.
        kind: its kind.
        state: whether it is in memory.
        memory: the bytes that it takes; None if it is not loaded.
        loaded_at: seconds since 1970; None if it is not loaded.
        requests: the number of requests since the server started.
        is_idle: whether no request waits or runs.
    """

    id: str
    kind: str
    state: Literal["loaded", "loading", "unloaded"]
    memory: int | None
    loaded_at: float | None
    requests: int
    is_idle: bool


class Registry:
    """Served models by id, in order, and their aliases.

    Use it from one event loop. `load` and `close` block: call them before and after the loop, or on
    the loading thread.

    Args:
        models: at least one model, loaded or not; the first is the default. Ids must differ.
        aliases: ids by alias. An alias of a model that is not served is unknown.
        patterns: patterns of names, tried in order after ids and aliases. A name that matches the
            pattern of a model that is not served is unknown.
        memory_limit: the maximum bytes of all loaded models; None for the available memory.
        not_pulled: ids of catalogue models that are not pulled.
        adapter_specs: returns the current fine-tuned models by id. Those whose base is not served
            are not served either.
        pulled_specs: returns the current pulled models by id, besides `models`.
        tools_model: the id of the model that answers requests with tools under an alias.

    Raises:
        ValueError: `models` is empty, or an id occurs twice.
    """

    def __init__(
        self,
        models: Sequence[LoadedModel | ModelSpec],
        aliases: Mapping[str, str],
        *,
        patterns: Sequence[NamePattern] = (),
        memory_limit: int | None = None,
        not_pulled: Collection[str] = (),
        adapter_specs: Specs = dict,
        pulled_specs: PulledSource | None = None,
        tools_model: str | None = None,
    ):
        if not models:
            raise ValueError("models is empty: a server needs at least one model")
        self._models = {model.id: model for model in models}
        if len(self._models) < len(models):
            raise ValueError(f"models has an id twice: {', '.join(m.id for m in models)}")
        # The event loop reads `_loaded` while the loading thread changes it, so a function must
        # not rely on two accesses seeing the same models.
        self._loaded = {m.id: m for m in models if not isinstance(m, ModelSpec)}
        self._last_used = dict.fromkeys(
            self._loaded, 0
        )  # number of the last request for each model
        self._use_counter = itertools.count(1)
        self._aliases, self._patterns = dict(aliases), tuple(patterns)
        self._tools_model = tools_model
        self._memory_limit, self._not_pulled = memory_limit, frozenset(not_pulled)
        self._loading: dict[str, asyncio.Future[LoadedModel]] = {}
        # A separate thread: waiting loads must not occupy the threads that prepare requests.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._load_lock = threading.RLock()  # reentrant: `load` loads the base model too
        self._damaged: dict[str, tuple[object, str]] = {}  # by id: stamp of the files, error
        # In this order, because an adapter may belong to a pulled model.
        self._sources: tuple[Specs, ...] = (pulled_specs or dict, adapter_specs)
        self._pulled_specs = pulled_specs
        self._known: dict[Specs, Mapping[str, ModelSpec]] = {}
        self._requests: Counter[str] = Counter()
        self._loaded_at = dict.fromkeys(self._loaded, time.time())

    @property
    def default(self) -> str:
        """Return the id of the default model."""
        return next(iter(self._models))

    @property
    def is_alive(self) -> bool:
        """Whether the device thread of all models runs."""
        from transformer.engine.device import default_device

        return default_device().is_alive

    async def refresh(self) -> None:
        """Read the headers of newly pulled models on a thread.

        Each lookup reads them if need be, but blocks the event loop meanwhile.
        """
        if self._pulled_specs is not None and not self._pulled_specs.is_current:
            await asyncio.to_thread(self._pulled_specs)

    def list_models(self) -> list[LoadedModel | ModelSpec]:
        """Return the served models in order: the loaded model, or its spec if it is not loaded."""
        self._refresh()
        return [self._loaded.get(id, model) for id, model in self._models.items()]

    def loaded(self) -> list[LoadedModel]:
        """Return the loaded models, in the order of `list_models`."""
        models = [self._loaded.get(id) for id in list(self._models)]
        return [model for model in models if model is not None]

    def aliases_of(self, id: str) -> list[str]:
        """Return the aliases of a model."""
        return [name for name, target in self._aliases.items() if target == id]

    def is_pattern(self, name: str) -> bool:
        """Return whether a name is neither an id nor an alias, but matches a pattern."""
        return name not in self._models and name not in self._aliases and bool(self._match(name))

    def _match(self, name: str) -> str | None:
        """Return the id that the first matching pattern names, or None."""
        return None if name in self._not_pulled else match_pattern(self._patterns, name)

    def resolve(self, name: str) -> LoadedModel | ModelSpec:
        """Return the loaded model or the spec for a name: an id, else an alias, else a pattern.

        Raises:
            UnknownModel: no served model has this name.
        """
        self._refresh()
        id = name
        if name not in self._models:
            id = self._aliases.get(name) or self._match(name) or name
        if id not in self._models:
            raise UnknownModel(name, id if id in self._not_pulled else None)
        return self._loaded.get(id, self._models[id])

    def resolve_for_tools(self, name: str) -> str:
        """Return the id of the model that answers a request with tools under this name.

        An id stands for its model. An alias stands for the model for tools, if that is served, and
        the model of the alias was not trained to call tools.

        Raises:
            UnknownModel: no served model has this id or alias.
        """
        model = self.resolve(name)
        is_prompted = getattr(model, "tools", None) == "prompted"
        if name not in self._models and is_prompted and self._tools_model in self._models:
            return self._tools_model
        return model.id

    def spec(self, name: str) -> ModelSpec | None:
        """Return the spec for an id or alias; None for a model that was passed in loaded.

        Raises:
            UnknownModel: no served model has this id or alias.
        """
        model = self._models[self.resolve(name).id]
        return model if isinstance(model, ModelSpec) else None

    def status(self, name: str) -> ModelStatus:
        """Return the status of the model with this id or alias.

        Raises:
            UnknownModel: no served model has this id or alias.
        """
        model = self.resolve(name)
        is_loaded = not isinstance(model, ModelSpec)
        return ModelStatus(
            id=model.id,
            kind=model.kind,
            state="loaded" if is_loaded else "loading" if model.id in self._loading else "unloaded",
            memory=model.memory if is_loaded else None,
            loaded_at=self._loaded_at.get(model.id) if is_loaded else None,
            requests=self._requests[model.id],
            is_idle=model.is_idle if is_loaded else True,
        )

    def _refresh(self) -> None:
        """Add new fine-tuned and pulled models, and drop removed ones."""
        has_changed = False  # a pulled model may be the base of an adapter
        for source in self._sources:
            known = self._known.get(source, {})
            if (specs := source()) == known and not has_changed:
                continue
            has_changed = True
            for id in known.keys() - specs.keys():
                self._models.pop(id, None)
                self._loaded.pop(id, None)
            for id, spec in specs.items():
                if spec.base is not None:
                    if (base := self._models.get(spec.base)) is None:
                        continue
                    sampling = getattr(base, "default_sampling", {})
                    tools = getattr(base, "tools", None)
                    spec = replace(spec, default_sampling=sampling, tools=tools)
                if known.get(id) != specs[id] and id in known:  # pulled again, as another commit
                    self._models[id] = spec
                    self._loaded.pop(id, None)
                self._models.setdefault(id, spec)
            self._known[source] = specs

    async def get(self, name: str) -> LoadedModel:
        """Return the model with this id or alias, after loading it if necessary.

        Raises:
            UnknownModel: no served model has this id or alias.
            CannotLoad: memory does not suffice, or the model's files are damaged.
        """
        id = self.resolve(name).id
        self._last_used[id] = next(self._use_counter)
        self._requests[id] += 1
        return await self.load_soon(id)

    async def load_soon(self, name: str) -> LoadedModel:
        """Return a model, after loading it on the loading thread if necessary; raises as `get`."""
        id = self.resolve(name).id
        if (model := self._loaded.get(id)) is not None:
            return model
        task = self._loading.get(id)
        if task is None:
            task = asyncio.get_running_loop().run_in_executor(self._loader, self.load, id)
            self._loading[id] = task
            task.add_done_callback(lambda _: self._loading.pop(id))
        return await asyncio.shield(task)  # a cancelled request does not cancel the load

    def load(self, id: str) -> LoadedModel:
        """Load a served model if it is not loaded, unloading others if necessary. Blocks.

        Raises:
            UnknownModel: no served model has this id.
            CannotLoad: memory does not suffice, or the model's files are damaged.
        """
        with self._load_lock:
            if (model := self._loaded.get(id)) is not None:
                return model
            if (spec := self._models.get(id)) is None:
                raise UnknownModel(id)
            assert isinstance(spec, ModelSpec)
            stamp = None
            try:
                stamp = spec.stamp()
                if (damage := self._damaged.get(id)) is not None and damage[0] == stamp:
                    raise CannotLoad(id, damage[1], is_busy=False)  # the files are unchanged
                base = [] if spec.base is None else [self.load(spec.base)]
                self._evict_until_fits(spec)
                model = spec.load(*base)
            except MemoryError as error:
                raise CannotLoad(id, str(error), is_busy=bool(self._loaded)) from error
            except (OSError, ValueError, Failure) as error:
                if self._models.get(id) is not spec:  # a pull deleted the files that it replaced
                    return self.load(id)
                if not isinstance(error, OSError):  # an OSError may be temporary
                    self._damaged[id] = stamp, str(error)
                raise CannotLoad(id, str(error), is_busy=False) from error
            # Stored before the check: `_refresh`, on another thread, changes `_models` and then
            # `_loaded`, so that either it or this function drops an old model.
            self._loaded[id] = model
            if self._models.get(id) is not spec:  # removed or pulled again while it loaded
                self._loaded.pop(id, None)
                del model
                return self.load(id)
            self._loaded_at[id] = time.time()
            self._last_used[id] = next(self._use_counter)  # not the first one to unload
            return model

    async def unload_soon(self, name: str) -> bool:
        """Unload a model on the loading thread, and return whether it is unloaded now.

        Raises:
            UnknownModel: no served model has this id or alias.
        """
        id = self.resolve(name).id
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._loader, self.unload, id)
        return id not in self._loaded

    def unload(self, id: str) -> bool:
        """Unload a model.

        Returns:
            Whether the model was unloaded. A model is kept if it is busy, if it was passed in
            loaded, or if another loaded model shares its weights.
        """
        model = self._loaded.get(id)
        if model is None or not isinstance(self._models.get(id), ModelSpec) or not model.is_idle:
            return False
        if any(
            getattr(self._models.get(other), "base", None) == id for other in list(self._loaded)
        ):
            return False
        self._loaded.pop(id, None)
        del model
        gc.collect()
        return True

    def remove(self, id: str) -> None:
        """Stop serving a model. Its current requests run to the end.

        Raises:
            UnknownModel: no served model has this id.
            ValueError: the model is the only one.
        """
        if id not in self._models:
            raise UnknownModel(id)
        if len(self._models) == 1:
            raise ValueError(f"{id} is the only model: a server needs at least one")
        del self._models[id]
        self._loaded.pop(id, None)

    def close(self, timeout: float = 5.0) -> None:
        """Cancel the requests of all models within `timeout` seconds, and load no more."""
        self._loader.shutdown(wait=False, cancel_futures=True)
        for model in self.loaded():
            model.close(timeout)

    def _evict_until_fits(self, spec: ModelSpec) -> None:
        """Unload the least recently used models until a model fits into memory."""
        from serve.models import memory
        from serve.models.dtypes import WORKING_MEMORY

        needed = spec.memory()

        def is_short() -> bool:
            used = sum(model.memory for model in self.loaded())
            is_over = self._memory_limit is not None and used + needed > self._memory_limit
            return is_over or needed + WORKING_MEMORY > memory.available()

        if self._memory_limit is not None and needed > self._memory_limit:
            raise CannotLoad(  # unloading others would not help
                spec.id,
                f"the model needs {needed / 2**20:.0f} MB, more than the limit of "
                f"{self._memory_limit / 2**20:.0f} MB for all models together: raise --memory-mb "
                "or choose a smaller model",
                is_busy=False,
            )
        while is_short():
            least_recent = sorted(self._loaded, key=lambda id: self._last_used.get(id, 0))
            if not any(self.unload(id) for id in least_recent if id != spec.base):
                if self._memory_limit is None or not self._loaded:
                    return  # loading raises MemoryError if memory does not suffice
                raise CannotLoad(
                    spec.id,
                    f"the model needs {needed / 2**20:.0f} MB of the limit of "
                    f"{self._memory_limit / 2**20:.0f} MB for all models together, and the loaded "
                    "models are busy: try again later",
                    is_busy=True,
                )
