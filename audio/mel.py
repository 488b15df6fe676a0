"""Samples to Whisper's input: a log-mel spectrogram of 100 frames per second.

Every 10 ms, a frame of 25 ms is weighted by a Hann window and transformed by an FFT. The powers are
summed into 80 (or 128) mel bands, narrow at low frequencies and wide at high ones as human hearing
is (Slaney's form: linear to 1 kHz, logarithmic above), and their logarithm is taken. Radford et al.
2022, arXiv:2212.04356, section 2.2.
"""

from __future__ import annotations

import functools

import numpy as np

from audio.load import SAMPLE_RATE

HOP_LENGTH = 160  # samples between frames: 10 ms
N_FFT = 400  # samples of a frame: 25 ms
FRAMES_PER_SECOND = SAMPLE_RATE // HOP_LENGTH
_CHUNK_FRAMES = 3000  # frames transformed at a time, which bounds memory use


def log_mel(samples: np.ndarray, num_mels: int = 80) -> np.ndarray:
    """Compute the log-mel spectrogram of audio as if it were followed by silence.

    Values more than 80 dB below the loudest band of the whole input are raised to that level, so
    the values of an excerpt depend on the audio around it.

    Args:
        samples: float32 [samples] at 16 kHz.
        num_mels: M, the number of bands.

    Returns:
        float32 [T, M], one row per 10 ms; a remainder below 10 ms has no row.

    Raises:
        ValueError: `samples` does not have one axis.
    """
    if samples.ndim != 1:
        raise ValueError(f"samples must have one axis, got shape {samples.shape}")
    num_frames = len(samples) // HOP_LENGTH
    # Frame i is centred on sample 160 i. The signal is mirrored before its start and zero after its
    # end. `tail` frames after the end are computed only for the maximum over all bands, as in the
    # reference implementation.
    tail = N_FFT // HOP_LENGTH + 1
    padded = np.zeros(HOP_LENGTH * (num_frames + tail) + N_FFT, np.float32)
    padded[N_FFT // 2 :][: len(samples)] = samples
    padded[: N_FFT // 2] = padded[N_FFT : N_FFT // 2 : -1]
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP_LENGTH]
    frames = frames[: num_frames + tail]
    # The periodic Hann window: one sample longer than the frame, without its last sample.
    window = np.hanning(N_FFT + 1)[:-1].astype(np.float32)
    bands = mel_filters(num_mels).T
    powers = np.concatenate(
        [
            np.abs(np.fft.rfft(frames[start : start + _CHUNK_FRAMES] * window)) ** 2 @ bands
            for start in range(0, len(frames), _CHUNK_FRAMES)
        ]
    )  # [T, M]
    logs = np.log10(np.maximum(powers, 1e-10))
    logs = np.maximum(logs, logs.max() - 8.0)
    return ((logs[:num_frames] + 4.0) / 4.0).astype(np.float32)


@functools.cache
def mel_filters(num_mels: int) -> np.ndarray:
    """Return the weight of each frequency in each band: float32 [M, N_FFT / 2 + 1].

    Band i is a triangle that rises from the centre of band i - 1 to its own centre and falls to the
    centre of band i + 1. All triangles have the same area.

    Args:
        num_mels: M, the number of bands.
    """
    frequencies = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    corners = _mel_to_hz(np.linspace(0, _hz_to_mel(SAMPLE_RATE / 2), num_mels + 2))
    left, centre, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising = (frequencies - left) / (centre - left)
    falling = (right - frequencies) / (right - centre)
    triangles = np.maximum(0, np.minimum(rising, falling))  # [M, frequencies]
    return (triangles * 2 / (right - left)).astype(np.float32)


# Slaney's mel scale: 15 mels to 1 kHz, then 27 for each factor of 6.4.
_LINEAR = 200 / 3  # hertz per mel, below the bend
_BEND = 1000.0
_RATIO = np.log(6.4) / 27


def _hz_to_mel(hertz: float) -> float:
    if hertz < _BEND:
        return hertz / _LINEAR
    return _BEND / _LINEAR + np.log(hertz / _BEND) / _RATIO


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    bend = _BEND / _LINEAR
    return np.where(mel < bend, mel * _LINEAR, _BEND * np.exp(_RATIO * (mel - bend)))
