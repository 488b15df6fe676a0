"""/v1/fine_tuning/jobs: fine-tune a model on a file of examples.

The method is supervised fine-tuning of a low-rank adapter (LoRA), which fits beside serving; other
methods are refused. ``hyperparameters`` may be at the top level, as in 2023, or in ``method``. The
routes create and report jobs; `serve/jobs/` runs them. ``stream=true`` on a job's events sends the
past events, and then new ones until the job ends.
"""

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import ConfigDict, Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve.api.errors import APIError, unsupported
from serve.api.openapi import route_docs
from serve.api.pagination import PageQuery, paginate, read_query
from serve.api.requests import Body, read_json, tag
from serve.api.responses import JobCheckpoints, JobEvent, JobEvents, JobReply, Jobs
from serve.api.sse import Events, event_stream
from serve.api.state import state_of
from serve.api.stored_files import find_file
from serve.jobs.jobs import UNFINISHED, Job, JobFinished, check_name, check_suffix, to_api
from serve.jobs.jobs import JobStore as JobStore
from serve.models.spec import ModelSpec

router = APIRouter(prefix="/v1")

POLL_SECONDS = 0.25  # time between two queries for new events
KEEPALIVE_SECONDS = 15.0  # time without an event after which a stream sends a comment


def auto_or(number: Any, kind: str) -> Any:
    """Return a pydantic type: "auto", or a number of type `number`.

    Args:
        number: The type of the number, with its bounds.
        kind: The name of that type in error messages, such as "an integer".
    """
    return Annotated[
        Annotated[Literal["auto"], Tag("a string")] | Annotated[number, Tag(kind)],
        Discriminator(lambda value: tag(value) if isinstance(value, str) else kind),
    ]


Epochs = Annotated[int, Field(ge=1, le=50)]
BatchSize = Annotated[int, Field(ge=1, le=256)]
Multiplier = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]


class Hyperparameters(Body):
    """The hyperparameters in a request for a job; "auto" lets the server choose.

    An unknown name is an error: a job takes long, and would ignore a misspelt hyperparameter.
    """

    model_config = ConfigDict(extra="forbid")

    n_epochs: auto_or(Epochs, "an integer") = "auto"  # type: ignore[valid-type]
    batch_size: auto_or(BatchSize, "an integer") = "auto"  # type: ignore[valid-type]
    learning_rate_multiplier: auto_or(Multiplier, "a decimal") = "auto"  # type: ignore[valid-type]


class Supervised(Body):
    """The part of the method that holds the hyperparameters of supervised fine-tuning."""

    hyperparameters: Hyperparameters | None = None


class Method(Body):
    """The training method in a request for a job. Only "supervised" is supported."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised = Supervised()


class JobBody(Body):
    """Body of POST /v1/fine_tuning/jobs."""

    model: str
    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method = Method(type="supervised")
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Annotated[dict[Name, Value], Field(max_length=16)] | None = None


class EventsQuery(PageQuery):
    """Query parameters of a job's events."""

    stream: bool = False


class CheckpointsQuery(PageQuery):
    """Query parameters of a job's checkpoints."""

    limit: Annotated[int, Field(ge=1, le=100)] = 10


def jobs_of(request: Request) -> JobStore:
    """Return the job store of the application that serves ``request``."""
    return state_of(request).jobs


@router.post("/fine_tuning/jobs", **route_docs(JobReply, JobBody))
async def create_job(request: Request) -> dict[str, Any]:
    """Fine-tune a model on an uploaded file."""
    body = await read_json(request, JobBody)
    if body.method.type != "supervised":
        raise unsupported("method.type", body.method.type, "Only 'supervised' is supported.")
    settings = body.method.supervised.hyperparameters or body.hyperparameters or Hyperparameters()
    hyperparameters = {name: _auto_to_none(value) for name, value in settings.model_dump().items()}
    job = await submit_job(
        request,
        body.model,
        body.training_file,
        body.validation_file,
        suffix=body.suffix,
        seed=body.seed,
        metadata=body.metadata,
        **hyperparameters,
    )
    return to_api(job)


async def submit_job(
    request: Request, model: str, training: str, validation: str | None, **fields: Any
) -> Job:
    """Check the model and the files of a job, create the job, and wake the job runner.

    Args:
        request: The request.
        model: Id or alias of the model.
        training: Id of the training file.
        validation: Id of the validation file, or None.
        fields: Other arguments of `JobStore.create`.

    Returns:
        The job.

    Raises:
        UnknownModel: No model has this name.
        APIError: 404 for a missing file, 400 for a model or file that cannot be used.
    """
    jobs = jobs_of(request)
    id, path = trainable_model(request, model)
    param = "model"
    try:
        check_name(id)
        if (suffix := fields.get("suffix")) is not None:
            param = "suffix"
            check_suffix(id, suffix)
    except ValueError as error:
        raise APIError(400, str(error), param=param, code="invalid_value") from None
    for param, file_id in (("training_file", training), ("validation_file", validation)):
        if file_id is not None:
            file = await asyncio.to_thread(find_file, jobs.store, file_id, param)
            if file["purpose"] != "fine-tune":
                raise APIError(
                    400,
                    f"Invalid '{param}': {file_id} was uploaded with purpose '{file['purpose']}'. "
                    "Upload it with purpose 'fine-tune'.",
                    param=param,
                    code="invalid_file_purpose",
                )
    job = await asyncio.to_thread(
        jobs.create,
        model=id,
        model_path=path,
        training_file=training,
        validation_file=validation,
        **fields,
    )
    await asyncio.to_thread(state_of(request).job_runner.wake)
    return job


def trainable_model(request: Request, name: str) -> tuple[str, Path]:
    """Return id and path of the model `name`, which must be one that can be fine-tuned.

    Raises:
        APIError: 400 if the model cannot be fine-tuned; the message names models that can.
        UnknownModel: No model has this name.
    """
    registry = state_of(request).registry
    spec = registry.spec(name)
    if spec is not None and spec.path is not None:
        return spec.id, spec.path
    models = registry.list_models()
    trainable = [model.id for model in models if _is_trainable(registry.spec(model.id))]
    hint = "No model on this server can be fine-tuned."
    if trainable:
        hint = f"Use one of: {', '.join(trainable)}."
    if spec is not None and spec.base is not None:
        hint = f"It is already fine-tuned: fine-tune `{spec.base}` on all examples instead."
    raise APIError(
        400,
        f"Model {registry.resolve(name).id} is not available for fine-tuning. {hint}",
        param="model",
        code="model_not_available",
    )


def _is_trainable(spec: ModelSpec | None) -> bool:
    return spec is not None and spec.path is not None


@router.get("/fine_tuning/jobs", **route_docs(Jobs))
async def list_jobs(request: Request) -> dict[str, Any]:
    """List the jobs, newest first; ``metadata[key]=value`` filters by metadata."""
    query = read_query(request, PageQuery)
    metadata = {
        name[9:-1]: value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }

    def has_metadata(job: Job) -> bool:
        return metadata.items() <= (job["metadata"] or {}).items()

    return await paginate(jobs_of(request).store, "job", query, to_api, predicate=has_metadata)


@router.get("/fine_tuning/jobs/{job_id}", **route_docs(JobReply))
async def get_job(request: Request, job_id: str) -> dict[str, Any]:
    """Return a fine-tuning job."""
    return to_api(await find_job(request, job_id))


@router.post("/fine_tuning/jobs/{job_id}/cancel", **route_docs(JobReply))
async def cancel_job(request: Request, job_id: str) -> dict[str, Any]:
    """Cancel a fine-tuning job."""
    return to_api(await cancel_by_id(request, job_id))


@router.get("/fine_tuning/jobs/{job_id}/events", **route_docs(JobEvents, events=JobEvent))
async def list_events(request: Request, job_id: str) -> Response:
    """List the events of a job, newest first; a stream sends the oldest first, then new ones."""
    await find_job(request, job_id)
    query = read_query(request, EventsQuery)
    if query.stream:
        return await event_stream(request, _streamed(request, job_id))
    page = await paginate(jobs_of(request).store, "event", query, event_to_api, parent=job_id)
    return JSONResponse(page)


async def _streamed(request: Request, id: str) -> Events:
    async for event in events_of(request, id):
        yield event and event_to_api(event)


@router.get("/fine_tuning/jobs/{job_id}/checkpoints", **route_docs(JobCheckpoints))
async def list_checkpoints(request: Request, job_id: str) -> dict[str, Any]:
    """List the checkpoints of a job, one for each of the last epochs, newest first."""
    await find_job(request, job_id)
    query = read_query(request, CheckpointsQuery)

    def checkpoint_to_api(checkpoint: dict[str, Any]) -> dict[str, Any]:
        return {"object": "fine_tuning.job.checkpoint", **checkpoint}

    store = jobs_of(request).store
    return await paginate(store, "checkpoint", query, checkpoint_to_api, parent=job_id)


async def find_job(request: Request, id: str) -> Job:
    """Return a job by its id.

    Raises:
        APIError: 404 if there is no such job.
    """
    job = await asyncio.to_thread(jobs_of(request).get, id)
    if job is None:
        raise APIError(404, f"No such fine-tune job: {id[:80]}", param="id", code="not_found")
    if job["status"] in UNFINISHED:  # the process that ran it may have been killed
        await asyncio.to_thread(state_of(request).job_runner.wake)
    return job


async def cancel_by_id(request: Request, id: str) -> Job:
    """Cancel a job and return it.

    Raises:
        APIError: 404 if there is no such job, 400 if it has ended.
    """
    job = await find_job(request, id)
    try:
        return await asyncio.to_thread(jobs_of(request).cancel, id)
    except JobFinished:
        raise APIError(
            400,
            f"Job has already completed: {id} has status '{job['status']}'.",
            code="invalid_job_status",
        ) from None


async def events_of(request: Request, id: str) -> Events:
    """Yield a job's events, oldest first, until the job has ended.

    Yields None after `KEEPALIVE_SECONDS` without an event.
    """
    jobs, after, last_sent = jobs_of(request), None, time.monotonic()
    while True:
        # Read the status before the events: the last events precede the end of the job.
        job = await find_job(request, id)
        events, _ = await asyncio.to_thread(jobs.store.page, "event", parent=id, after=after)
        for event in events or [None] * (time.monotonic() - last_sent > KEEPALIVE_SECONDS):
            yield event
            last_sent = time.monotonic()
        after = events[-1]["id"] if events else after
        if job["status"] not in UNFINISHED:
            return
        if state_of(request).is_draining:
            raise APIError(
                503,
                "The server is shutting down; the job continues when the server is restarted.",
                type="server_error",
            )
        await asyncio.sleep(POLL_SECONDS)


# --- responses --------------------------------------------------------------------------------


def event_to_api(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event in OpenAI's shape."""
    return {"object": "fine_tuning.job.event", **event}


def _auto_to_none(value: Any) -> Any:
    return None if value == "auto" else value
