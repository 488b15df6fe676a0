"""Read the wire format of protocol buffers, as far as a `tokenizer.model` uses it.

A message is a sequence of fields. A field is a tag (its number times 8, plus a wire type), and a
value: an integer of variable length (type 0), 8 bytes (1), a length and that many bytes (2: a
string, or a message in a message), or 4 bytes (5). After protobuf.dev, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and the value of each field of a message.

    A value of 4 or 8 bytes is yielded as bytes.

    Raises:
        ValueError: if the data is not a message.
    """
    offset = 0
    while offset < len(data):
        tag, offset = _read_varint(data, offset)
        number, wire_type = tag >> 3, tag & 7
        if number == 0:
            raise ValueError(f"expected a field number from 1 on, got 0 before offset {offset}")
        if wire_type == _VARINT:
            value, offset = _read_varint(data, offset)
            yield number, value
            continue
        if wire_type == _BYTES:
            size, offset = _read_varint(data, offset)
        elif wire_type in (_FIXED64, _FIXED32):
            size = 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError(
                f"expected wire type 0, 1, 2 or 5, got {wire_type} for field {number} before "
                f"offset {offset}"
            )
        if offset + size > len(data):
            raise ValueError(
                f"field {number} at offset {offset} has {size} bytes, but the message ends after "
                f"{len(data) - offset}"
            )
        yield number, data[offset : offset + size]
        offset += size


def _read_varint(data: bytes, offset: int) -> tuple[int, int]:
    """Return the integer at an offset, and the offset after it."""
    value = 0
    for i in range(10):
        if offset + i >= len(data):
            break
        byte = data[offset + i]
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, offset + i + 1
    raise ValueError(f"incomplete integer at offset {offset}")
