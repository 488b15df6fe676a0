"""Reading forms: their fields, and a file that goes to the disk as it arrives.

An empty field means "not given" on every route (`form_fields`). The file of `read_form` is never in
memory, and is written once: to where it will stay. Its type and the folders in its name are not
looked at.
"""

import asyncio
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.requests import Request

from serve.api.errors import APIError
from serve.jobs.store import Incoming

MAX_FIELD = 64 * 2**10  # bytes of a field that is no file
MAX_PARTS = 100
FILE = "file"  # the field that holds the file


@dataclass
class Form:
    """What a form held.

    Attributes:
        items: name and text of each field that is no file, in order.
        filename: of the file, without folders; None if there was no file.
    """

    items: list[tuple[str, str]] = field(default_factory=list)
    filename: str | None = None


def form_fields(items: Iterable[tuple[str, Any]], lists: Collection[str] = ()) -> dict[str, Any]:
    """Return the texts of a form by the names of their fields; a blank one counts as absent.

    HTML forms and some clients send all their fields, those left empty too. So a required field
    that is blank is one that is missing. A field that comes twice with two texts is refused: which
    one is meant cannot be known.

    Args:
        items: name and value of each field; files are passed over.
        lists: names of the fields that hold a list, sent as `name[]` or `name`, once an item.

    Raises:
        APIError: 400, a field comes twice.

    >>> form_fields(
    ...     [("n", ""), ("seed", " "), ("size", "64x64"), ("include[]", "a"), ("include[]", "")],
    ...     lists=("include",),
    ... )
    {'size': '64x64', 'include': ['a']}
    """
    fields: dict[str, Any] = {}
    for name, value in items:
        bare = name.removesuffix("[]")
        if isinstance(value, UploadFile) or not value.strip():
            continue
        if bare in lists:
            fields.setdefault(bare, []).append(value)
        elif fields.setdefault(bare, value) != value:
            raise APIError(
                400,
                f"The field '{bare}' comes twice, as {fields[bare]!r} and {value!r}: give it once.",
                param=bare,
                code="invalid_form",
            )
    return fields


async def read_form(request: Request, incoming: Incoming, max_bytes: int) -> Form:
    """Reads a request's form, the bytes of its file into ``incoming``.

    Raises:
        APIError: 400 for what is no form, or is cut short, or has two files; 413 for a file over
            ``max_bytes``.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise _bad("send a form (multipart/form-data) with a file in the field 'file'")
    reader = _Reader(boundary)
    async for chunk in request.stream():
        reader.take(chunk)
        if incoming.size + len(reader.pending) > max_bytes:
            raise APIError(
                413,
                f"Maximum content size limit ({max_bytes}) exceeded",
                param=FILE,
                code="file_too_large",
            )
        if reader.pending:
            await asyncio.to_thread(incoming.write, reader.pending)
            reader.pending = b""
    if not reader.is_whole:
        raise _bad("it is cut short: its last boundary is missing")
    return reader.form


class _Reader:
    """A form, chunk by chunk; ``pending`` are bytes of its file that came with the last one."""

    def __init__(self, boundary: bytes):
        self.form, self.pending, self.is_whole = Form(), b"", False
        self._parts, self._header, self._name = 0, (b"", b""), ""
        self._disposition, self._is_file, self._value = b"", False, b""
        callbacks = {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._whole,
        }
        self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]

    def take(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _bad(str(error)) from None

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _bad(f"it has more than {MAX_PARTS} fields")
        self._header, self._disposition, self._value = (b"", b""), b"", b""

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
        self._is_file = self._name == FILE
        if self._is_file:
            if self.form.filename is not None:
                raise _bad("it has two files, and one is expected")
            self.form.filename = bare_name(options.get(b"filename", b"").decode("utf-8", "replace"))

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.pending += data[start:end]
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD:
            raise _bad(f"the field '{self._name[:80]}' is longer than {MAX_FIELD} bytes")

    def _end(self) -> None:
        if not self._is_file:
            self.form.items.append((self._name, self._value.decode("utf-8", "replace")))

    def _whole(self) -> None:
        self.is_whole = True


def bare_name(name: str) -> str:
    r"""A file's name as it may be shown and sent: no folders, nothing unprintable, not too long.

    >>> bare_name("C:\\data\\a.jsonl"), bare_name("../../b\n.jsonl"), bare_name("/")
    ('a.jsonl', 'b.jsonl', 'file')
    """
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(c for c in last if c.isprintable()).strip()[:255] or "file"


def _bad(why: str) -> APIError:
    return APIError(400, f"Invalid form: {why}.", code="invalid_form")
