"""From samples to the picture that Whisper looks at: a log-mel spectrogram, 100 columns a second.

Every 10 ms, 25 ms of sound are weighed with a Hann window and split into frequencies by a Fourier
transform. The powers are gathered into 80 (or 128) bands that are narrow where hearing is fine and
wide where it is coarse (the mel scale, in Slaney's form: linear to 1 kHz, logarithmic above), and
their logarithms are taken, since loudness is heard that way. Radford et al. 2022,
arXiv:2212.04356, section 2.2.
"""

from __future__ import annotations

import functools

import numpy as np

from audio.load import SAMPLE_RATE

HOP_LENGTH = 160  # samples between frames: 10 ms
N_FFT = 400  # samples a frame looks at: 25 ms
FRAMES_PER_SECOND = SAMPLE_RATE // HOP_LENGTH
_CHUNK_FRAMES = 3000  # frames transformed at a time, which bounds the memory


def log_mel(samples: np.ndarray, num_mels: int = 80) -> np.ndarray:
    """The log-mel spectrogram of a sound as if silence followed it.

    The loudest band sets the scale: what is 80 dB or more below it counts as 80 dB below. So a part
    of a sound, taken alone, can give other numbers than the same part within the whole.

    Args:
        samples: float32 [samples] at 16 kHz.

    Returns:
        float32 [T, M], one row for each whole 10 ms.

    Raises:
        ValueError: `samples` has another shape.
    """
    if samples.ndim != 1:
        raise ValueError(f"samples must have one axis, got shape {samples.shape}")
    num_frames = len(samples) // HOP_LENGTH
    # Frame i is centred on sample 160 i. Before the beginning the sound is mirrored, behind the end
    # it is silent; the frames in which it fades away count for the loudest band.
    tail = N_FFT // HOP_LENGTH + 1
    padded = np.zeros(HOP_LENGTH * (num_frames + tail) + N_FFT, np.float32)
    padded[N_FFT // 2 :][: len(samples)] = samples
    padded[: N_FFT // 2] = padded[N_FFT : N_FFT // 2 : -1]
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP_LENGTH]
    frames = frames[: num_frames + tail]
    # Hann's window is longer by one sample than the frame, so that it repeats with its length.
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
    """The weight of each frequency in each band: float32 [M, WINDOW / 2 + 1].

    Band i is a triangle that rises from the centre of band i - 1 to its own and falls to that of
    band i + 1; all triangles have the same area.
    """
    frequencies = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    corners = _hertz(np.linspace(0, _mel(SAMPLE_RATE / 2), num_mels + 2))
    left, centre, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising = (frequencies - left) / (centre - left)
    falling = (right - frequencies) / (right - centre)
    triangles = np.maximum(0, np.minimum(rising, falling))  # [M, frequencies]
    return (triangles * 2 / (right - left)).astype(np.float32)


# Slaney's mel scale: 15 mels to 1 kHz, then 27 for each factor of 6.4.
_LINEAR = 200 / 3  # hertz a mel, below the bend
_BEND = 1000.0
_RATIO = np.log(6.4) / 27


def _mel(hertz: float) -> float:
    if hertz < _BEND:
        return hertz / _LINEAR
    return _BEND / _LINEAR + np.log(hertz / _BEND) / _RATIO


def _hertz(mel: np.ndarray) -> np.ndarray:
    bend = _BEND / _LINEAR
    return np.where(mel < bend, mel * _LINEAR, _BEND * np.exp(_RATIO * (mel - bend)))
