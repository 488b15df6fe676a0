"""Reading forms: fields as a pydantic model, files as they arrive.

The bytes of a file go to where the route wants them, in memory or on the disk, and are written
once. Its type and the folders in its name are not looked at. An empty field means "not given".
"""

import asyncio
from collections.abc import Collection, Iterable, Mapping
from tempfile import SpooledTemporaryFile
from typing import Annotated, Any, Protocol, TypeVar, get_origin

from pydantic import InstanceOf, ValidationError, WithJsonSchema
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from serve.api.errors import APIError, from_validation
from serve.api.requests import Body

MAX_FIELD = 128 * 2**10  # bytes of a field that is no file: the longest prompt fits
MAX_PARTS = 100

AnyForm = TypeVar("AnyForm", bound=Body)


class Sink(Protocol):
    """Where the bytes of a file go."""

    def write(self, data: bytes, /) -> object: ...


class Upload:
    """A file that a form held.

    Attributes:
        filename: the name it was sent under, without folders; "file" where it had none.
        is_named: whether it had a name. An unnamed file without a byte is an empty field.
        size: bytes.
    """

    def __init__(self, filename: str):
        self.filename, self.is_named, self.size = safe_filename(filename), bool(filename), 0


File = Annotated[InstanceOf[Upload], WithJsonSchema({"type": "string", "format": "binary"})]


async def read_form(
    request: Request, model: type[AnyForm], sinks: Mapping[str, Sink], max_bytes: int | None = None
) -> AnyForm:
    """Read the body of a request as a form.

    Args:
        request: with a body that nobody has read.
        model: the fields, files among them as `File`.
        sinks: where the bytes of each file go, by field. `image[]` is `image`. A part
            without a file name is a text there too, most likely a path without curl's @.
        max_bytes: of a file; None leaves that to `BodyLimit`.

    Raises:
        APIError: 400 for what is no form, is cut short, has a field twice or is not as ``model``
            says; 413 for a file over ``max_bytes``.
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
        raise _bad("it is cut short: its last boundary is missing")
    lists = {name for name, at in model.model_fields.items() if get_origin(at.annotation) is list}
    try:
        return model.model_validate(form_fields(reader.items, lists), strict=False)
    except ValidationError as error:
        raise from_validation(error) from None


def temporary_file() -> SpooledTemporaryFile[bytes]:
    """A sink for a file that is decoded at once: on the disk from 1 MB on, and only until then."""
    return SpooledTemporaryFile(2**20)


async def read_all(sink: SpooledTemporaryFile[bytes]) -> bytes:
    """Return all that was written to a sink, read on a worker thread."""

    def read() -> bytes:
        sink.seek(0)
        return sink.read()

    return await asyncio.to_thread(read)


def form_fields(
    items: Iterable[tuple[str, str | Upload]], lists: Collection[str] = ()
) -> dict[str, Any]:
    """Return the fields of a form by their names; a blank one counts as absent.

    HTML forms and some clients send all their fields, those left empty too. So a required field
    that is blank is one that is missing. A field that comes twice with two texts is refused: which
    one is meant cannot be known.

    Args:
        items: name and value of each field.
        lists: names of the fields that hold a list, sent as `name[]` or `name`, once an item.

    Raises:
        APIError: 400, a field comes twice.

    >>> form_fields([("n", ""), ("seed", " "), ("size", "64x64"), ("expiry[days]", "2")])
    {'size': '64x64', 'expiry': {'days': '2'}}
    >>> form_fields([("include[]", "a"), ("include[]", "")], lists=["include"])
    {'include': ['a']}
    """
    fields: dict[str, Any] = {}
    for name, value in items:
        if not (value.strip() if isinstance(value, str) else value.is_named or value.size):
            continue
        at = name.rfind("[") if name.endswith("]") else -1
        bare, key = (name[:at], name[at + 1 : -1]) if at > 0 else (name, "")
        if bare in lists:
            fields.setdefault(bare, []).append(value)
            continue
        place = fields.setdefault(bare, {}) if key else fields
        if not isinstance(place, dict) or place.setdefault(key or bare, value) != value:
            text = f" (the last is {value[:80]!r})" if isinstance(value, str) else ""
            raise APIError(
                400,
                f"The field '{name[:80]}' comes twice{text}: give it once.",
                param=bare,
                code="invalid_form",
            )
    return fields


class _FormReader:
    """A form, chunk by chunk.

    Attributes:
        items: name and value of each field that has ended.
        pending: bytes of files, by field, that came with the last chunk.
        is_whole: whether the last boundary has come.
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
            raise _bad(f"it has more than {MAX_PARTS} fields")
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
    r"""A file's name as it may be shown and sent: no folders, nothing unprintable, not too long.

    >>> bare_name("C:\\data\\a.jsonl"), bare_name("../../b\n.jsonl"), bare_name("/")
    ('a.jsonl', 'b.jsonl', 'file')
    """
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(c for c in last if c.isprintable()).strip()[:255] or "file"


def _bad(why: str, param: str | None = None) -> APIError:
    return APIError(400, f"Invalid form: {why}.", param=param, code="invalid_form")
