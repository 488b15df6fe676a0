"""The server's log: one line per request, and warnings, with the request's id.

Lines are text for people, or JSON objects for programs (``--log-format json``); both hold the same
data. Each record that is logged while a request is served carries the request's id. Prompts,
responses and keys are not logged; names of keys are.
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
    """Add a request's id to every record that is logged inside the `with` block."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def log_request(scope: Scope, status: int) -> None:
    """Write the log line of a finished request."""
    context = context_of(scope)
    fields: dict[str, Any] = {
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "milliseconds": round(context.seconds * 1000, 1),
        "client": context.client,
    }
    if context.model:
        fields |= {
            "model": context.model,
            "prompt_tokens": context.prompt_tokens,
            "cached_tokens": context.cached_tokens,
            "generated_tokens": context.generated_tokens,
        }
    if context.first_token_time is not None:
        fields["first_token_milliseconds"] = round(
            (context.first_token_time - context.arrival_time) * 1000, 1
        )
    access_log.info("%s", _access_line(fields), extra={"fields": fields})


def _access_line(fields: dict[str, Any]) -> str:
    """Format fields as text: `POST /v1/chat/completions 200 512 ms, smollm2, 20+31 tokens`."""
    text = f"{fields['method']} {_printable(fields['path'])} {fields['status']} "
    text += f"{fields['milliseconds']:.0f} ms"
    if "model" in fields:
        text += f", {fields['model']}"
        text += f", {fields['prompt_tokens']}+{fields['generated_tokens']} tokens"
    return f"{text}, {fields['client']}" if fields["client"] else text


def _printable(path: str) -> str:
    """Escape spaces and unprintable characters, so that a path cannot forge log lines."""
    return "".join(c if c.isprintable() and c != " " else ascii(c)[1:-1] for c in path)


class TextFormatter(logging.Formatter):
    """Format records as `12:00:00 req_... message`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(request_id)s%(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Return the log line of a record."""
        request_id = _request_id.get()
        record.request_id = f"{request_id} " if request_id else ""
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """Format records as one JSON object per line, with the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the log line of a record."""
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
    """Return a configuration for `logging.config.dictConfig`: requests and warnings on stderr."""
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
            "uvicorn.access": {"level": "CRITICAL"},  # replaced by `access_log`
        },
    }
