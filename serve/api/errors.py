"""Errors of the API, in the JSON shape that OpenAI's clients expect.

The response has an HTTP status and the body ``{"error": {"message", "type", "param", "code"}}``.
This module defines that body, rewords pydantic's validation errors as OpenAI's, and has handlers
for all other errors (unknown routes, wrong methods, unknown models, a full queue). The texts follow
OpenAI's API, because programs match on them. A message names the field, the value, and a valid
alternative.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from serve.api.unknown_urls import base_url_mistake, openai_route
from serve.exceptions import CannotLoad, UnknownModel

E = TypeVar("E", bound=Exception)


class APIError(Exception):
    """An error that is reported to the client.

    Args:
        status: The HTTP status.
        message: One or two sentences for a person.
        type: The class of the error, such as "invalid_request_error" or "server_error".
        param: The path of the invalid field, such as "messages[0].role".
        code: The machine-readable code, such as "context_length_exceeded".
        headers: Additional response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.type = status, message, type
        self.param, self.code, self.headers = param, code, headers

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the error, as sent in a response or in a stream."""
        fields = {"message": self.message, "type": self.type}
        return {"error": {**fields, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the HTTP response of the error."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


class ClientDisconnected(Exception):
    """The client closed its connection before the response was complete."""


def server_error(detail: str = "") -> APIError:
    """Return a 500 error. The client sees ``detail``, which must not contain a traceback."""
    reason = f": {detail}" if detail else ". Sorry about that!"
    return APIError(
        500, f"The server had an error while processing your request{reason}", type="server_error"
    )


def missing_parameter(param: str) -> APIError:
    """Return the 400 error for a field that the request must have; `param` is its path."""
    return APIError(
        400,
        f"Missing required parameter: '{param}'.",
        param=param,
        code="missing_required_parameter",
    )


def unsupported(param: str, value: object, supported: str) -> APIError:
    """Return the 400 error for a value that OpenAI's API allows but this model or server does not.

    Args:
        param: The path of the field.
        value: The value in the request.
        supported: A sentence that says which values are supported.
    """
    return APIError(
        400,
        f"Unsupported value: '{param}' does not support {_quote(value)} with this model. "
        f"{supported}",
        param=param,
        code="unsupported_value",
    )


# --- pydantic -> OpenAI -----------------------------------------------------------------------

_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a decimal",
    "finite_number": "a finite decimal",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "is_instance_of": "a file",  # only the files of forms are checked by their class
}
_BOUNDS = {  # error type -> (key of the bound, operator, words of the message, end of the code)
    "greater_than_equal": ("ge", ">=", "below minimum value", "below_min_value"),
    "greater_than": ("gt", ">", "below minimum value", "below_min_value"),
    "less_than_equal": ("le", "<=", "above maximum value", "above_max_value"),
    "less_than": ("lt", "<", "above maximum value", "above_max_value"),
}


def json_type_name(value: object) -> str:
    """Return the JSON type of a value in the words of OpenAI's messages: "a string", "null", ..."""
    if value is None:
        return "null"
    # bool comes before int: True is an int in Python.
    names = {bool: "a boolean", int: "an integer", float: "a decimal", str: "a string"}
    names |= {list: "an array", dict: "an object"}
    return next((name for type, name in names.items() if isinstance(value, type)), "a value")


def from_validation(error: ValidationError) -> APIError:
    """Return the first of pydantic's errors as an APIError in OpenAI's words."""
    first = error.errors(include_url=False)[0]
    context, value = first.get("ctx", {}), first["input"]
    path = _path(first["loc"])
    name = f"'{path}'" if path else "the request body"

    def bad(message: str, code: str) -> APIError:
        return APIError(400, message, param=path or None, code=code)

    match first["type"]:
        case "missing":
            return bad(f"Missing required parameter: {name}.", "missing_required_parameter")
        case type if type in _EXPECTED or type == "union_tag_invalid":
            expected = _EXPECTED.get(type) or _one_of(context["expected_tags"])
            got = str(value) if type == "finite_number" else json_type_name(value)
            return bad(
                f"Invalid type for {name}: expected {expected}, but got {got} instead.",
                "invalid_type",
            )
        case type if type in _BOUNDS:
            key, operator, words, code = _BOUNDS[type]
            bound = context[key]
            noun = "decimal" if isinstance(bound, float) else "integer"
            limit = f"{bound:g}" if isinstance(bound, float) else bound
            return bad(
                f"Invalid {name}: {noun} {words}. Expected a value {operator} {limit}, "
                f"but got {_clip(value)} instead.",
                f"{noun}_{code}",
            )
        case "extra_forbidden":
            return bad(f"Unknown parameter: {name}.", "unknown_parameter")
        case "literal_error":
            values = " and".join(context["expected"].rsplit(" or", 1))
            return bad(
                f"Invalid value: {_quote(value)}. Supported values are: {values}.", "invalid_value"
            )
        case "too_short" | "string_too_short":
            noun, article = _noun_and_article(context)
            return bad(
                f"Invalid {name}: empty {noun}. Expected {article} {noun} with minimum length "
                f"{context['min_length']}, but got an empty {noun} instead.",
                f"empty_{noun}",
            )
        case "too_long" | "string_too_long":
            noun, article = _noun_and_article(context)
            return bad(
                f"Invalid {name}: {noun} too long. Expected {article} {noun} with maximum length "
                f"{context['max_length']}, but got {article} {noun} with length {len(value)} "
                "instead.",
                f"{noun}_above_max_length",
            )
    return bad(f"Invalid {name}: {first['msg']}.", "invalid_value")


def _path(location: tuple[str | int, ...]) -> str:
    """Turn ("messages", 0, "role") into "messages[0].role", without the tags of unions."""
    path = ""
    for key in location:
        if isinstance(key, int):
            path += f"[{key}]"
        elif " " not in key:
            path += f".{_clip(key)}" if path else key
    return path


def _one_of(tags: str) -> str:
    """Turn "'a string', 'an array'" into "one of a string or an array"."""
    *rest, last = (tag.strip("'") for tag in tags.split(", "))
    return f"one of {', '.join(rest)} or {last}" if rest else last


def _noun_and_article(context: Mapping[str, Any]) -> tuple[str, str]:
    noun = {"List": "array", "Dictionary": "object"}.get(context.get("field_type", ""), "string")
    return noun, "a" if noun == "string" else "an"


def _quote(value: object) -> str:
    if isinstance(value, list | dict):
        return json_type_name(value)
    return f"'{_clip(value)}'" if isinstance(value, str) else _clip(value)


def _clip(value: object, limit: int = 80) -> str:
    """Return a value as text of at most about `limit` characters, for use in a message."""
    text = str(value)
    return text if len(text) <= limit else text[:limit] + "..."


# --- other exceptions -------------------------------------------------------------------------


_translations: dict[type[Exception], Callable[[Any], APIError]] = {}


def translate(kind: type[E]) -> Callable[[Callable[[E], APIError]], Callable[[E], APIError]]:
    """Register the decorated function, which converts exceptions of class ``kind`` to APIErrors.

    The modules that define the exceptions register them, so that this module imports neither the
    engine nor JAX.
    """

    def register(function: Callable[[E], APIError]) -> Callable[[E], APIError]:
        _translations[kind] = function
        return function

    return register


def as_api_error(error: Exception) -> APIError:
    """Return the APIError that reports an exception, in a response or within a stream."""
    match error:
        case APIError():
            return error
        case UnknownModel():
            hint = "GET /v1/models lists the served models."
            if error.not_pulled_id is not None:
                hint = (
                    f"This name stands for {error.not_pulled_id}, which is not downloaded: run "
                    f"`pellucid pull {error.not_pulled_id}`."
                )
            return APIError(
                404,
                f"The model `{_clip(error.name)}` does not exist or you do not have access to it. "
                f"{hint}",
                param="model",
                code="model_not_found",
            )
        case CannotLoad():
            return APIError(
                503,
                f"The model `{_clip(error.id)}` is in /v1/models but cannot be loaded: "
                f"{_clip(error.reason, 400)}.",
                type="server_error",
                code="model_not_ready",
                headers={"retry-after": "5"} if error.is_busy else {"x-should-retry": "false"},
            )
        case FloatingPointError():  # vectors or scores are NaN
            return server_error(str(error))
    for kind, translate in _translations.items():
        if isinstance(error, kind):
            return translate(error)
    return server_error()


def install(app: FastAPI) -> None:
    """Register the error handlers. `headers.ResponseHeaders` reports all other exceptions."""

    async def handle_error(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def handle_routing_error(request: Request, error: Exception) -> Response:
        return _routing_error(request, cast(HTTPException, error)).response()

    async def handle_disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nginx's status for a client that closed its connection

    for exception in (APIError, UnknownModel, CannotLoad, FloatingPointError, *_translations):
        app.add_exception_handler(exception, handle_error)
    app.add_exception_handler(HTTPException, handle_routing_error)
    # ClientDisconnected: while the server computes. ClientDisconnect: while a body arrives.
    for exception in (ClientDisconnected, ClientDisconnect):
        app.add_exception_handler(exception, handle_disconnect)


def _is_route(request: Request, path: str) -> bool:
    """Return whether the application has a route for a path, with any method."""
    scope = {**request.scope, "path": path, "raw_path": path.encode()}
    return any(route.matches(scope)[0] != Match.NONE for route in request.app.routes)


def _routing_error(request: Request, error: HTTPException) -> APIError:
    method, path = request.method, _clip(request.url.path)
    if error.status_code in (404, 405) and (hint := openai_route(request.url.path)):
        return APIError(
            404,
            f"Invalid URL ({method} {path}): OpenAI has this route, and this server has not. "
            f"{hint}.",
            code="unsupported_endpoint",
        )
    if error.status_code == 404:
        mistake = base_url_mistake(request.url.path, functools.partial(_is_route, request))
        detail = f": {mistake}." if mistake else ""
        return APIError(404, f"Invalid URL ({method} {path}){detail}", code="unknown_url")
    if error.status_code == 405:
        return APIError(
            405,
            f"Not allowed to {method} on {path}. "
            "(HINT: Perhaps you meant to use a different HTTP method?)",
            code="method_not_supported",
            headers=error.headers,
        )
    return APIError(error.status_code, str(error.detail), headers=error.headers)
