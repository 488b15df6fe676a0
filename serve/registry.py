"""The models a server holds, found by id or by alias.

What could be served stands in `catalogue.py`; here is only what is loaded. A name that is neither
an id nor an alias of a loaded model is an error, never another model's answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the engine brings JAX along
    from serve.engine import ServedModel


class UnknownModel(Exception):
    """No loaded model has this id or alias; `name` is what was asked for."""

    def __init__(self, name: str):
        super().__init__(f"no model is called {name!r} here")
        self.name = name


class Registry:
    """Loaded models by id, in the order given, and the aliases that lead to them.

    Args:
        models: At least one; the first is the default. Ids must differ.
        aliases: Other names by the id they stand for. One whose model is not loaded is unknown.
    """

    def __init__(self, models: Sequence[ServedModel], aliases: Mapping[str, str]):
        if not models:
            raise ValueError("models is empty: a server needs at least one")
        self._models = {model.id: model for model in models}
        if len(self._models) < len(models):
            raise ValueError(f"models has an id twice: {', '.join(m.id for m in models)}")
        self._aliases = dict(aliases)

    @property
    def default(self) -> ServedModel:
        """The model for those who do not care."""
        return self.list()[0]

    def list(self) -> list[ServedModel]:
        """The loaded models."""
        return [*self._models.values()]

    def aliases_of(self, id: str) -> list[str]:
        """The names that stand for a model."""
        return [name for name, target in self._aliases.items() if target == id]

    def resolve(self, name: str) -> ServedModel:
        """The model with this id or alias. An id is looked up first.

        Raises:
            UnknownModel: There is none.
        """
        model = self._models.get(name) or self._models.get(self._aliases.get(name, ""))
        if model is None:
            raise UnknownModel(name)
        return model
