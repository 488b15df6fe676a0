"""Plots of speech to text: a spectrogram with its words, and the alignment of tokens with time.

matplotlib is imported only when a plot is drawn.
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

_ROW_SECONDS = 8.0  # seconds per row of the spectrogram


def plot_spectrogram(path: str | Path, samples: np.ndarray, words: Sequence[Word]) -> None:
    """Plot a log-mel spectrogram, eight seconds per row, and write each word below its start time.

    Args:
        path: the PNG file to write.
        samples: float32 [samples] at 16 kHz.
        words: words with their times, from `Segment.words`.

    Raises:
        ValueError: matplotlib is not installed.
    """
    plt = _pyplot()
    mel = log_mel(samples)
    seconds = len(mel) / FRAMES_PER_SECOND
    rows = max(1, math.ceil(seconds / _ROW_SECONDS))
    figure, axes = plt.subplots(rows, 1, figsize=(12, 2.2 * rows), squeeze=False)
    for row, axis in enumerate(axes[:, 0]):
        begin = row * _ROW_SECONDS
        end = min(begin + _ROW_SECONDS, seconds)
        row_mel = mel[int(begin * FRAMES_PER_SECOND) : int(end * FRAMES_PER_SECOND)]
        axis.imshow(
            row_mel.T,
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
    path: str | Path, whisper: Whisper, samples: np.ndarray, transcript: Transcript
) -> None:
    """Plot the alignment matrix of the first window (tokens by time), and the DTW path through it.

    Args:
        path: the PNG file to write.
        whisper: the model that made the transcript.
        samples: float32 [samples] at 16 kHz.
        transcript: the transcript of the samples.

    Raises:
        ValueError: the transcript has no segments, or matplotlib is not installed.
    """
    if not transcript.segments:
        raise ValueError("the transcript has no segments, so there is nothing to align")
    plt = _pyplot()
    tokenizer, cfg = whisper.tokenizer, whisper.cfg
    seek = transcript.segments[0].seek
    ids = [
        id
        for segment in transcript.segments
        if segment.seek == seek
        for id in segment.ids
        if id < tokenizer.eot
    ]
    mel = log_mel(samples, cfg.num_mels)[seek : seek + cfg.num_frames]
    window = np.zeros((1, cfg.num_frames, cfg.num_mels), np.float32)
    window[0, : len(mel)] = mel
    audio_features, _ = model.encode(whisper.params, cfg, window)
    scores, _ = timing.alignment_scores(
        whisper, audio_features, ids, num_frames=len(mel), language=transcript.language
    )
    matrix = timing.alignment_matrix(scores, len(ids))
    rows, columns = timing.dtw(-matrix)
    start = seek / FRAMES_PER_SECOND
    extent = (start, start + matrix.shape[1] * TIME_PRECISION, len(matrix) - 0.5, -0.5)
    figure, axis = plt.subplots(figsize=(12, max(3, 0.22 * len(matrix))))
    axis.imshow(matrix, aspect="auto", cmap="viridis", vmin=0, extent=extent)
    axis.plot(start + (columns + 0.5) * TIME_PRECISION, rows, color="white", linewidth=1)
    labels = [tokenizer.encoding.decode([id]) for id in ids] + ["(end)"]
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set(xlabel="seconds", ylabel="token")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")  # renders to files without a display
    import matplotlib.pyplot as plt

    return plt
