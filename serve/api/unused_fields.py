"""Fields of a request that this server does not use: refused, or named in a response header.

Clients send fields that OpenAI or another server has and this one has not. Nothing is ignored in
silence. The rules, for JSON bodies and forms alike:

1. A field of `PROMISES` asks for another answer than the one this server would give: 400
   ``unsupported_parameter``, unless its value asks for nothing (null, false, empty, the default).
2. An unknown name within two edits of a field of the body is a typing error: 400
   ``unknown_parameter``, with the right name. Names that other servers define are exempt.
3. All other fields without effect, at any depth, are listed by path in the response header
   ``x-pellucid-ignored``. They are unknown, or declared with `UNUSED`: then their type is checked.
   ``pellucid serve --strict`` returns 400 instead, except for the keys of messages, because agents
   send the messages of a response back.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote

from pydantic import BaseModel, Field

from serve.api.errors import APIError

HEADER = "x-pellucid-ignored"
MAX_PATHS = 64  # paths in the header
MAX_KEY = 64  # characters of a key in a path
MAX_HEADER = 1000  # characters of the header

UNUSED: Any = Field(
    description="Accepted and checked, but without effect.",
    json_schema_extra={"x-pellucid-ignored": True},
)
"""The annotation of a field that is accepted, checked, and has no effect."""


class Promise(NamedTuple):
    """The refusal of a request field that would change the response in an unsupported way.

    Attributes:
        reason: A sentence for the error: what the server does instead, or what to do.
        harmless: Values that are accepted, because they ask for what the server does anyway. Null,
            false and empty values are always accepted.
    """

    reason: str
    harmless: tuple[Any, ...] = ()


_OTHER_GRAMMAR = Promise("To limit the output, send 'response_format' or 'structured_outputs'.")
_NO_SVG = Promise("The image models generate pixels: use 'output_format' png, jpeg or webp.")
_NO_ANIMATION = Promise("The image models generate single images.")

PROMISES: dict[str, dict[str, Promise]] = {
    # By class of the body, see `requests.py`; a subclass has the promises of its base classes.
    # Delete a row when the server keeps the promise.
    "GenerationBody": {
        "regex": _OTHER_GRAMMAR,  # SGLang
        "ebnf": _OTHER_GRAMMAR,
        "structural_tag": _OTHER_GRAMMAR,
        "format": _OTHER_GRAMMAR,  # Ollama
    },
    "ChatBody": {
        "audio": Promise("The models generate text only."),
        "modalities": Promise("The models generate text only: use ['text'].", (["text"],)),
        "web_search_options": Promise("This server has no web search."),
    },
    "InputTokensBody": {
        "prompt": Promise("This server stores no prompts: send their text in 'instructions'."),
    },
    "SystemOneBody": {
        "assets": Promise("The models read text only."),
    },
    "EditBody": {
        "stream": Promise("Edits are not streamed: leave 'stream' out, or use a chat."),
    },
    "ImageOptions": {
        "svg": _NO_SVG,
        "markup": _NO_SVG,
        "frame_count": _NO_ANIMATION._replace(harmless=(1,)),
        "frame_duration_ms": _NO_ANIMATION,
    },
    "JobBody": {
        "integrations": Promise("This server sends nothing to other services."),
    },
    "SpeechForm": {
        "known_speaker_names": Promise("This server does not distinguish speakers."),
        "known_speaker_references": Promise("This server does not distinguish speakers."),
    },
}

# Names that clients send to other routes and servers and that resemble a field of a body here. They
# are never typing errors. A test compares `tests/serve/client_fields.py` with all bodies.
_FOREIGN_NAMES = {
    *("context", "document", "documents", "file", "image", "images", "input", "inputs"),
    *("instructions", "intent", "max_tokens", "min_tokens", "mode", "models", "size", "skew"),
    *("step", "steps", "store", "style", "tag", "task", "text", "text_1", "text_2", "texts"),
    *("top_a", "top_k", "top_n", "top_p", "typ_p", "type", "typical", "usage"),
}


@dataclass(frozen=True)
class Unused:
    """A field without effect in a request: its path, and whether the body declares it."""

    path: str
    is_declared: bool


def promises_of(model: type[BaseModel]) -> dict[str, Promise]:
    """Return the refused fields of a body class, as a dict from field name to `Promise`."""
    return {
        name: promise
        for base in reversed(model.__mro__)
        for name, promise in PROMISES.get(base.__name__, {}).items()
    }


def check_names(data: Any, model: type[BaseModel]) -> None:
    """Check the names of a request's fields before its values are checked.

    Args:
        data: The JSON value or the fields of the form.
        model: The class of the body.

    Raises:
        APIError: 400 for a field of `PROMISES`, or a misspelt name.
    """
    if not isinstance(data, dict):
        return
    promises = promises_of(model)
    known = promises.keys() | model.model_fields
    num_unknown = 0
    for name, value in data.items():
        if name in promises:
            reason, harmless = promises[name]
            if value and value not in ("false", "null", *harmless):  # a form has only strings
                raise APIError(
                    400,
                    f"Unsupported parameter: '{name}' is not supported by this server. {reason}",
                    param=name,
                    code="unsupported_parameter",
                )
        elif name not in known and value is not None and num_unknown < MAX_PATHS:
            num_unknown += 1
            if (intended := _intended_name(name, known)) is not None:
                raise APIError(
                    400,
                    f"Unknown parameter: '{name}'. Did you mean '{intended}'?",
                    param=name,
                    code="unknown_parameter",
                )


def unused_fields(data: Any, body: Any, prefix: str = "") -> Iterator[Unused]:
    """Yield the fields of a request that have no effect, in the order of the request.

    The raw value and the validated one are walked in parallel, so this works for every body.

    Args:
        data: The JSON value or the fields of the form.
        body: The validated value: a pydantic model, a list, or anything else.
        prefix: The path of the value.
    """
    if isinstance(body, BaseModel) and isinstance(data, Mapping):
        fields, promises = type(body).model_fields, promises_of(type(body))
        aliases = {field.alias: name for name, field in fields.items() if field.alias}
        for name, value in data.items():
            path = f"{prefix}.{path_part(name)}" if prefix else path_part(name)
            if value is None or name in promises:
                continue
            if (name := aliases.get(name, name)) not in fields:
                yield Unused(path, is_declared=False)
            elif is_unused(type(body), name):
                if getattr(body, name) != fields[name].get_default(call_default_factory=True):
                    yield Unused(path, is_declared=True)
            else:
                yield from unused_fields(value, getattr(body, name), path)
    elif isinstance(body, list) and isinstance(data, list):
        for index, (item, value) in enumerate(zip(data, body, strict=False)):
            if isinstance(item, dict | list):
                yield from unused_fields(item, value, f"{prefix}[{index}]")


def is_unused(model: type[BaseModel], name: str) -> bool:
    """Return whether a field is declared with `UNUSED`."""
    extra = model.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and HEADER in extra


def refuse_unused(fields: Iterable[Unused]) -> None:
    """Raise APIError for the first of the fields that is not a key of a message."""
    for field in fields:
        if not field.path.startswith(("messages[", "input[", "items[")):
            kind = "Unsupported" if field.is_declared else "Unknown"
            raise APIError(
                400,
                f"{kind} parameter: '{field.path}' has no effect on this server, which was started "
                "with --strict. Leave it out.",
                param=field.path,
                code=f"{kind.lower()}_parameter",
            )


def header_value(fields: Sequence[Unused]) -> str:
    """Return the value of the header, of bounded length."""
    value = ", ".join(field.path for field in fields[:MAX_PATHS])
    if len(fields) > MAX_PATHS or len(value) > MAX_HEADER:
        value = value[:MAX_HEADER].rpartition(", ")[0] + ", ..."
    return value


def path_part(key: str) -> str:
    """Return a key as text for a path in a header: short, and without commas and spaces."""
    return quote(key[:MAX_KEY], safe="$@:/+") or '""'


def _intended_name(name: str, known: set[str]) -> str | None:
    """Return the field that a misspelt name stands for; None if there is none."""
    if name in _FOREIGN_NAMES:
        return None
    distances = {field: edits(name, field) for field in known if abs(len(field) - len(name)) <= 2}
    near = [field for field, distance in distances.items() if distance <= min(2, len(field) - 2)]
    return min(near, key=lambda field: (distances[field], field), default=None)


def edits(a: str, b: str) -> int:
    """Return the number of edits between two words; 3 stands for 3 or more.

    An edit inserts, deletes or replaces a character, or swaps two neighbours (the optimal string
    alignment distance).

    >>> edits("max_token", "max_tokens"), edits("temprature", "temperature"), edits("sotp", "stop")
    (1, 1, 1)
    """
    if len({*a} ^ {*b}) > 4:  # an edit changes at most two characters of a set
        return 3
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return min(row[-1], 3)
