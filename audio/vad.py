"""Where anybody speaks: a voice-activity detector from loudness alone.

Speech comes in syllables, several a second, loud against what lies between them; noise and hum stay
level. So the loudness of the band of speech is compared, every 10 ms, with the quietest of its
surroundings: what stands out may be speech, and is taken for it if it moves. After the oldest
detectors there are (Rabiner & Sambur 1975), with two thresholds, so that a span begins at what is
clearly louder and reaches to where nothing is left of it.

Leaves out: telling speech from a melody, from footsteps, or from typing, which takes a trained
model. A wrong span costs time, not truth: Whisper listens to it and still hears nothing.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

import numpy as np

from audio.load import SAMPLE_RATE
from audio.mel import FRAMES_PER_SECOND, HOP_LENGTH

Span = tuple[float, float]  # start and end in seconds

_WINDOW = 512  # samples a loudness is measured over
_BAND = (150.0, 4000.0)  # hertz
_SMOOTH = 5  # frames over which powers are averaged, so that noise is level
_NEIGHBOURHOOD = 10.0  # seconds within which the quietest is looked for
_ONSET_DB, _OFFSET_DB = 6.0, 3.0  # decibels above the quietest at which a span begins and ends
_MIN_MODULATION_DB = (
    6.0  # decibels between the quiet and the loud tenth of a span; noise has up to 4
)
_SILENCE = -65.0  # decibels below full scale; nothing below it is speech
_SHORTEST_SPEECH, _SHORTEST_PAUSE = 0.1, 0.5  # seconds
_MAX_SYLLABLE = 0.4  # seconds; a shorter span is one syllable, which need not move
_SPEECH_PAD = 1.5  # seconds on either side of speech
_TOLERANCE = 0.3  # seconds by which a time may miss a pause


def speech_spans(samples: np.ndarray) -> list[Span]:
    """Finds the stretches of a sound in which somebody may be speaking.

    Args:
        samples: float32 [samples] at 16 kHz.

    Returns:
        Spans in order, without the silence around them, at least half a second apart.
    """
    loud = loudness(samples)
    if not len(loud):
        return []
    floor = _noise_floor(loud)
    opened = loud > np.maximum(floor + _ONSET_DB, _SILENCE)
    held = loud > np.maximum(floor + _OFFSET_DB, _SILENCE)
    # Runs of frames above the lower threshold that reach the upper one somewhere.
    runs = np.flatnonzero(np.diff(held.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    counts = np.concatenate([[0], np.cumsum(opened)])
    runs = runs[counts[runs[:, 1]] - counts[runs[:, 0]] >= 3] / FRAMES_PER_SECOND
    return [
        (start, end)
        for start, end in merge_spans([tuple(run) for run in runs.tolist()], _SHORTEST_PAUSE)
        if end - start >= _SHORTEST_SPEECH and _is_modulated(loud[_frames(start) : _frames(end)])
    ]


def loudness(samples: np.ndarray) -> np.ndarray:
    """The power of the band of speech in decibels of full scale, every 10 ms: float32 [T]."""
    num_frames = len(samples) // HOP_LENGTH
    if not num_frames:
        return np.zeros(0, np.float32)
    padded = np.pad(samples.astype(np.float32), (_WINDOW // 2, _WINDOW))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::HOP_LENGTH][:num_frames]
    window = np.hanning(_WINDOW).astype(np.float32)
    band = slice(*(int(hertz * _WINDOW / SAMPLE_RATE) for hertz in _BAND))
    powers = [
        np.square(np.abs(np.fft.rfft(frames[i : i + 3000] * window)[:, band])).sum(axis=1)
        for i in range(0, num_frames, 3000)
    ]
    around = np.pad(np.concatenate(powers), _SMOOTH // 2, mode="edge")
    power = np.convolve(around, np.full(_SMOOTH, 1 / _SMOOTH, np.float32), mode="valid")
    full_scale = window.sum() ** 2 / 4  # of a sine
    return 10 * np.log10(np.maximum(power / full_scale, 1e-12))


def _noise_floor(loud: np.ndarray) -> np.ndarray:
    """The level that a tenth of the frames around each second stay below: float [T]."""
    step, reach = FRAMES_PER_SECOND, int(_NEIGHBOURHOOD * FRAMES_PER_SECOND / 2)
    centres = np.arange(0, len(loud), step)
    levels = [np.percentile(loud[max(c - reach, 0) : c + reach], 10) for c in centres]
    return np.interp(np.arange(len(loud)), centres, levels)


def _frames(seconds: float) -> int:
    return round(seconds * FRAMES_PER_SECOND)


def _is_modulated(loud: np.ndarray) -> bool:
    """Whether a span goes up and down as syllables do, its rise and fall not counted."""
    if len(loud) < _frames(_MAX_SYLLABLE):
        return True
    low, high = np.percentile(loud[_SMOOTH:-_SMOOTH], (10, 90))
    return bool(high - low >= _MIN_MODULATION_DB)


# Leaving pauses out


def retained_frames(spans: Sequence[Span], num_frames: int) -> np.ndarray:
    """The frames that are left when no pause is longer than three seconds: int [T]."""
    is_kept = np.zeros(num_frames, bool)
    for start, end in spans:
        is_kept[max(_frames(start - _SPEECH_PAD), 0) : _frames(end + _SPEECH_PAD)] = True
    return np.flatnonzero(is_kept)


def remap_spans(spans: Sequence[Span], kept: np.ndarray) -> list[Span]:
    """Where the spans lie when only the kept frames are left."""
    frames = np.round(np.array(spans).reshape(-1, 2) * FRAMES_PER_SECOND)
    return [tuple(pair) for pair in (np.searchsorted(kept, frames) / FRAMES_PER_SECOND).tolist()]


def snap_to_speech(start: float, end: float, spans: Sequence[Span]) -> Span:
    """Takes what begins or ends in a pause to where speech begins behind it, or ended before it.

    The last moments before a pause, and the first behind it, count as the pause.
    """
    behind = bisect.bisect(
        spans, start + _TOLERANCE, key=lambda span: span[1]
    )  # the first not over
    if behind < len(spans) and start < spans[behind][0] < end:
        start = spans[behind][0]
    before = bisect.bisect(spans, end - _TOLERANCE, key=lambda span: span[0]) - 1  # the last begun
    if before >= 0 and start < spans[before][1] < end:
        end = spans[before][1]
    return start, end


def merge_spans(spans: Sequence[Span], pause: float) -> list[Span]:
    """Spans joined where the pause between them is shorter."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and start - joined[-1][1] < pause:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def split_into_windows(
    loud: np.ndarray, spans: Sequence[Span], *, max_seconds: float = 30.0
) -> list[Span]:
    """Cuts a sound into windows of at most `longest` seconds, in the middle of pauses.

    A stretch without a pause is cut at the quietest moment of the last third of its window.

    Args:
        loud: a measure of the loudness of its frames.
        spans: where anybody speaks.
    """
    if not spans:
        return []
    cuts = [0.0]
    ends = [(a[1] + b[0]) / 2 for a, b in itertools.pairwise(spans)]
    for end in [*ends, len(loud) / FRAMES_PER_SECOND]:
        while end - cuts[-1] > max_seconds:
            first, last = _frames(cuts[-1] + max_seconds * 2 / 3), _frames(cuts[-1] + max_seconds)
            smooth = np.convolve(loud[first:last], np.ones(20) / 20, mode="same")
            cuts.append((first + int(smooth.argmin())) / FRAMES_PER_SECOND)
        cuts.append(end)
    packed: list[Span] = []
    for start, end in itertools.pairwise(cuts):
        if packed and end - packed[-1][0] <= max_seconds:
            packed[-1] = (packed[-1][0], end)
        else:
            packed.append((start, end))
    return packed
