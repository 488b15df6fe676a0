"""Transparency of every type of PNG file, compared with arrays computed by hand.

The files are built byte by byte. Pillow and ffmpeg both decode several of the types wrongly, so
neither is the reference: the expected arrays follow the PNG specification (third edition, 11.3.2.1
and 13.12).
"""

import io
import struct
import zlib

import numpy as np
import pytest

from diffusion import image_io
from tests.naming import naming

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def png(
    depth: int,
    kind: int,
    rows: list[list[int]],
    *extra: tuple[bytes, bytes],
    channels: int,
    interlaced: tuple[int, int] | None = None,
) -> bytes:
    """Return an unfiltered PNG file of rows of samples.

    Args:
        depth: bits per sample.
        kind: the colour type, as in the file header.
        rows: the samples of each row, or of each of Adam7's passes if interlaced.
        *extra: type and data of chunks before the image data.
        channels: samples per pixel.
        interlaced: width and height of an interlaced image.
    """
    lines = b""
    for row in rows:
        bits = "".join(f"{sample:0{depth}b}" for sample in row)
        bits += "0" * (-len(bits) % 8)
        lines += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    width, height = interlaced or (len(rows[0]) // channels, len(rows))
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced is not None)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(chunk(*fields) for fields in extra)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def grey(*pairs: tuple[int, int]) -> list[list[int]]:
    return [[value, value, value, alpha] for value, alpha in pairs]


def key(*samples: int) -> tuple[bytes, bytes]:
    return b"tRNS", struct.pack(f">{len(samples)}H", *samples)


COLOURS = (b"PLTE", bytes(range(0, 120, 10)))

CASES = {
    "grey 1": (png(1, GREY, [[1, 0, 1]], key(1), channels=1), grey((255, 0), (0, 255), (255, 0))),
    "grey 1, black": (png(1, GREY, [[1, 0]], key(0), channels=1), grey((255, 255), (0, 0))),
    "grey 2": (
        png(2, GREY, [[0, 1, 2, 3]], key(1), channels=1),
        grey((0, 255), (85, 0), (170, 255), (255, 255)),
    ),
    "grey 4": (
        png(4, GREY, [[1, 15, 2]], key(15), channels=1),
        grey((17, 255), (255, 0), (34, 255)),
    ),
    "grey 8": (png(8, GREY, [[1, 2]], key(2), channels=1), grey((1, 255), (2, 0))),
    "grey 8, only low bits count": (
        png(8, GREY, [[1, 2]], key(0x0102), channels=1),
        grey((1, 255), (2, 0)),
    ),
    "grey 16": (
        png(16, GREY, [[0x1234, 0xFEDC, 0x1235]], key(0x1234), channels=1),
        grey((0x12, 0), (0xFE, 255), (0x12, 255)),
    ),
    "grey 16, white": (
        png(16, GREY, [[0xFFFF, 0xFFFE]], key(0xFFFF), channels=1),
        grey((255, 0), (255, 255)),
    ),
    "grey 16, no key": (png(16, GREY, [[0xFF00]], channels=1), grey((255, 255))),
    "rgb 8": (
        png(8, RGB, [[1, 2, 3, 1, 2, 4]], key(1, 2, 3), channels=3),
        [[1, 2, 3, 0], [1, 2, 4, 255]],
    ),
    "rgb 16": (
        png(16, RGB, [[0x1FF, 0x202, 0x303, 0x1FE, 0x202, 0x303]], key(0x1FF, 0x202, 0x303),
            channels=3),  # fmt: skip
        [[1, 2, 3, 0], [1, 2, 3, 255]],
    ),
    "palette 1": (
        png(1, PALETTE, [[1, 0]], COLOURS, (b"tRNS", b"\0"), channels=1),
        [[30, 40, 50, 255], [0, 10, 20, 0]],
    ),
    "palette 2": (
        png(2, PALETTE, [[0, 1, 2]], COLOURS, (b"tRNS", b"\0\x80"), channels=1),
        [[0, 10, 20, 0], [30, 40, 50, 128], [60, 70, 80, 255]],
    ),
    "palette 4": (
        png(4, PALETTE, [[3, 1]], COLOURS, (b"tRNS", b"\xff\x01"), channels=1),
        [[90, 100, 110, 255], [30, 40, 50, 1]],
    ),
    "palette 8": (
        png(8, PALETTE, [[2, 0]], COLOURS, (b"tRNS", b"\x07\xff\0"), channels=1),
        [[60, 70, 80, 0], [0, 10, 20, 7]],
    ),
    "grey and alpha 8": (
        png(8, GREY_ALPHA, [[1, 0, 3, 200]], channels=2),
        grey((1, 0), (3, 200)),
    ),
    "grey and alpha 16": (
        png(16, GREY_ALPHA, [[0x1234, 0, 0xFEDC, 0x8001]], channels=2),
        grey((0x12, 0), (0xFE, 0x80)),
    ),
    "rgba 8": (png(8, RGBA, [[1, 2, 3, 4]], channels=4), [[1, 2, 3, 4]]),
    "rgba 16": (
        png(16, RGBA, [[0x1234, 0xFFFF, 0, 0, 0xFEDC, 1, 0x80FF, 0xFFFF]], channels=4),
        [[0x12, 255, 0, 0], [0xFE, 0, 0x80, 255]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_transparency_of_every_png_type_matches_the_specification(name: str) -> None:
    """Bug: grey of 2, 4 and 16 bits lost transparency; in 16-bit RGB too many pixels had it."""
    data, expected = CASES[name]
    assert image_io.decode(data).tolist() == [expected]


def test_transparent_colour_is_rotated_with_the_image() -> None:
    """Bug: the orientation of 16-bit grey was not applied to the transparent pixels."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    orientation = (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    rows = [[0x1FF, 2, 3, 0x1FE, 2, 3, 9, 9, 9]]
    pixels = image_io.decode(png(16, RGB, rows, orientation, key(0x1FF, 2, 3), channels=3))
    assert pixels[:, 0].tolist() == [[1, 0, 0, 0], [1, 0, 0, 255], [0, 0, 0, 255]]
    pixels = image_io.decode(
        png(16, GREY, [[0x1234, 0x1235]], orientation, key(0x1235), channels=1)
    )
    assert pixels[:, 0].tolist() == grey((0x12, 255), (0x12, 0))


def test_transparent_colour_of_interlaced_png_is_decoded() -> None:
    first, second, third = [0x1FF, 2, 3], [0x1FE, 2, 3], [9, 9, 9]
    passes = [first, third, second]  # of a row of three pixels: columns 0, 2, 1
    data = png(16, RGB, passes, key(0x1FE, 2, 3), channels=3, interlaced=(3, 1))
    assert image_io.decode(data).tolist() == [[[1, 0, 0, 255], [1, 0, 0, 0], [0, 0, 0, 255]]]


def test_transparent_colour_of_every_depth_is_decoded_in_a_larger_image() -> None:
    """Grey images of every bit depth, in which rows do not end at byte boundaries."""
    random = np.random.default_rng(0)
    for depth in (1, 2, 4, 8, 16):
        samples = random.integers(0, 2**depth, (23, 19))
        transparent = int(samples[11, 7])
        pixels = image_io.decode(png(depth, GREY, samples.tolist(), key(transparent), channels=1))
        np.testing.assert_array_equal(pixels[..., 3] == 0, samples == transparent)
        scaled = samples >> 8 if depth == 16 else samples * (255 // (2**depth - 1))
        np.testing.assert_array_equal(pixels[..., 0], scaled)


def test_image_file_with_too_many_parts_is_refused() -> None:
    """Bug: 20 MB of empty chunks or markers took Pillow minutes."""
    tiny = png(8, GREY, [[1]], channels=1)
    start = tiny.index(b"IDAT") - 4
    many = chunk(b"teSt", b"") * (image_io.MAX_PARTS + 1)
    file = io.BytesIO()
    from PIL import Image

    Image.new("RGB", (8, 8)).save(file, "JPEG")
    jpeg = file.getvalue()
    for data in (
        tiny[:start] + many + tiny[start:],
        tiny[:-12] + many + tiny[-12:],
        jpeg[:2] + b"\xff\xe9\0\2" * (image_io.MAX_PARTS + 1) + jpeg[2:],
    ):
        with pytest.raises(image_io._TooLarge, match=naming(f"{image_io.MAX_PARTS:,}")):
            image_io.decode(data)


def scans(count: int, size: int = 64) -> bytes:
    """Return a progressive JPEG whose last scan is repeated."""
    from PIL import Image

    file = io.BytesIO()
    ramp = np.linspace(0, 255, size * size * 3).reshape(size, size, 3).astype(np.uint8)
    Image.fromarray(ramp).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * (count - data.count(b"\xff\xda")) + data[-2:]


def test_gif_with_too_many_parts_before_its_frame_is_refused() -> None:
    """Bug: a GIF with a comment of 20 MB took four seconds."""
    from PIL import Image

    gif = io.BytesIO()
    Image.new("P", (2, 2)).save(gif, "gif")
    data = gif.getvalue()
    frame = 13 + 3 * 2 ** ((data[10] & 7) + 1)

    def with_parts(count: int) -> list[bytes]:
        comment = b"!\xfe" + (b"\xff" + b"," * 255) * count + b"\0"
        parts = (comment, b"\0" + comment, b"!\xfe\0" * count, b"\0" * count)
        return [data[:frame] + part + data[frame:] for part in parts]

    for few in with_parts(image_io.MAX_PARTS // 10):
        assert image_io.decode(few).shape == (2, 2, 4)
    for many in with_parts(image_io.MAX_PARTS + 1):
        with pytest.raises(image_io._TooLarge, match=naming(f"{image_io.MAX_PARTS:,}")):
            image_io.decode(many)


def test_jpeg_with_too_many_scans_is_refused() -> None:
    """Bug: a file of 35 kB with 400 scans of 2,048 x 2,048 pixels took seconds, without a limit."""
    assert image_io.decode(scans(image_io.MAX_SCANS)).shape == (64, 64, 4)
    with pytest.raises(image_io._TooLarge, match=naming(image_io.MAX_SCANS)):
        image_io.decode(scans(image_io.MAX_SCANS + 1))
