"""The models a server offers, found by id or by alias, and which of them are in memory.

What could be pulled stands in `catalogue.py`; here is what can be asked for. A name that is neither
an id nor an alias of an offered model is an error, never another model's answer.

A model is loaded when it is first asked for. When memory is short, those that were not asked for
the longest are let go first, if nobody is being answered by them. Letting go is only forgetting:
who still holds a model (a handler between finding it and asking it) may use it to the end.

What the user makes (fine-tuned models) comes and goes while a server runs. Who asks for a list or a
name is told of what is there now: the shelf is looked at each time, which is reading one folder.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from serve.exceptions import CannotLoad, Failure, UnknownModel
from serve.models.spec import LoadedModel, ModelSpec


class Registry:
    """Offered models by id, in the order given, and the aliases that lead to them.

    To be used from one event loop, but for `load` and `close`, which block: they are called before
    and after it, and on the loading thread.

    Args:
        models: At least one, loaded or not; the first is the default. Ids must differ.
        aliases: Other names by the id they stand for. One whose model is not offered is unknown.
        memory_limit: Bytes that loaded models may take together; None for what there is.
        absent: Ids of models that could be pulled.
        shelf: What the user has made by now, by id. Those whose base is not offered are not either.
    """

    def __init__(
        self,
        models: Sequence[LoadedModel | ModelSpec],
        aliases: Mapping[str, str],
        *,
        memory_limit: int | None = None,
        not_pulled: Collection[str] = (),
        adapter_specs: Callable[[], Mapping[str, ModelSpec]] = dict,
    ):
        if not models:
            raise ValueError("models is empty: a server needs at least one")
        self._models = {model.id: model for model in models}
        if len(self._models) < len(models):
            raise ValueError(f"models has an id twice: {', '.join(m.id for m in models)}")
        # Read by the event loop while the thread that loads adds and deletes: no step of either
        # needs two looks at it.
        self._loaded = {m.id: m for m in models if not isinstance(m, ModelSpec)}
        self._last_used = dict.fromkeys(self._loaded, 0)  # when, in requests
        self._use_counter = itertools.count(1)
        self._aliases = dict(aliases)
        self._memory_limit, self._not_pulled = memory_limit, frozenset(not_pulled)
        self._loading: dict[str, asyncio.Future[LoadedModel]] = {}
        # A thread of its own: loads that wait must not take those which requests are prepared on.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._load_lock = threading.RLock()  # again by the same thread: the base of a model
        self._damaged: dict[str, tuple[object, str]] = {}  # the stamp of its files, what is wrong
        self._adapter_specs = adapter_specs
        self._known_adapters: Mapping[str, ModelSpec] = {}

    @property
    def default(self) -> str:
        """The id of the model for those who do not care."""
        return next(iter(self._models))

    @property
    def is_alive(self) -> bool:
        """Whether the thread that computes for all models still does."""
        from transformer.engine.device import default_device

        return default_device().is_alive

    def list_models(self) -> list[LoadedModel | ModelSpec]:
        """What is offered, as its card: the loaded model, or how it would be loaded."""
        self._refresh_adapters()
        return [self._loaded.get(id, card) for id, card in self._models.items()]

    def loaded(self) -> list[LoadedModel]:
        """What is in memory, in the order of `list`."""
        found = [self._loaded.get(id) for id in list(self._models)]
        return [model for model in found if model is not None]

    def aliases_of(self, id: str) -> list[str]:
        """The names that stand for a model."""
        return [name for name, target in self._aliases.items() if target == id]

    def resolve(self, name: str) -> LoadedModel | ModelSpec:
        """The card of the model with this id or alias. An id is looked up first.

        Raises:
            UnknownModel: There is none.
        """
        self._refresh_adapters()
        id = name if name in self._models else self._aliases.get(name, name)
        if id not in self._models:
            raise UnknownModel(name, id if id in self._not_pulled else None)
        return self._loaded.get(id, self._models[id])

    def spec(self, name: str) -> ModelSpec | None:
        """How the model with this id or alias is loaded; None for one that came loaded.

        Raises:
            UnknownModel: There is none.
        """
        card = self._models[self.resolve(name).id]
        return card if isinstance(card, ModelSpec) else None

    def _refresh_adapters(self) -> None:
        """Takes note of what was put on the shelf or taken from it since the last time."""
        if (found := self._adapter_specs()) == self._known_adapters:
            return
        for id in self._known_adapters.keys() - found.keys():
            self._models.pop(id, None)
            self._loaded.pop(id, None)
        for id, offer in found.items():
            if (base := self._models.get(offer.base or "")) is not None:
                sampling = getattr(base, "default_sampling", {})
                self._models.setdefault(id, replace(offer, sampling=sampling))
        self._known_adapters = found

    async def get(self, name: str) -> LoadedModel:
        """The model with this id or alias, loaded by now.

        Raises:
            UnknownModel: There is none.
            CannotLoad: There is no room for it, or its files are damaged.
        """
        id = self.resolve(name).id
        self._last_used[id] = next(self._use_counter)
        if (model := self._loaded.get(id)) is not None:
            return model
        task = self._loading.get(id)
        if task is None:
            task = asyncio.get_running_loop().run_in_executor(self._loader, self.load, id)
            self._loading[id] = task
            task.add_done_callback(lambda _: self._loading.pop(id))
        return await asyncio.shield(task)  # who leaves while it loads does not stop it for others

    def load(self, id: str) -> LoadedModel:
        """Loads an offered model, if it is not, and lets others go for it where need be. Blocks.

        Raises:
            CannotLoad: There is no room for it, or its files are damaged.
        """
        with self._load_lock:
            if (model := self._loaded.get(id)) is not None:
                return model
            if (offer := self._models.get(id)) is None:
                raise UnknownModel(id)
            assert isinstance(offer, ModelSpec)
            stamp = None
            try:
                stamp = offer.stamp()
                if (damage := self._damaged.get(id)) is not None and damage[0] == stamp:
                    raise CannotLoad(id, damage[1], is_busy=False)  # it would be no different
                base = [] if offer.base is None else [self.load(offer.base)]
                self._evict_until_fits(offer)
                model = offer.load(*base)
            except MemoryError as error:
                raise CannotLoad(id, str(error), is_busy=bool(self._loaded)) from error
            except (OSError, ValueError, Failure) as error:
                if not isinstance(error, OSError):  # which may pass
                    self._damaged[id] = stamp, str(error)
                raise CannotLoad(id, str(error), is_busy=False) from error
            if id not in self._models:  # removed meanwhile
                raise UnknownModel(id)
            self._loaded[id] = model
            return model

    def unload(self, id: str) -> bool:
        """Lets a loaded model go.

        Returns:
            Whether it did: not one that works, came loaded, or whose weights a loaded one shares.
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
        """Offers a model no longer. Who is being answered by it is answered to the end.

        Raises:
            UnknownModel: There is none with this id.
        """
        if id not in self._models:
            raise UnknownModel(id)
        if len(self._models) == 1:
            raise ValueError(f"{id} is the only model: a server needs one")
        del self._models[id]
        self._loaded.pop(id, None)

    def close(self, timeout: float = 5.0) -> None:
        """Cancel what is being answered, by all models, within `timeout` seconds; load no more."""
        self._loader.shutdown(wait=False, cancel_futures=True)
        for model in self.loaded():
            model.close(timeout)

    def _evict_until_fits(self, spec: ModelSpec) -> None:
        """Lets go of what has not been asked for the longest, until an offered model fits."""
        from serve.models import memory
        from serve.models.dtypes import WORKING_MEMORY

        needed = spec.memory()

        def is_short() -> bool:
            held = sum(model.memory for model in self.loaded())
            over = self._memory_limit is not None and held + needed > self._memory_limit
            return over or needed + WORKING_MEMORY > memory.available()

        if self._memory_limit is not None and needed > self._memory_limit:
            raise CannotLoad(  # letting others go would not help
                spec.id,
                f"it needs {needed / 2**20:.0f} MB of the "
                f"{self._memory_limit / 2**20:.0f} MB that models may take together",
                is_busy=False,
            )
        while is_short():
            by_age = sorted(self._loaded, key=lambda id: self._last_used.get(id, 0))
            if not any(self.unload(id) for id in by_age if id != spec.base):
                if self._memory_limit is None or not self._loaded:
                    return  # the load itself will say what is missing
                raise CannotLoad(
                    spec.id,
                    f"it needs {needed / 2**20:.0f} MB of the "
                    f"{self._memory_limit / 2**20:.0f} MB that models may take together, and those "
                    "loaded are working",
                    is_busy=True,
                )
