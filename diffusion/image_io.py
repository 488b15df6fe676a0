"""Picture files: bytes that somebody sent become an array, and arrays become bytes.

What a file is, its first bytes say, never its name. Its size is read from its header and checked
before any of it is decoded: a PNG of some kilobytes can unfold to gigabytes, and so can a line of
pixels once somebody needs the square around it. So is the number of its parts, because time grows
with them: a progressive JPEG of 35 kB can have 400 scans, each over all pixels. Of an animation the
first frame counts, and a photograph is turned the way its camera was held (EXIF).

A PNG without an alpha channel may name one colour that is transparent (its tRNS chunk). That colour
has the depth of the file, so it is compared before 16 bits become 8; Pillow compares after, or not
at all (PNG specification, third edition, 11.3.2.1).

Leaves out: colour profiles, and all formats but four; each decoder is one more thing to attack.
"""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

ImageFormat = Literal["png", "jpeg", "webp"]
FORMATS: tuple[str, ...] = get_args(ImageFormat)
MAX_PIXELS = 4096 * 4096
MAX_SCANS = 100  # of a JPEG file; cameras and optimizers write about ten
MAX_PARTS = 20_000  # chunks of a PNG file, markers of a JPEG file
_READABLE = ("PNG", "JPEG", "WEBP", "GIF")
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
# A marker: not a stuffed byte (00), a fill byte (FF) or a restart, which the coded data contain.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
# Bits of a sample in a PNG file, by Pillow's name for the layout of its rows.
_DEPTHS = {"L;2": 2, "L;4": 4, "L": 8, "I;16B": 16, "RGB": 8, "RGB;16B": 16}


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A PNG, JPEG, WebP or GIF file, upright, with its transparency: uint8 [Y, X, 4].

    Raises:
        ValueError: it is none of these, cut off, damaged, larger than `max_pixels`, longer than
            the side of a square of four times as many, or has more than `MAX_SCANS` scans or
            `MAX_PARTS` parts.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    _check_parts(data)
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
            key = _transparent_colour(image)
            image.load()
            upright = ImageOps.exif_transpose(image)
            samples = np.asarray(upright)
            if upright.mode.startswith("I"):  # 16 bits of grey, which `convert` would cut at 255
                upright = Image.fromarray((samples >> 8).astype(np.uint8))
            if key is None:
                return np.asarray(upright.convert("RGBA"))
            depth, colour = key
            if depth < 8:  # Pillow has stretched them to 8 bits
                samples = samples // (255 // (2**depth - 1))
            elif upright.mode == "RGB" and depth == 16:  # Pillow has kept the high bytes
                samples = samples.astype(np.uint16) << 8 | _low_bytes(data)
            is_transparent = (np.atleast_3d(samples) == np.array(colour)).all(-1)
            pixels = np.array(upright.convert("RGB").convert("RGBA"))
            pixels[is_transparent, 3] = 0
            return pixels
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


def _transparent_colour(image: ImageFile) -> tuple[int, tuple[int, ...]] | None:
    """Bits of a sample and the transparent colour of a PNG file, if it has one to be compared.

    Args:
        image: not decoded yet.
    """
    colour = image.info.get("transparency")
    depth = _DEPTHS.get(str(image.tile[0].args)) if image.format == "PNG" and image.tile else None
    if colour is None or depth is None:
        return None
    values = (colour,) if isinstance(colour, int) else colour
    return depth, tuple(value & (1 << depth) - 1 for value in values)  # as the specification says


def _low_bytes(data: bytes) -> np.ndarray:
    """The low bytes of a PNG file of 16-bit RGB, upright: uint8 [Y, X, 3]."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.tile = [part._replace(args="RGB;16L") for part in image.tile]  # the other byte order
        return np.asarray(ImageOps.exif_transpose(image))


def _check_parts(data: bytes) -> None:
    """Refuse a file with more parts than any needs, before something takes a long time over them.

    Raises:
        ValueError: it has too many.
    """
    parts = scans = 0
    if data.startswith(_PNG):
        position = len(_PNG)
        while position < len(data) and parts <= MAX_PARTS:
            parts += 1
            position += 12 + int.from_bytes(data[position : position + 4], "big")
    elif data.startswith(_JPEG):
        position = len(_JPEG)
        while parts <= MAX_PARTS and scans <= MAX_SCANS:
            marker = _MARKER.search(data, position)
            if marker is None or (code := marker[1][0]) == _EOI:
                break
            parts, scans = parts + 1, scans + (code == _SOS)
            position = marker.end()
            if code not in (_SOI, _TEM):
                position += int.from_bytes(data[position : position + 2], "big")
    if parts > MAX_PARTS:
        raise _TooLarge(f"the picture has more than {MAX_PARTS:,} parts")
    if scans > MAX_SCANS:
        raise _TooLarge(f"the picture has more than {MAX_SCANS} scans: save it as a baseline JPEG")


def encode(picture: np.ndarray, format: ImageFormat, quality: int = 95) -> bytes:
    """A picture as a file.

    Args:
        picture: uint8 [Y, X, 3], or 4 with transparency; JPEG has none, so it is laid on white.
        format: PNG keeps every bit; JPEG and WebP lose a little.
        quality: 0 (smallest) to 100 (best) of JPEG and WebP; PNG has none.

    Raises:
        ValueError: an argument is out of range or of the wrong shape.
    """
    from PIL import Image

    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] not in (3, 4):
        raise ValueError(
            f"picture must be uint8 [Y, X, 3 or 4], got {picture.dtype} {list(picture.shape)}"
        )
    if not 0 <= quality <= 100:
        raise ValueError(f"quality must be from 0 to 100, got {quality}")
    if format == "jpeg":
        picture = composite_on_white(picture)
    options = {"jpeg": {"quality": quality, "subsampling": 0}, "webp": {"quality": quality}}
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format, **options.get(format, {}))
    return file.getvalue()


def composite_on_white(picture: np.ndarray) -> np.ndarray:
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


def format_of(path: Path) -> ImageFormat:
    """The format that the name of a file says.

    Raises:
        ValueError: it says none, or one that cannot be written.
    """
    suffix = path.suffix.lower()
    found: dict[str, ImageFormat] = {
        ".png": "png",
        ".jpg": "jpeg",
        ".jpeg": "jpeg",
        ".webp": "webp",
    }
    if suffix not in found:
        raise ValueError(f"{path}: the name of a picture ends in {', '.join(found)}")
    return found[suffix]
