"""Generate the OpenAPI description that /openapi.json and /docs show.

Routes parse their bodies with `requests.read_json` and return dictionaries, so FastAPI cannot infer
the models of request and response. Each route declares them with `route_docs`, and `openapi_schema`
adds them to the description. Routes do not validate their responses against it; a test does.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve.api.responses import Error

_models: dict[str, type[BaseModel]] = {}  # all models that routes have declared, by name


def route_docs(
    response: type[BaseModel] | None = None,
    body: type[BaseModel] | None = None,
    *,
    form: type[BaseModel] | None = None,
    events: type[BaseModel] | None = None,
    errors: Mapping[int, str] | None = None,
    media_type: str = "text/plain",
) -> dict[str, Any]:
    """Return the keyword arguments of FastAPI's route decorators that document a route.

    Args:
        response: Model of the JSON response; None for a text response.
        body: Model of the JSON body.
        form: Model of the multipart form.
        events: Model of each server-sent event, if the route can stream.
        errors: Descriptions of particular errors, by status.
        media_type: Media type of a text response.
    """
    content: dict[str, Any] = {}
    if response is not None:
        content["application/json"] = {"schema": _reference(response)}
    else:
        content[media_type] = {"schema": {"type": "string"}}
    if events is not None:
        data = {
            "type": "string",
            "description": "JSON as described by x-json, or an error; [DONE] at the end.",
            "x-json": _reference(events),
        }
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        content["text/event-stream"] = {"schema": event}
    error = {"content": {"application/json": {"schema": _reference(Error)}}}
    responses: dict[int | str, dict[str, Any]] = {
        200: {"description": "Success.", "content": content},
        "4XX": {"description": "The request is invalid; the error says why.", **error},
        "5XX": {"description": "The server failed, or accepts no requests now.", **error},
    }
    for status, description in (errors or {}).items():
        responses[status] = {"description": description, **error}
    arguments: dict[str, Any] = {"responses": responses, "response_model": None}
    models = {"application/json": body, "multipart/form-data": form}
    bodies = {name: {"schema": _reference(model)} for name, model in models.items() if model}
    if bodies:
        arguments["openapi_extra"] = {"requestBody": {"required": True, "content": bodies}}
    return arguments


def openapi_schema(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI description of an application's routes."""
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
            operation["responses"].pop("422", None)  # FastAPI's default; this API sends 400
    return description


def _reference(model: type[BaseModel]) -> dict[str, str]:
    if _models.setdefault(model.__name__, model) is not model:
        raise ValueError(f"two pydantic models are named {model.__name__}: rename one of them")
    return {"$ref": f"#/components/schemas/{model.__name__}"}
