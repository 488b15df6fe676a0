"""Base64 of large files in chunks, because each call holds the GIL while other threads wait."""

import base64

CHUNK = 2**15  # groups of 3 bytes, or of 4 characters of base64, in one call


def from_base64(text: str) -> bytes:
    """Return the bytes that base64 text encodes.

    Raises:
        ValueError: The text is not base64.
    """
    if "=" in text[:-2]:
        raise ValueError("padding in the middle")
    starts = range(0, len(text), 4 * CHUNK)
    return b"".join(base64.b64decode(text[i : i + 4 * CHUNK], validate=True) for i in starts)


def to_base64(data: bytes) -> list[bytes]:
    """Return the base64 of bytes as a list of chunks."""
    return [base64.b64encode(data[i : i + 3 * CHUNK]) for i in range(0, len(data), 3 * CHUNK)]
