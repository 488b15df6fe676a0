"""Parse multipart forms: fields into a pydantic model, files into sinks as they arrive.

The route chooses a sink for each file, in memory or on disk; each byte is written once. The content
type of a file and the folders in its name are ignored. An empty field counts as absent.
"""

import asyncio
from collections.abc import Collection, Iterable, Mapping
from tempfile import SpooledTemporaryFile
from typing import Annotated, Any, Protocol, TypeVar, get_origin

from pydantic import InstanceOf, WithJsonSchema
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from serve.api.errors import APIError
from serve.api.requests import Body, validate

MAX_FIELD = 128 * 2**10  # bytes of a text field; the longest prompt fits
MAX_PARTS = 100

AnyForm = TypeVar("AnyForm", bound=Body)


class Sink(Protocol):
    """A destination for the bytes of a file."""

    def write(self, data: bytes, /) -> object:
        """Append bytes to the file."""
        ...


class Upload:
    """A file in a form; its bytes are in a sink, not here.

    Attributes:
        filename: The client's name for the file, without folders; "file" if it has none.
        is_named: Whether the file has a name. An unnamed file of 0 bytes is an empty field.
        size: Number of bytes.
    """

    def __init__(self, filename: str):
        self.filename, self.is_named, self.size = safe_filename(filename), bool(filename), 0


File = Annotated[InstanceOf[Upload], WithJsonSchema({"type": "string", "format": "binary"})]


async def read_form(
    request: Request, model: type[AnyForm], sinks: Mapping[str, Sink], max_bytes: int | None = None
) -> AnyForm:
    """Parse the body of a request as a form.

    Args:
        request: The request, whose body has not been read.
        model: The pydantic model of the fields; its file fields are of type `File`.
        sinks: Destination of each file, by field name; `image[]` counts as `image`. A part without
            a file name is text even in these fields: most likely a path without curl's @.
        max_bytes: Maximum size of a file; None for no limit except that of `BodyLimit`.

    Raises:
        APIError: 400 for a body that is not a form, is truncated, repeats a field or does not match
            ``model``; 413 for a file over ``max_bytes``.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise _bad(f"send a form (multipart/form-data) with a file in the field '{min(sinks)}'")
    try:
        reader = _FormReader(boundary, sinks, max_bytes)
    except FormParserError as error:
        raise _bad(str(error)) from None
    async for chunk in request.stream():
        try:
            reader.parser.write(chunk)
        except FormParserError as error:
            raise _bad(str(error)) from None
        for name, data in reader.pending.items():
            await asyncio.to_thread(sinks[name].write, bytes(data))
        reader.pending.clear()
    if not reader.is_complete:
        raise _bad("the body is truncated: its last boundary is missing")
    lists = {
        name for name, info in model.model_fields.items() if get_origin(info.annotation) is list
    }
    fields = form_fields(reader.items, lists, model.model_fields)
    return validate(request, model, fields, is_form=True)


def temporary_file() -> SpooledTemporaryFile[bytes]:
    """Return a temporary sink that stays in memory up to 1 MB and moves to disk beyond."""
    return SpooledTemporaryFile(2**20)


async def read_all(sink: SpooledTemporaryFile[bytes]) -> bytes:
    """Return the contents of a sink, read on a worker thread."""

    def read() -> bytes:
        sink.seek(0)
        return sink.read()

    return await asyncio.to_thread(read)


def form_fields(
    items: Iterable[tuple[str, str | Upload]],
    lists: Collection[str] = (),
    known: Collection[str] | None = None,
) -> dict[str, Any]:
    """Return the fields of a form as a dictionary, without blank fields.

    HTML forms and some clients send empty fields too, so a blank required field counts as missing.
    A field with two different values is ambiguous and refused.

    Args:
        items: Name and value of each field.
        lists: Names of list fields, which are sent as `name[]` or `name`, once per item.
        known: Names of the fields that the route knows; None if it knows all. Of an unknown field
            that is repeated, the last value counts.

    Raises:
        APIError: 400 if a known field has two different values.

    >>> form_fields([("n", ""), ("seed", " "), ("size", "64x64"), ("expiry[days]", "2")])
    {'size': '64x64', 'expiry': {'days': '2'}}
    >>> form_fields([("include[]", "a"), ("include[]", "")], lists=["include"])
    {'include': ['a']}
    """
    fields: dict[str, Any] = {}
    for name, value in items:
        if not (value.strip() if isinstance(value, str) else value.is_named or value.size):
            continue
        bracket = name.rfind("[") if name.endswith("]") else -1
        base, key = (name[:bracket], name[bracket + 1 : -1]) if bracket > 0 else (name, "")
        if base in lists:
            fields.setdefault(base, []).append(value)
            continue
        if known is not None and base not in known:
            fields[base] = value
            continue
        target = fields.setdefault(base, {}) if key else fields
        if not isinstance(target, dict) or target.setdefault(key or base, value) != value:
            text = f" ({value[:80]!r})" if isinstance(value, str) else ""
            raise APIError(
                400,
                f"The form repeats the field '{name[:80]}' with another value{text}: send it once.",
                param=base,
                code="invalid_form",
            )
    return fields


class _FormReader:
    """Incremental parser of a form.

    Attributes:
        items: Name and value of each complete field.
        pending: Bytes of files that were parsed but not yet written to a sink, by field name.
        is_complete: Whether the last boundary has arrived.
    """

    def __init__(self, boundary: bytes, sinks: Collection[str], max_bytes: int | None):
        self.items: list[tuple[str, str | Upload]] = []
        self.pending: dict[str, bytearray] = {}
        self.is_complete = False
        self._sinks, self._max_bytes = sinks, max_bytes
        self._parts, self._header, self._disposition = 0, (b"", b""), b""
        self._name, self._value, self._upload = "", bytearray(), None
        callbacks: Any = {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._complete,
        }
        self.parser = MultipartParser(boundary, callbacks)

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _bad(f"the form has more than {MAX_PARTS} fields")
        self._header, self._disposition = (b"", b""), b""
        self._value, self._upload = bytearray(), None

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0] + data[start:end], b"")

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0], self._header[1] + data[start:end])

    def _header_end(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = value
        self._header = (b"", b"")

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise _bad("a field has no name")
        self._name = options[b"name"].decode("utf-8", "replace")
        if b"filename" in options and self._field in self._sinks:
            self._upload = Upload(options[b"filename"].decode("utf-8", "replace"))

    @property
    def _field(self) -> str:
        return self._name.removesuffix("[]")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._upload is None:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD:
                raise _bad(f"'{self._name[:80]}' is longer than {MAX_FIELD} bytes", self._field)
            return
        self._upload.size += end - start
        if self._max_bytes is not None and self._upload.size > self._max_bytes:
            raise APIError(
                413,
                f"Maximum content size limit ({self._max_bytes}) exceeded",
                param=self._field,
                code="file_too_large",
            )
        self.pending.setdefault(self._field, bytearray()).extend(data[start:end])

    def _end(self) -> None:
        try:
            self.items.append((self._name, self._upload or self._value.decode()))
        except UnicodeDecodeError:
            raise _bad(f"'{self._name[:80]}' is not UTF-8", self._field) from None

    def _complete(self) -> None:
        self.is_complete = True


def safe_filename(name: str) -> str:
    r"""Return a file name without folders and unprintable characters, of at most 255 characters.

    >>> safe_filename("C:\\data\\a.jsonl"), safe_filename("../../b\n.jsonl"), safe_filename("/")
    ('a.jsonl', 'b.jsonl', 'file')
    """
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(c for c in last if c.isprintable()).strip()[:255] or "file"


def _bad(reason: str, param: str | None = None) -> APIError:
    return APIError(400, f"Invalid form: {reason}.", param=param, code="invalid_form")
