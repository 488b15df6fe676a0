"""Where anybody speaks: a voice-activity detector from loudness alone.

Speech comes in syllables, several a second, loud against what lies between them; noise and hum stay
level. So the loudness of the band of speech is compared, every 10 ms, with the quietest of its
surroundings: what stands out is speech. After the oldest detectors there are (Rabiner & Sambur
1975), with two thresholds, so that a span begins at what is clearly speech and reaches to where
nothing is left of it.

Leaves out: telling speech from music or a slammed door, which takes a trained model. A wrong span
costs time, not truth: Whisper listens to it and may still hear nothing.
"""

from __future__ import annotations

import numpy as np

from audio.load import RATE
from audio.mel import FRAMES_PER_SECOND, HOP

Span = tuple[float, float]  # start and end in seconds

_WINDOW = 512  # samples a loudness is measured over
_BAND = (150.0, 4000.0)  # hertz
_NEIGHBOURHOOD = 10.0  # seconds within which the quietest is looked for
_OPEN, _CLOSE = 12.0, 6.0  # decibels above the quietest at which a span begins and ends
_SILENCE = -65.0  # decibels below full scale; nothing below it is speech
_SHORTEST_SPEECH, _SHORTEST_PAUSE, _MARGIN = 0.1, 0.5, 0.2  # seconds


def speech_spans(samples: np.ndarray) -> list[Span]:
    """Finds the stretches of a sound in which somebody may be speaking.

    Args:
        samples: float32 [samples] at 16 kHz.

    Returns:
        Spans in order, apart from each other by at least half a second less two margins.
    """
    loud = loudness(samples)
    if not len(loud):
        return []
    floor = _quietest(loud)
    opened = loud > np.maximum(floor + _OPEN, _SILENCE)
    held = loud > np.maximum(floor + _CLOSE, _SILENCE)
    # Runs of frames above the lower threshold that reach the upper one somewhere.
    edges = np.flatnonzero(np.diff(held.astype(np.int8), prepend=0, append=0))
    runs = edges.reshape(-1, 2) / FRAMES_PER_SECOND
    counts = np.concatenate([[0], np.cumsum(opened)])
    long_enough = counts[edges[1::2]] - counts[edges[::2]] >= 3
    merged: list[list[float]] = []
    for start, end in runs[long_enough].tolist():
        if merged and start - merged[-1][1] < _SHORTEST_PAUSE:
            merged[-1][1] = end
        else:
            merged.append([start, end])
    seconds = len(samples) / RATE
    return [
        (max(start - _MARGIN, 0.0), min(end + _MARGIN, seconds))
        for start, end in merged
        if end - start >= _SHORTEST_SPEECH
    ]


def loudness(samples: np.ndarray) -> np.ndarray:
    """The power of the band of speech in decibels of full scale, every 10 ms: float32 [T]."""
    num_frames = len(samples) // HOP
    padded = np.pad(samples.astype(np.float32), (_WINDOW // 2, _WINDOW))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::HOP][:num_frames]
    window = np.hanning(_WINDOW).astype(np.float32)
    band = slice(*(int(hertz * _WINDOW / RATE) for hertz in _BAND))
    powers = [
        np.square(np.abs(np.fft.rfft(frames[i : i + 3000] * window)[:, band])).sum(axis=1)
        for i in range(0, num_frames, 3000)
    ]
    power = np.concatenate(powers) if powers else np.zeros(0, np.float32)
    full_scale = window.sum() ** 2 / 4  # of a sine
    return 10 * np.log10(np.maximum(power / full_scale, 1e-12))


def _quietest(loud: np.ndarray) -> np.ndarray:
    """The level that a tenth of the frames around each second stay below: float [T]."""
    step, reach = FRAMES_PER_SECOND, int(_NEIGHBOURHOOD * FRAMES_PER_SECOND / 2)
    centres = np.arange(0, len(loud), step)
    levels = [np.percentile(loud[max(c - reach, 0) : c + reach], 10) for c in centres]
    return np.interp(np.arange(len(loud)), centres, levels)


def windows(samples: np.ndarray, spans: list[Span], *, longest: float = 30.0) -> list[Span]:
    """Packs spans into windows of at most `longest` seconds, cut where it is quietest.

    A span that is longer alone is cut at the quietest moment of the last third of its window.
    """
    loud = loudness(samples)
    pieces: list[Span] = []
    for start, end in spans:
        while end - start > longest:
            first = int((start + longest * 2 / 3) * FRAMES_PER_SECOND)
            last = int((start + longest) * FRAMES_PER_SECOND)
            smooth = np.convolve(loud[first:last], np.ones(20) / 20, mode="same")
            cut = (first + int(smooth.argmin())) / FRAMES_PER_SECOND
            pieces.append((start, cut))
            start = cut
        pieces.append((start, end))
    packed: list[Span] = []
    for start, end in pieces:
        if packed and end - packed[-1][0] <= longest:
            packed[-1] = (packed[-1][0], end)
        else:
            packed.append((start, end))
    return packed
