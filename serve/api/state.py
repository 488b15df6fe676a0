"""What the routes of one server share: its models, its database, its jobs."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from starlette.requests import Request

from serve.api.errors import APIError
from serve.api.temp_files import TempFiles
from serve.jobs.jobs import JobStore
from serve.jobs.runner import JobRunner
from serve.jobs.store import Store
from serve.models.kinds import KINDS
from serve.models.registry import Registry
from serve.models.spec import LoadedModel

M = TypeVar("M", bound=LoadedModel)


@dataclass(kw_only=True)
class ServerState:
    """The state of an application, as ``app.state``.

    Attributes:
        registry: the models that are served.
        home: the data folder.
        store: the objects and files that outlive the server.
        jobs, keeper: fine-tuning jobs, and what runs them.
        passing: pictures that can be fetched for an hour.
        is_draining: whether it finishes what it has and takes nothing new.
    """

    registry: Registry
    home: Path
    store: Store
    jobs: JobStore
    job_runner: JobRunner
    temp_files: TempFiles
    is_draining: bool = False


def state_of(request: Request) -> ServerState:
    """Return the state of the application that serves ``request``."""
    return request.app.state


async def get_loaded_model(request: Request, name: str, model_class: type[M]) -> M:
    """Return the model called ``name``, loaded, which must be of a class.

    Raises:
        UnknownModel, CannotLoad: as of `Registry.get`.
        APIError: 404, it is of another kind; the message names a model of this.
    """
    registry, kind = state_of(request).registry, KINDS[model_class.kind]
    if (found := registry.resolve(name)).kind != kind.name:  # before it is loaded for nothing
        fitting = [other.id for other in registry.list_models() if other.kind == kind.name]
        what = f"`{fitting[0]}` does." if fitting else "No model here does."
        raise APIError(
            404,
            f"The model `{found.id}` does not {kind.task}. {what}",
            param="model",
            code="model_not_found",
        )
    model = await registry.get(name)
    assert isinstance(model, model_class)
    return model
