"""/v1/fine-tunes: fine-tuning jobs in the API of 2021 to 2023.

``openai api fine_tunes.create`` and ``follow`` of the 0.27 client work. The default is four epochs,
as in that API. ``prompt_loss_weight`` and ``compute_classification_metrics`` are refused.
"""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve.api.errors import unsupported
from serve.api.openapi import route_docs
from serve.api.pagination import read_query
from serve.api.requests import Body, read_json
from serve.api.responses import FineTune, FineTuneEvent, FineTuneEvents, FineTunes
from serve.api.routes.fine_tuning import (
    BatchSize,
    Epochs,
    Multiplier,
    cancel_by_id,
    events_of,
    find_job,
    jobs_of,
    submit_job,
)
from serve.api.sse import Events, event_stream
from serve.jobs.jobs import PENDING, Job
from serve.jobs.jobs import JobStore as JobStore

router = APIRouter(prefix="/v1")

DEFAULT_MODEL = "curie"


class FineTuneBody(Body):
    """Body of POST /v1/fine-tunes. An unknown name is an error, as in `Hyperparameters`."""

    model_config = ConfigDict(extra="forbid")

    training_file: str
    validation_file: str | None = None
    model: str = DEFAULT_MODEL
    n_epochs: Epochs = 4
    batch_size: BatchSize | None = None
    learning_rate_multiplier: Multiplier | None = None
    prompt_loss_weight: float = 0.0
    compute_classification_metrics: bool = False
    suffix: Annotated[str, Field(min_length=1, max_length=40)] | None = None


class EventsQuery(Body):
    """Query parameters of a job's events."""

    stream: bool = False


@router.post("/fine-tunes", **route_docs(FineTune, FineTuneBody))
async def create_fine_tune(request: Request) -> dict[str, Any]:
    """Fine-tune a model (API of 2021)."""
    body = await read_json(request, FineTuneBody)
    if body.prompt_loss_weight:
        raise unsupported(
            "prompt_loss_weight",
            body.prompt_loss_weight,
            "This server never counts prompts in the loss: leave 'prompt_loss_weight' out, or send "
            "0.",
        )
    if body.compute_classification_metrics:
        raise unsupported(
            "compute_classification_metrics",
            True,
            "This server computes only loss and token accuracy: leave "
            "'compute_classification_metrics' out, or send false.",
        )
    job = await submit_job(
        request,
        body.model,
        body.training_file,
        body.validation_file,
        n_epochs=body.n_epochs,
        batch_size=body.batch_size,
        learning_rate_multiplier=body.learning_rate_multiplier,
        suffix=body.suffix,
        id_prefix="ft-",
    )
    return await _to_api_with_events(request, job)


@router.get("/fine-tunes", **route_docs(FineTunes))
async def list_fine_tunes(request: Request) -> dict[str, Any]:
    """List the fine-tuning jobs (API of 2021)."""
    jobs = jobs_of(request)
    bodies, _ = await asyncio.to_thread(jobs.store.page, "job")
    data = await asyncio.to_thread(lambda: [_to_api(jobs, job) for job in bodies])
    return {"object": "list", "data": data}


@router.get("/fine-tunes/{job_id}", **route_docs(FineTune))
async def get_fine_tune(request: Request, job_id: str) -> dict[str, Any]:
    """Return a fine-tuning job (API of 2021)."""
    return await _to_api_with_events(request, await find_job(request, job_id))


@router.post("/fine-tunes/{job_id}/cancel", **route_docs(FineTune))
async def cancel_fine_tune(request: Request, job_id: str) -> dict[str, Any]:
    """Cancel a fine-tuning job (API of 2021)."""
    return await _to_api_with_events(request, await cancel_by_id(request, job_id))


@router.get("/fine-tunes/{job_id}/events", **route_docs(FineTuneEvents, events=FineTuneEvent))
async def list_fine_tune_events(request: Request, job_id: str) -> Response:
    """List a job's events, oldest first; ``stream=true`` also sends new ones (API of 2021)."""
    await find_job(request, job_id)
    if read_query(request, EventsQuery).stream:
        return await event_stream(request, _streamed(request, job_id))
    return JSONResponse({"object": "list", "data": await _events(request, job_id)})


async def _streamed(request: Request, id: str) -> Events:
    async for event in events_of(request, id):
        yield event and _event_to_api(event)


async def _events(request: Request, id: str) -> list[dict[str, Any]]:
    events, _ = await asyncio.to_thread(jobs_of(request).store.page, "event", parent=id)
    return [_event_to_api(event) for event in events]


async def _to_api_with_events(request: Request, job: Job) -> dict[str, Any]:
    body = await asyncio.to_thread(_to_api, jobs_of(request), job)
    return body | {"events": await _events(request, job["id"])}


def _to_api(jobs: JobStore, job: Job) -> dict[str, Any]:
    """Return a job in the format of OpenAI's API of 2021, leaving out files that were deleted."""
    file_ids = {
        "training_files": [job["training_file"]],
        "validation_files": [job["validation_file"]] if job["validation_file"] else [],
        "result_files": job["result_files"],
    }
    files = {
        name: [file for id in ids if (file := jobs.store.get("file", id)) is not None]
        for name, ids in file_ids.items()
    }
    status = "pending" if job["status"] in PENDING else job["status"]
    hyperparameters = {
        name: None if value == "auto" else value for name, value in job["hyperparameters"].items()
    }
    return {
        "id": job["id"],
        "object": "fine-tune",
        "created_at": job["created_at"],
        "updated_at": job["finished_at"] or job["created_at"],
        "model": job["model"],
        "fine_tuned_model": job["fine_tuned_model"],
        "organization_id": "pellucid",
        "status": status,
        "hyperparams": {**hyperparameters, "prompt_loss_weight": 0.0},
        **files,
    }


def _event_to_api(event: dict[str, Any]) -> dict[str, Any]:
    return {
        "object": "fine-tune-event",
        "created_at": event["created_at"],
        "level": event["level"],
        "message": event["message"],
    }
