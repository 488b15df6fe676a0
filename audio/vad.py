"""Voice activity detection from the energy of the speech band alone.

Speech has several syllables per second, which are louder than the gaps between them; the level of
noise and hum is constant. Every 10 ms, the level of the speech band is compared with the noise
floor around that time. A span of louder frames counts as speech if its level is modulated. Two
thresholds follow Rabiner & Sambur 1975: a span needs frames above the onset threshold, and extends
as far as frames exceed the offset threshold.

Leaves out: distinguishing speech from melodies, footsteps or typing, which needs a trained model. A
false span costs time but adds no text: Whisper transcribes the window and finds no speech.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

import numpy as np

from audio.load import SAMPLE_RATE
from audio.mel import FRAMES_PER_SECOND, HOP_LENGTH

Span = tuple[float, float]  # start and end in seconds

_WINDOW = 512  # samples of a frame
_BAND = (150.0, 4000.0)  # hertz
_SMOOTH = 5  # frames over which powers are averaged, which smooths noise
_NEIGHBOURHOOD = 10.0  # seconds in which the noise floor is estimated
_ONSET_DB, _OFFSET_DB = 6.0, 3.0  # decibels above the noise floor
_MIN_MODULATION_DB = 6.0  # from the 10th to the 90th percentile of a span; noise has up to 4
_SILENCE = -65.0  # dBFS; nothing below it is speech
_SHORTEST_SPEECH, _SHORTEST_PAUSE = 0.1, 0.5  # seconds
_MAX_SYLLABLE = 0.4  # seconds; a shorter span is one syllable, which need not be modulated
_SPEECH_PAD = 1.5  # seconds of pause retained on each side of speech
_TOLERANCE = 0.3  # seconds; times this close to a pause count as within it


def speech_spans(samples: np.ndarray) -> list[Span]:
    """Find the spans that are probably speech.

    Args:
        samples: float32 [samples] at 16 kHz.

    Returns:
        Spans in seconds, in order, at least half a second apart.
    """
    levels = loudness(samples)
    if not len(levels):
        return []
    floor = _noise_floor(levels)
    above_onset = levels > np.maximum(floor + _ONSET_DB, _SILENCE)
    above_offset = levels > np.maximum(floor + _OFFSET_DB, _SILENCE)
    # Runs of frames above the offset threshold that have at least three above the onset threshold.
    runs = np.flatnonzero(np.diff(above_offset.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    counts = np.concatenate([[0], np.cumsum(above_onset)])
    runs = runs[counts[runs[:, 1]] - counts[runs[:, 0]] >= 3] / FRAMES_PER_SECOND
    return [
        (start, end)
        for start, end in merge_spans([(a, b) for a, b in runs.tolist()], _SHORTEST_PAUSE)
        if end - start >= _SHORTEST_SPEECH
        and _is_modulated(levels[_to_frame(start) : _to_frame(end)])
    ]


def loudness(samples: np.ndarray) -> np.ndarray:
    """Return the power of the speech band in dBFS, every 10 ms: float32 [T].

    Args:
        samples: float32 [samples] at 16 kHz.
    """
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
    padded_powers = np.pad(np.concatenate(powers), _SMOOTH // 2, mode="edge")
    power = np.convolve(padded_powers, np.full(_SMOOTH, 1 / _SMOOTH, np.float32), mode="valid")
    full_scale = window.sum() ** 2 / 4  # power of a full-scale sine
    return 10 * np.log10(np.maximum(power / full_scale, 1e-12))


def _noise_floor(levels: np.ndarray) -> np.ndarray:
    """Return the noise floor at each frame, float [T]: the 10th percentile of levels in 10 seconds.

    It is computed once per second, and interpolated in between.
    """
    step, reach = FRAMES_PER_SECOND, int(_NEIGHBOURHOOD * FRAMES_PER_SECOND / 2)
    centres = np.arange(0, len(levels), step)
    floors = [np.percentile(levels[max(c - reach, 0) : c + reach], 10) for c in centres]
    return np.interp(np.arange(len(levels)), centres, floors)


def _to_frame(seconds: float) -> int:
    return round(seconds * FRAMES_PER_SECOND)


def _is_modulated(levels: np.ndarray) -> bool:
    """Return whether the levels of a span, except at its ends, vary as much as those of speech.

    A span shorter than one syllable counts as modulated.
    """
    if len(levels) < _to_frame(_MAX_SYLLABLE):
        return True
    low, high = np.percentile(levels[_SMOOTH:-_SMOOTH], (10, 90))
    return bool(high - low >= _MIN_MODULATION_DB)


# Shortening pauses


def retained_frames(spans: Sequence[Span], num_frames: int) -> np.ndarray:
    """Return the indices of frames to retain so that no pause exceeds three seconds: int [T].

    Args:
        spans: spans of speech in seconds.
        num_frames: frames of the spectrogram.
    """
    is_retained = np.zeros(num_frames, bool)
    for start, end in spans:
        is_retained[max(_to_frame(start - _SPEECH_PAD), 0) : _to_frame(end + _SPEECH_PAD)] = True
    return np.flatnonzero(is_retained)


def remap_spans(spans: Sequence[Span], frames: np.ndarray) -> list[Span]:
    """Map spans to their times in the audio without long pauses.

    Args:
        spans: spans in the original audio, in seconds.
        frames: int [T], from `retained_frames`.
    """
    edges = np.round(np.array(spans).reshape(-1, 2) * FRAMES_PER_SECOND)
    remapped = np.searchsorted(frames, edges) / FRAMES_PER_SECOND
    return [(start, end) for start, end in remapped.tolist()]


def snap_to_speech(start: float, end: float, spans: Sequence[Span]) -> Span:
    """Move a start out of a pause to the next speech, and an end out of a pause to the last speech.

    A start at most 0.3 seconds before a pause, and an end at most 0.3 seconds after one, count as
    within the pause. If there is no speech between start and end, both are returned unchanged.

    Args:
        start: seconds.
        end: seconds.
        spans: spans of speech in seconds, in order.

    Returns:
        The start and the end in seconds.
    """
    # The first span that ends after the start.
    following = bisect.bisect(spans, start + _TOLERANCE, key=lambda span: span[1])
    if following < len(spans) and start < spans[following][0] < end:
        start = spans[following][0]
    # The last span that begins before the end.
    previous = bisect.bisect(spans, end - _TOLERANCE, key=lambda span: span[0]) - 1
    if previous >= 0 and start < spans[previous][1] < end:
        end = spans[previous][1]
    return start, end


def merge_spans(spans: Sequence[Span], pause: float) -> list[Span]:
    """Merge adjacent spans less than `pause` seconds apart.

    Args:
        spans: spans in seconds, in order.
        pause: the minimum distance in seconds of spans that are kept apart.
    """
    merged: list[Span] = []
    for start, end in spans:
        if merged and start - merged[-1][1] < pause:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def split_into_windows(
    levels: np.ndarray, spans: Sequence[Span], *, max_seconds: float = 30.0
) -> list[Span]:
    """Split audio into windows of at most `max_seconds`, in the middle of pauses.

    Speech without a pause is cut at the quietest frame in the last third of a window.

    Args:
        levels: float [T], the level of each frame.
        spans: spans of speech in seconds.
        max_seconds: the maximum length of a window.

    Returns:
        Adjacent windows in seconds, from 0 to the end of the audio; none if there is no speech.
    """
    if not spans:
        return []
    cuts = [0.0]
    ends = [(a[1] + b[0]) / 2 for a, b in itertools.pairwise(spans)]
    for end in [*ends, len(levels) / FRAMES_PER_SECOND]:
        while end - cuts[-1] > max_seconds:
            first = _to_frame(cuts[-1] + max_seconds * 2 / 3)
            last = _to_frame(cuts[-1] + max_seconds)
            smooth = np.convolve(levels[first:last], np.ones(20) / 20, mode="same")
            cuts.append((first + int(smooth.argmin())) / FRAMES_PER_SECOND)
        cuts.append(end)
    windows: list[Span] = []
    for start, end in itertools.pairwise(cuts):
        if windows and end - windows[-1][0] <= max_seconds:
            windows[-1] = (windows[-1][0], end)
        else:
            windows.append((start, end))
    return windows
