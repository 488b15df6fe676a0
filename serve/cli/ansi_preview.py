"""Pictures in a terminal: two pixels a character, the upper its ink and the lower its ground.

They are drawn over what was shown last, so that one sees a picture come.
"""

from __future__ import annotations

import os
import shutil
from typing import TextIO

import numpy as np

from serve.cli import console


class AnsiPreview:
    """Shows pictures in place, as many side by side as there is room for, or none.

    Args:
        stream: where to. If it is not a terminal, or one without colour, nothing is shown.
    """

    def __init__(self, stream: TextIO):
        self._stream, self._lines = stream, 0
        self.is_enabled = not console.is_plain(stream)

    def __call__(self, pictures: np.ndarray) -> None:
        """Shows uint8 [B, Y, X, 3]."""
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
        """What is shown next stands below."""
        self._lines = 0


def half_blocks(pictures: np.ndarray, truecolor: bool) -> list[str]:
    """Lines of a terminal that show pictures side by side.

    Args:
        pictures: uint8 [B, Y, X, 3]; an odd row at the end is left out.
        deep: whether the terminal has all colours; else the nearest of 216 are used.
    """
    count, height, width, _ = pictures.shape
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
    """Whether the terminal says that it has all colours."""
    return environment.get("COLORTERM", "") in ("truecolor", "24bit")


def _colour(rgb: list[int], deep: bool) -> str:
    if deep:
        return "2;" + ";".join(map(str, rgb))
    r, g, b = (round(value / 51) for value in rgb)
    return f"5;{16 + 36 * r + 6 * g + b}"
