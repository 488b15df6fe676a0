"""/v1/fine_tuning/jobs: a model that has learned from a file of examples.

Supervised fine-tuning of a low-rank adapter, which is what a machine can do beside serving; other
methods are refused by name. ``hyperparameters`` may stand at the top, as in 2023, or in ``method``.
A job is made and answered for here, and done elsewhere (`serve/jobs/jobs.py`). ``stream=true``
on its events gives those so far and then each as it comes, until the job is over.
"""

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag
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

POLL_SECONDS = 0.25  # seconds between two looks for new events
KEEPALIVE_SECONDS = 15.0  # seconds without an event until a stream gives a sign of life


def auto_or(number: Any, kind: str) -> Any:
    """The type of a hyperparameter: "auto" or a number."""
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
    n_epochs: auto_or(Epochs, "an integer") = "auto"  # type: ignore[valid-type]
    batch_size: auto_or(BatchSize, "an integer") = "auto"  # type: ignore[valid-type]
    learning_rate_multiplier: auto_or(Multiplier, "a decimal") = "auto"  # type: ignore[valid-type]


class Supervised(Body):
    hyperparameters: Hyperparameters | None = None


class Method(Body):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised = Supervised()


class JobBody(Body):
    """POST /v1/fine_tuning/jobs."""

    model: str
    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method = Method(type="supervised")
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Annotated[dict[Name, Value], Field(max_length=16)] | None = None
    integrations: list[Any] = []


class EventsQuery(PageQuery):
    stream: bool = False


class CheckpointsQuery(PageQuery):
    limit: Annotated[int, Field(ge=1, le=100)] = 10


def jobs_of(request: Request) -> JobStore:
    """The jobs of the application that serves ``request``."""
    return state_of(request).jobs


@router.post("/fine_tuning/jobs", **route_docs(JobReply, JobBody))
async def create_job(request: Request) -> dict[str, Any]:
    """Fine-tune a model on a file that was uploaded."""
    body = await read_json(request, JobBody)
    if body.method.type != "supervised":
        raise unsupported("method.type", body.method.type, "Only 'supervised' is done here.")
    if body.integrations:
        raise unsupported("integrations", body.integrations, "Nothing is reported elsewhere.")
    given = body.method.supervised.hyperparameters or body.hyperparameters or Hyperparameters()
    numbers = {name: _auto_to_none(value) for name, value in given.model_dump().items()}
    job = await submit_job(
        request,
        body.model,
        body.training_file,
        body.validation_file,
        suffix=body.suffix,
        seed=body.seed,
        metadata=body.metadata,
        **numbers,
    )
    return to_api(job)


async def submit_job(
    request: Request, model: str, training: str, validation: str | None, **fields: Any
) -> Job:
    """Makes a job, and has it begun when its turn comes.

    Args:
        model: an id or alias, as the client sent it.
        training, validation: ids of files.
        fields: what else `jobs.Jobs.create` takes.

    Raises:
        APIError: 404 for a model or file that is not there, 400 for one that will not do.
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
    """The id and the files of the model called ``name``, which must be one that can be trained.

    Raises:
        APIError: 400 saying why it cannot.
        UnknownModel: there is none.
    """
    registry = state_of(request).registry
    offer = registry.spec(name)
    if offer is not None and offer.path is not None:
        return offer.id, offer.path
    fitting = [card.id for card in registry.list_models() if _is_trainable(registry.spec(card.id))]
    hint = f"Use one of: {', '.join(fitting)}." if fitting else "No model here can be."
    if offer is not None and offer.base is not None:
        hint = f"It was fine-tuned already: begin with `{offer.base}`, and all examples."
    raise APIError(
        400,
        f"Model {registry.resolve(name).id} is not available for fine-tuning. {hint}",
        param="model",
        code="model_not_available",
    )


def _is_trainable(offer: ModelSpec | None) -> bool:
    return offer is not None and offer.path is not None


@router.get("/fine_tuning/jobs", **route_docs(Jobs))
async def list_jobs(request: Request) -> dict[str, Any]:
    """List the jobs, newest first; ``metadata[key]=value`` keeps those that have it."""
    query = read_query(request, PageQuery)
    wanted = {
        name[9:-1]: value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }

    def keep(job: Job) -> bool:
        return wanted.items() <= (job["metadata"] or {}).items()

    return await paginate(jobs_of(request).store, "job", query, to_api, keep=keep)


@router.get("/fine_tuning/jobs/{job_id}", **route_docs(JobReply))
async def get_job(request: Request, job_id: str) -> dict[str, Any]:
    """Look up a job."""
    return to_api(await find_job(request, job_id))


@router.post("/fine_tuning/jobs/{job_id}/cancel", **route_docs(JobReply))
async def cancel_job(request: Request, job_id: str) -> dict[str, Any]:
    """Stop a job."""
    return to_api(await cancel_by_id(request, job_id))


@router.get("/fine_tuning/jobs/{job_id}/events", **route_docs(JobEvents, events=JobEvent))
async def list_events(request: Request, job_id: str) -> Response:
    """What happened to a job, newest first; streamed, oldest first and as it happens."""
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
    """The models after each of the last epochs, newest first."""
    await find_job(request, job_id)
    query = read_query(request, CheckpointsQuery)

    def show(checkpoint: dict[str, Any]) -> dict[str, Any]:
        return {"object": "fine_tuning.job.checkpoint", **checkpoint}

    return await paginate(jobs_of(request).store, "checkpoint", query, show, parent=job_id)


async def find_job(request: Request, id: str) -> Job:
    """A job by its id.

    Raises:
        APIError: 404 where there is none.
    """
    job = await asyncio.to_thread(jobs_of(request).get, id)
    if job is None:
        raise APIError(404, f"No such fine-tune job: {id[:80]}", param="id", code="not_found")
    if job["status"] in UNFINISHED:  # its keeper may have ended since, in another process
        await asyncio.to_thread(state_of(request).job_runner.wake)
    return job


async def cancel_by_id(request: Request, id: str) -> Job:
    """A job by its id, which is cancelled now.

    Raises:
        APIError: 404 where there is none, 400 where it is over.
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
    """A job's events, oldest first; ends when the job is over and all are told.

    None when there has been none for `SILENCE` seconds.
    """
    jobs, after, told = jobs_of(request), None, time.monotonic()
    while True:
        job = await find_job(request, id)  # before its events: the last ones come before its end
        found, _ = await asyncio.to_thread(jobs.store.page, "event", parent=id, after=after)
        for event in found or [None] * (time.monotonic() - told > KEEPALIVE_SECONDS):
            yield event
            told = time.monotonic()
        after = found[-1]["id"] if found else after
        if job["status"] not in UNFINISHED:
            return
        if state_of(request).is_draining:
            raise APIError(
                503, "The server is shutting down; the job goes on later.", type="server_error"
            )
        await asyncio.sleep(POLL_SECONDS)


# --- what clients see -------------------------------------------------------------------------


def event_to_api(event: dict[str, Any]) -> dict[str, Any]:
    """An event in OpenAI's shape."""
    return {"object": "fine_tuning.job.event", **event}


def _auto_to_none(value: Any) -> Any:
    return None if value == "auto" else value
