"""The description of this API that /openapi.json and /docs show, made from the code itself.

Bodies are pydantic models that `requests.read_json` reads, and answers are dictionaries; FastAPI
sees neither. So each route names its models by `described`, and `schema` puts them where OpenAPI
wants them. That answers are as described here is held by a test, not by the code that answers.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve.api.responses import Error

_models: dict[str, type[BaseModel]] = {}  # all that a route has named, by name


def route_docs(
    response: type[BaseModel] | None = None,
    body: type[BaseModel] | None = None,
    *,
    form: type[BaseModel] | None = None,
    events: type[BaseModel] | None = None,
    media_type: str = "text/plain",
) -> dict[str, Any]:
    """Arguments for a route that say what it takes and gives.

    Args:
        answer: the JSON it answers with; None for text.
        body, form: the JSON and the form it takes.
        events: what each server-sent event holds, where it can stream.
        media_type: of an answer that is text.
    """
    content: dict[str, Any] = {}
    if response is not None:
        content["application/json"] = {"schema": _reference(response)}
    else:
        content[media_type] = {"schema": {"type": "string"}}
    if events is not None:
        data = {
            "type": "string",
            "description": "JSON as x-json says, or an error, and at the end [DONE].",
            "x-json": _reference(events),
        }
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        content["text/event-stream"] = {"schema": event}
    error = {"content": {"application/json": {"schema": _reference(Error)}}}
    responses: dict[int | str, dict[str, Any]] = {
        200: {"description": "The answer.", "content": content},
        "4XX": {"description": "The request cannot be answered: the error says why.", **error},
        "5XX": {"description": "The server failed, or takes nothing new now.", **error},
    }
    arguments: dict[str, Any] = {"responses": responses, "response_model": None}
    models = {"application/json": body, "multipart/form-data": form}
    if taken := {kind: {"schema": _reference(model)} for kind, model in models.items() if model}:
        arguments["openapi_extra"] = {"requestBody": {"required": True, "content": taken}}
    return arguments


def openapi_schema(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description of an application's routes."""
    description = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    _, definitions = models_json_schema(
        [(model, "validation") for model in _models.values()],
        ref_template="#/components/schemas/{model}",
    )
    components = description.setdefault("components", {})
    components["schemas"] = definitions["$defs"]
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    description["security"] = [{"key": []}, {}]
    for operations in description["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own; ours is a 400
    return description


def _reference(model: type[BaseModel]) -> dict[str, str]:
    if _models.setdefault(model.__name__, model) is not model:
        raise ValueError(f"two models of the description are called {model.__name__}")
    return {"$ref": f"#/components/schemas/{model.__name__}"}
