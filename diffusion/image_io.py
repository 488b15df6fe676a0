"""Image files: decode untrusted bytes to arrays, and encode arrays to bytes.

The format is detected from the first bytes, never from a name. The size is read from the header and
checked before decoding: a PNG of some kilobytes can expand to gigabytes, and so can a single line
of pixels when it is padded to a square. The number of parts (chunks or markers) is limited because
decoding time grows with it: a progressive JPEG of 35 kB can have 400 scans, each over all pixels.
Only the first frame of an animation is decoded, and photographs are rotated according to their EXIF
orientation.

A PNG without an alpha channel can define one transparent colour (its tRNS chunk). The colour has
the bit depth of the file, so pixels are compared with it before 16 bits are reduced to 8; Pillow
compares afterwards or not at all (PNG specification, third edition, 11.3.2.1).

Leaves out: colour profiles, and other formats, because each decoder adds attack surface.
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
MAX_PARTS = 20_000  # chunks of a PNG, markers of a JPEG, sub-blocks before the frame of a GIF
_READABLE = ("PNG", "JPEG", "WEBP", "GIF")
_PNG, _JPEG, _GIF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"GIF8"
# A JPEG marker, except a stuffed byte (00), a fill byte (FF) and restart markers in coded data.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
# The start of an extension, a frame or the end of a GIF file; Pillow skips other bytes.
_GIF_BLOCK = re.compile(rb"[!,;]")
_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
# Bits per sample of a PNG file, by Pillow's raw mode.
_DEPTHS = {"L;2": 2, "L;4": 4, "L": 8, "I;16B": 16, "RGB": 8, "RGB;16B": 16}


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a PNG, JPEG, WebP or GIF file to RGBA: uint8 [Y, X, 4].

    Args:
        data: the bytes of the file.
        max_pixels: the limit on height times width. Neither side can exceed twice its square root.

    Raises:
        ValueError: the format is not supported, the file is truncated or damaged, the image is
            larger than `max_pixels` allows, or the file has more than `MAX_SCANS` scans or
            `MAX_PARTS` parts (PNG chunks or JPEG segments).
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    _check_parts(data)
    try:
        with Image.open(io.BytesIO(data), formats=_READABLE) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise _TooLarge(
                    f"the image has {width} x {height} pixels; at most {max_pixels:,} are allowed"
                )
            longest = 2 * math.isqrt(max_pixels)
            if max(width, height) > longest:
                raise _TooLarge(
                    f"the image has {width} x {height} pixels; a side can have at most {longest:,}"
                )
            image.seek(0)
            key = _transparent_colour(image)
            image.load()
            upright = ImageOps.exif_transpose(image)
            samples = np.asarray(upright)
            if upright.mode.startswith("I"):  # 16 bits of grey, which `convert` would clip at 255
                upright = Image.fromarray((samples >> 8).astype(np.uint8))
            if key is None:
                return np.asarray(upright.convert("RGBA"))
            depth, colour = key
            if depth < 8:  # Pillow has scaled them to 8 bits
                samples = samples // (255 // (2**depth - 1))
            elif upright.mode == "RGB" and depth == 16:  # Pillow keeps the high bytes only
                samples = samples.astype(np.uint16) << 8 | _low_bytes(data)
            is_transparent = (np.atleast_3d(samples) == np.array(colour)).all(-1)
            pixels = np.array(upright.convert("RGB").convert("RGBA"))
            pixels[is_transparent, 3] = 0
            return pixels
    except (_TooLarge, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ValueError(
            "the file has no supported image format: use PNG, JPEG, WebP or GIF"
        ) from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image is too large: {error}") from None
    except Exception as error:  # Pillow's decoders raise exceptions of many types
        raise ValueError(f"the image is damaged or truncated: {error}") from None


class _TooLarge(ValueError):
    """The image has too many pixels, parts (PNG chunks or JPEG segments) or scans."""


def _transparent_colour(image: ImageFile) -> tuple[int, tuple[int, ...]] | None:
    """Return the bits per sample and the transparent colour of a PNG; None without such a colour.

    Args:
        image: an image opened by Pillow and not decoded yet.
    """
    colour = image.info.get("transparency")
    depth = _DEPTHS.get(str(image.tile[0].args)) if image.format == "PNG" and image.tile else None
    if colour is None or depth is None:
        return None
    values = (colour,) if isinstance(colour, int) else colour
    return depth, tuple(
        value & (1 << depth) - 1 for value in values
    )  # the specification says to use only the low bits


def _low_bytes(data: bytes) -> np.ndarray:
    """Return the low bytes of the samples of a 16-bit RGB PNG: uint8 [Y, X, 3], EXIF applied."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        # Pillow keeps the high bytes; with the byte order swapped, these are the low bytes.
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
        return np.asarray(ImageOps.exif_transpose(image))


def _check_parts(data: bytes) -> None:
    """Check a file before decoding, which could take too long.

    Parts are the chunks of a PNG, the segments of a JPEG, or whatever precedes the frame of a GIF:
    sub-blocks of extensions, such as comments, and bytes between blocks. Scans are those of a
    progressive JPEG.

    Raises:
        ValueError: the file has more than `MAX_PARTS` parts or `MAX_SCANS` scans.
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
    elif data.startswith(_GIF) and len(data) > 10:
        has_palette, depth = data[10] >> 7, (data[10] & 7) + 1
        position = 13 + 3 * 2**depth * has_palette
        while parts <= MAX_PARTS:
            block = _GIF_BLOCK.search(data, position)
            parts += (block.end() if block else len(data)) - position  # with skipped bytes
            if block is None or block[0] != b"!":
                break
            position = block.end() + 1  # after the label of the extension
            while parts <= MAX_PARTS and position < len(data) and data[position]:
                parts += 1
                position += 1 + data[position]
    if parts > MAX_PARTS:
        raise _TooLarge(f"the image file has more than {MAX_PARTS:,} chunks, segments or blocks")
    if scans > MAX_SCANS:
        raise _TooLarge(f"the image has more than {MAX_SCANS} scans; save it as a baseline JPEG")


def encode(image: np.ndarray, format: ImageFormat, quality: int = 95) -> bytes:
    """Encode an image to the bytes of a file.

    Args:
        image: uint8 [Y, X, 3], or [Y, X, 4] with transparency; composited on white for JPEG.
        format: "png", which is lossless; "jpeg" or "webp", which are lossy.
        quality: 0 (smallest) to 100 (best) of JPEG and WebP; ignored for PNG.

    Raises:
        ValueError: an argument is out of range or of the wrong shape.
    """
    from PIL import Image

    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4):
        raise ValueError(
            f"image must be uint8 [Y, X, 3 or 4], got {image.dtype} {list(image.shape)}"
        )
    if not 0 <= quality <= 100:
        raise ValueError(f"quality must be from 0 to 100, got {quality}")
    if format == "jpeg":
        image = composite_on_white(image)
    options = {"jpeg": {"quality": quality, "subsampling": 0}, "webp": {"quality": quality}}
    file = io.BytesIO()
    Image.fromarray(image).save(file, format, **options.get(format, {}))
    return file.getvalue()


def composite_on_white(image: np.ndarray) -> np.ndarray:
    """Composite an image on white: uint8 [Y, X, 3 or 4] -> [Y, X, 3]."""
    if image.shape[2] == 3:
        return image
    colour, alpha = image[..., :3].astype(np.float32), image[..., 3:] / np.float32(255)
    return np.round(255 + alpha * (colour - 255)).astype(np.uint8)


def save(image: np.ndarray, path: Path) -> None:
    """Write an image file in the format that its suffix names.

    Args:
        image: uint8 [Y, X, 3 or 4].
        path: the file to write.

    Raises:
        ValueError: the suffix is not .png, .jpg, .jpeg or .webp.
        OSError: the file cannot be written.
    """
    path.write_bytes(encode(image, format_of(path)))


def format_of(path: Path) -> ImageFormat:
    """Return the image format that the suffix of a file names.

    Raises:
        ValueError: the suffix is not .png, .jpg, .jpeg or .webp.
    """
    suffix = path.suffix.lower()
    formats: dict[str, ImageFormat] = {
        ".png": "png",
        ".jpg": "jpeg",
        ".jpeg": "jpeg",
        ".webp": "webp",
    }
    if suffix not in formats:
        raise ValueError(f"{path}: the suffix must be one of {', '.join(formats)}")
    return formats[suffix]
