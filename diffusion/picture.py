"""Picture files: bytes that somebody sent become an array, and arrays become bytes.

What a file is, its first bytes say, never its name. Its size is read from its header and checked
before any of it is decoded: a PNG of some kilobytes can unfold to gigabytes, and so can a line of
pixels once somebody needs the square around it. Of an animation the
first frame counts, and a photograph is turned the way its camera was held (EXIF).

Leaves out: colour profiles, and all formats but four; each decoder is one more thing to attack.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Literal, get_args

import numpy as np

Format = Literal["png", "jpeg", "webp"]
FORMATS: tuple[str, ...] = get_args(Format)
MAX_PIXELS = 4096 * 4096
_READABLE = ("PNG", "JPEG", "WEBP", "GIF")


def read(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A PNG, JPEG, WebP or GIF file, upright, with its transparency: uint8 [Y, X, 4].

    Raises:
        ValueError: it is none of these, cut off, damaged, larger than `max_pixels`, or longer than
            the side of a square of four times as many.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=_READABLE) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise _TooLarge(
                    f"the picture is {width} x {height} pixels: at most {max_pixels:,} are read"
                )
            longest = 2 * math.isqrt(max_pixels)
            if max(width, height) > longest:
                raise _TooLarge(
                    f"the picture is {width} x {height} pixels: a side may have {longest:,} at most"
                )
            image.seek(0)
            image.load()
            if image.mode.startswith("I"):  # 16 bits of grey, which `convert` would cut at 255
                grey = np.asarray(image).astype(np.int64) >> 8
                image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
            return np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))
    except (_TooLarge, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ValueError(
            "this is not a picture that can be read: use PNG, JPEG, WebP or GIF"
        ) from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"the picture is too large: {error}") from None
    except Exception as error:  # whatever a decoder stumbles over: Pillow's raise all kinds
        raise ValueError(f"the picture is damaged or cut off: {error}") from None


class _TooLarge(ValueError):
    pass


def encode(picture: np.ndarray, format: Format) -> bytes:
    """A picture as a file.

    Args:
        picture: uint8 [Y, X, 3], or 4 with transparency; JPEG has none, so it is laid on white.
        format: PNG keeps every bit; JPEG and WebP lose a little.
    """
    from PIL import Image

    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] not in (3, 4):
        raise ValueError(
            f"picture must be uint8 [Y, X, 3 or 4], got {picture.dtype} {list(picture.shape)}"
        )
    if format == "jpeg":
        picture = opaque(picture)
    options = {"jpeg": {"quality": 95, "subsampling": 0}, "webp": {"quality": 95}}
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format, **options.get(format, {}))
    return file.getvalue()


def opaque(picture: np.ndarray) -> np.ndarray:
    """A picture laid on white: uint8 [Y, X, 3 or 4] -> [Y, X, 3]."""
    if picture.shape[2] == 3:
        return picture
    colour, alpha = picture[..., :3].astype(np.float32), picture[..., 3:] / np.float32(255)
    return np.round(255 + alpha * (colour - 255)).astype(np.uint8)


def save(picture: np.ndarray, path: Path) -> None:
    """Writes a picture file, whose format its name says.

    Raises:
        ValueError: the name says none, or one that cannot be written.
        OSError: the file cannot be written.
    """
    path.write_bytes(encode(picture, format_of(path)))


def format_of(path: Path) -> Format:
    """The format that the name of a file says.

    Raises:
        ValueError: it says none, or one that cannot be written.
    """
    suffix = path.suffix.lower()
    found: dict[str, Format] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
    if suffix not in found:
        raise ValueError(f"{path}: the name of a picture ends in {', '.join(found)}")
    return found[suffix]
