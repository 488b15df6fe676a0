"""What a server writes down: a line for each request, under its id, and never a text.

Lines are for people, or JSON objects for programs (``--log-format json``); both hold the same.
Whatever is logged while a request is served carries the request's id. Prompts and answers are not
logged, nor keys; the name of a key is.
"""

import contextlib
import contextvars
import json
import logging
from collections.abc import Iterator
from typing import Any, Literal

from starlette.types import Scope

from serve.api.request_context import context_of

LogFormat = Literal["text", "json"]

access_log = logging.getLogger("serve.access")

_request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")


@contextlib.contextmanager
def bind_request_id(request_id: str) -> Iterator[None]:
    """Puts what is logged meanwhile under a request's id."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def log_request(scope: Scope, status: int) -> None:
    """Writes the line of a request that has been answered."""
    call = context_of(scope)
    fields: dict[str, Any] = {
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "milliseconds": round(call.seconds * 1000, 1),
        "client": call.client,
    }
    if call.model:
        fields |= {
            "model": call.model,
            "prompt_tokens": call.prompt_tokens,
            "cached_tokens": call.cached_tokens,
            "generated_tokens": call.generated_tokens,
        }
    if call.first_token_time is not None:
        fields["first_token_milliseconds"] = round(
            (call.first_token_time - call.arrival_time) * 1000, 1
        )
    access_log.info("%s", _access_line(fields), extra={"fields": fields})


def _access_line(fields: dict[str, Any]) -> str:
    """The same for people: `POST /v1/chat/completions 200 512 ms, smollm2, 20+31 tokens`."""
    text = f"{fields['method']} {_printable(fields['path'])} {fields['status']} "
    text += f"{fields['milliseconds']:.0f} ms"
    if "model" in fields:
        text += f", {fields['model']}"
        text += f", {fields['prompt_tokens']}+{fields['generated_tokens']} tokens"
    return f"{text}, {fields['client']}" if fields["client"] else text


def _printable(path: str) -> str:
    """A path as one word: whoever chose it does not write lines of their own into the log."""
    return "".join(c if c.isprintable() and c != " " else ascii(c)[1:-1] for c in path)


class TextFormatter(logging.Formatter):
    """`12:00:00 req_... sentence`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(request_id)s%(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        id = _request_id.get()
        record.request_id = f"{id} " if id else ""
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, request id, message, and the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": _request_id.get() or None,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def config(format: LogFormat) -> dict[str, Any]:
    """For `logging.config.dictConfig`: requests and warnings on stderr, nothing else."""
    formatter = TextFormatter if format == "text" else JsonFormatter
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": formatter}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "stream": "ext://sys.stderr",
                "formatter": "lines",
            }
        },
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {
            access_log.name: {"level": "INFO"},
            "uvicorn.error": {"level": "WARNING"},
            "uvicorn.access": {"level": "CRITICAL"},  # we write our own
        },
    }
