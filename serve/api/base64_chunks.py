"""Encode and decode base64 in chunks, because one call on a large file would hold the GIL long."""

import base64

CHUNK = 2**15  # number of groups per call; a group is 3 bytes, or 4 characters of base64


def from_base64(text: str) -> bytes:
    """Return the bytes that base64 text encodes.

    Raises:
        ValueError: The text is not base64.
    """
    if "=" in text[:-2]:
        raise ValueError("the text has '=' before its end")
    starts = range(0, len(text), 4 * CHUNK)
    return b"".join(base64.b64decode(text[i : i + 4 * CHUNK], validate=True) for i in starts)


def to_base64(data: bytes) -> list[bytes]:
    """Return data in base64, as a list of chunks that together are the base64 text."""
    return [base64.b64encode(data[i : i + 3 * CHUNK]) for i in range(0, len(data), 3 * CHUNK)]
