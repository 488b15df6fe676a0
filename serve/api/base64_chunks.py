"""Base64 of large files, chunk by chunk: each call holds Python's lock, and other threads wait."""

import base64

CHUNK = 2**15  # groups of 3 bytes, or of 4 characters of base64, that are handled at once


def from_base64(text: str) -> bytes:
    """Return the bytes that base64 spells.

    Raises:
        ValueError: it is not base64.
    """
    if "=" in text[:-2]:
        raise ValueError("padding in the middle")
    starts = range(0, len(text), 4 * CHUNK)
    return b"".join(base64.b64decode(text[i : i + 4 * CHUNK], validate=True) for i in starts)


def to_base64(data: bytes) -> list[bytes]:
    """Return the base64 of bytes, in chunks."""
    return [base64.b64encode(data[i : i + 3 * CHUNK]) for i in range(0, len(data), 3 * CHUNK)]
