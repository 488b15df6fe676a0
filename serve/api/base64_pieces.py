"""Base64 of large files, in pieces: each piece holds Python's lock, and other threads wait."""

import base64

PIECE = 2**15  # groups of 3 bytes, or of 4 characters of base64, that are handled at once


def from_base64(text: str) -> bytes:
    """The bytes that base64 spells. In pieces, because each holds Python's lock.

    Raises:
        ValueError: it is not base64.
    """
    if "=" in text[:-2]:
        raise ValueError("padding in the middle")
    starts = range(0, len(text), 4 * PIECE)
    return b"".join(base64.b64decode(text[i : i + 4 * PIECE], validate=True) for i in starts)


def to_base64(data: bytes) -> list[bytes]:
    """The base64 of bytes in pieces, because each holds Python's lock."""
    return [base64.b64encode(data[i : i + 3 * PIECE]) for i in range(0, len(data), 3 * PIECE)]
