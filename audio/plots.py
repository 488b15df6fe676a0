"""Pictures of listening: a spectrogram with its words, and where the decoder looked for each.

matplotlib is imported only when a picture is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from audio import model, timing
from audio.mel import FRAMES_PER_SECOND, log_mel
from audio.timing import Word
from audio.tokenizer import TIME_PRECISION
from audio.transcribe import Transcript
from audio.whisper import Whisper

_ROW_SECONDS = 8.0  # of sound in a row of the picture


def plot_spectrogram(path: str | Path, samples: np.ndarray, words: Sequence[Word]) -> None:
    """Draws a log-mel spectrogram, eight seconds a row, with the words below what they sound like.

    Args:
        path: where the PNG goes.
        samples: float32 [samples] at 16 kHz.
        words: as `Segment.words` has them.
    """
    plt = _pyplot()
    mel = log_mel(samples)
    seconds = len(mel) / FRAMES_PER_SECOND
    rows = max(1, math.ceil(seconds / _ROW_SECONDS))
    figure, axes = plt.subplots(rows, 1, figsize=(12, 2.2 * rows), squeeze=False)
    for row, axis in enumerate(axes[:, 0]):
        begin = row * _ROW_SECONDS
        end = min(begin + _ROW_SECONDS, seconds)
        part = mel[int(begin * FRAMES_PER_SECOND) : int(end * FRAMES_PER_SECOND)]
        axis.imshow(
            part.T,
            origin="lower",
            aspect="auto",
            cmap="magma",
            extent=(begin, end, 0, mel.shape[1]),
        )
        for word in words:
            if begin <= word.start < end:
                axis.axvline(word.start, color="white", linewidth=0.5)
                axis.text(
                    word.start, -0.06, word.text.strip(), fontsize=8, rotation=30, ha="right",
                    va="top", transform=axis.get_xaxis_transform(),
                )  # fmt: skip
        axis.set(xlim=(begin, begin + _ROW_SECONDS), yticks=[], ylabel="mels")
        axis.set_xticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_alignment(
    path: str | Path, whisper: Whisper, samples: np.ndarray, found: Transcript
) -> None:
    """Draws where the aligned heads look for each token of the first window, and the path found.

    Args:
        path: where the PNG goes.
        samples: float32 [samples] at 16 kHz.
        found: what was heard in them.

    Raises:
        ValueError: nothing was heard.
    """
    if not found.segments:
        raise ValueError("nothing was heard, so there is nothing to align")
    plt = _pyplot()
    tokens, cfg = whisper.tokenizer, whisper.cfg
    seek = found.segments[0].seek
    ids = [
        id
        for segment in found.segments
        if segment.seek == seek
        for id in segment.ids
        if id < tokens.eot
    ]
    mel = log_mel(samples, cfg.num_mels)[seek : seek + cfg.num_frames]
    window = np.zeros((1, cfg.num_frames, cfg.num_mels), np.float32)
    window[0, : len(mel)] = mel
    sound, _ = model.encode(whisper.params, cfg, window)
    scores, _ = timing.alignment_scores(
        whisper, sound, ids, num_frames=len(mel), language=found.language
    )
    picture = timing.alignment_matrix(scores, len(ids))
    rows, columns = timing.dtw(-picture)
    start = seek / FRAMES_PER_SECOND
    extent = (start, start + picture.shape[1] * TIME_PRECISION, len(picture) - 0.5, -0.5)
    figure, axis = plt.subplots(figsize=(12, max(3, 0.22 * len(picture))))
    axis.imshow(picture, aspect="auto", cmap="viridis", vmin=0, extent=extent)
    axis.plot(start + (columns + 0.5) * TIME_PRECISION, rows, color="white", linewidth=1)
    labels = [tokens.encoding.decode([id]) for id in ids] + ["(end)"]
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set(xlabel="seconds", ylabel="token")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("drawing needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")  # no window, only a file
    import matplotlib.pyplot as plt

    return plt
