"""Draw images in a terminal with half-block characters, each of which shows two pixels.

The upper pixel is the foreground colour of the character, the lower pixel its background colour.
Each preview overwrites the previous one, so that the user watches the denoising.
"""

from __future__ import annotations

import os
import shutil
from typing import TextIO

import numpy as np

from serve.cli import console


class AnsiPreview:
    """A preview of images that is redrawn in place, as many side by side as the terminal fits.

    Args:
        stream: the stream to write to. Nothing is written unless it is a terminal with colour.
    """

    def __init__(self, stream: TextIO):
        self._stream, self._lines = stream, 0
        self.is_enabled = not console.is_plain(stream)

    def __call__(self, pictures: np.ndarray) -> None:
        """Draw images, uint8 [B, Y, X, 3], over the previous ones."""
        if not self.is_enabled:
            return
        columns, rows = shutil.get_terminal_size()
        room = columns // (pictures.shape[2] + 1) if pictures.shape[1] // 2 < rows else 0
        lines = half_blocks(pictures[:room], has_truecolor(os.environ)) if room else []
        up = f"\x1b[{self._lines}A" if self._lines else ""
        self._stream.write(up + "".join(f"{line}\n" for line in lines))
        self._stream.flush()
        self._lines = len(lines)

    def done(self) -> None:
        """Keep the images on the screen: the next call draws below them instead of over them."""
        self._lines = 0


def half_blocks(pictures: np.ndarray, truecolor: bool) -> list[str]:
    """Return lines of text with ANSI colours that show images side by side.

    Args:
        pictures: the images, uint8 [B, Y, X, 3]. If Y is odd, the last row of pixels is left out.
        truecolor: whether to use 24-bit colours; otherwise the nearest of 216 colours.
    """
    _, height, width, _ = pictures.shape
    lines = []
    for y in range(0, height - 1, 2):
        parts = []
        for picture in pictures:
            for x in range(width):
                above, below = (_colour(picture[y + i, x].tolist(), truecolor) for i in (0, 1))
                parts.append(f"\x1b[38;{above};48;{below}m▀")
            parts.append("\x1b[0m ")
        lines.append("".join(parts))
    return lines


def has_truecolor(environment: os._Environ[str] | dict[str, str]) -> bool:
    """Return whether the environment variable `COLORTERM` announces 24-bit colours."""
    return environment.get("COLORTERM", "") in ("truecolor", "24bit")


def _colour(rgb: list[int], truecolor: bool) -> str:
    if truecolor:
        return "2;" + ";".join(map(str, rgb))
    r, g, b = (round(value / 51) for value in rgb)
    return f"5;{16 + 36 * r + 6 * g + b}"
