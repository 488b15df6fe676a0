"""The state that the routes of one server share: models, stored objects, jobs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import Request

from serve.api.errors import APIError
from serve.api.request_context import context_of
from serve.api.stored_responses import ResponseStore
from serve.api.temp_files import TempFiles
from serve.jobs.batches import Batches
from serve.jobs.jobs import JobStore
from serve.jobs.runner import JobRunner
from serve.jobs.store import Store
from serve.models.kinds import KINDS
from serve.models.registry import Registry
from serve.models.spec import LoadedModel

if TYPE_CHECKING:
    from serve.api.batch_runner import BatchRunner

M = TypeVar("M", bound=LoadedModel)


@dataclass(kw_only=True)
class ServerState:
    """The objects that the routes of one application share, as ``app.state``.

    Attributes:
        registry: The served models.
        home: The data folder.
        store: Persistent objects and files.
        responses: Stored responses and conversations.
        batches: Batches.
        batch_runner: Answers the requests of batches.
        jobs: Fine-tuning jobs.
        job_runner: Runs the jobs.
        temp_files: Generated images, available for an hour.
        allow_pull: Whether requests may pull models.
        is_strict: Whether a request field without effect is an error.
        is_pulling: Whether a request pulls a model now.
        is_draining: Whether the server refuses new requests, while the running ones finish.
    """

    registry: Registry
    home: Path
    store: Store
    responses: ResponseStore
    batches: Batches
    jobs: JobStore
    job_runner: JobRunner
    temp_files: TempFiles
    allow_pull: bool = False
    is_strict: bool = False
    is_pulling: bool = False
    is_draining: bool = False
    batch_runner: "BatchRunner" = field(init=False)  # made after the routes that it calls


def state_of(request: Request) -> ServerState:
    """Return the state of the application that serves ``request``."""
    return request.app.state


def stored_of(request: Request) -> tuple[ResponseStore, str]:
    """Return the stored responses of the application, and the owner of those of ``request``."""
    return state_of(request).responses, context_of(request.scope).owner


async def refresh_models(request: Request) -> None:
    """Read newly pulled models before a route looks one up: a dependency of every route."""
    await state_of(request).registry.refresh()


async def get_loaded_model(
    request: Request, name: str, model_class: type[M], *, needs_tools: bool = False
) -> M:
    """Return the loaded model with an id or alias, which must be of class ``model_class``.

    Args:
        request: The request.
        name: The id or alias.
        model_class: The class of the model.
        needs_tools: Whether an alias stands for the server's model for tools, unless its own model
            was trained to call tools.

    Raises:
        UnknownModel: No model has this name.
        CannotLoad: The model cannot be loaded now.
        APIError: 404 if the model does another task, such as an embedding model in a chat request.
            The message names a model for this task.
    """
    registry, kind = state_of(request).registry, KINDS[model_class.kind]
    id = registry.resolve_for_tools(name) if needs_tools else name
    if (spec := registry.resolve(id)).kind != kind.name:  # checked before loading
        candidates = [model.id for model in registry.list_models() if model.kind == kind.name]
        hint = f"Use `{candidates[0]}`." if candidates else "No model on this server does."
        raise APIError(
            404,
            f"The model `{spec.id}` does not {kind.task}. {hint}",
            param="model",
            code="model_not_found",
        )
    context_of(request.scope).is_pattern = registry.is_pattern(name)
    model = await registry.get(id)
    assert isinstance(model, model_class)
    return model
