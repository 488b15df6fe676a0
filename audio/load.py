"""Sound from files: bytes of any common format to one channel of float32 at 16,000 Hz.

The first bytes say what a file is; its name is not trusted. WAV, FLAC, Ogg (Vorbis, Opus), MP3 and
AIFF are decoded by libsndfile, the containers of films and phones (MP4, M4A, WebM, MPEG, AAC) by
FFmpeg's libraries. Only formats recognised here reach FFmpeg, since some of those it knows
(playlists) are texts that name other files to open.

Leaves out: video, and choosing among several sound tracks (the first is read).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

RATE = 16_000  # samples a second, what Whisper listens to

_BLOCK = 2**18  # frames decoded at a time
_MAX_CHANNELS = 64
_RATES = (1_000, 768_000)  # samples a second that a file may have

# What a file begins with: offset, bytes, who reads it (FFmpeg under the given name, or libsndfile).
_SIGNS: tuple[tuple[int, bytes, str], ...] = (
    (8, b"WAVE", "sndfile"),
    (8, b"AIFF", "sndfile"),
    (8, b"AIFC", "sndfile"),
    (0, b"fLaC", "sndfile"),
    (0, b"OggS", "sndfile"),
    (0, b"ID3", "sndfile"),
    (4, b"ftyp", "mov"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    (0, b"\x00\x00\x01\xba", "mpeg"),
)


def load(source: str | Path | bytes, *, max_seconds: float | None = None) -> np.ndarray:
    """Decodes a sound file and brings it to 16 kHz mono.

    Args:
        source: a path, or the bytes of the file.
        max_seconds: longer sounds are refused, before they fill the memory.

    Returns:
        float32 [samples], mostly between -1 and 1; channels are averaged.

    Raises:
        FileNotFoundError: nothing at the path.
        ValueError: the file is empty, of no known format, damaged, silent for want of samples, or
            longer than `max_seconds`.
    """
    name, data = ("sound", source) if isinstance(source, bytes) else (str(source), None)
    if data is None:
        data = Path(source).read_bytes()
    if not data:
        raise ValueError(f"{name}: the file is empty")
    reader = sniff(data)
    if reader is None:
        raise ValueError(
            f"{name}: not a sound file of a known format; flac, m4a, mp3, mp4, mpeg, mpga, ogg, "
            "opus, wav and webm can be read"
        )
    blocks, seconds, to_rate = [], 0.0, None
    try:
        decoded = _sndfile(data) if reader == "sndfile" else _ffmpeg(data, reader)
        for block, rate in decoded:
            seconds += len(block) / rate
            if max_seconds is not None and seconds > max_seconds:
                break
            to_rate = to_rate or _Resampler(rate)  # at once: a high rate takes much memory
            blocks.append(to_rate(block))
    except ImportError as error:
        raise ValueError(f"{name}: reading this format needs the package av: {error}") from error
    except _decoding_errors() as error:
        raise ValueError(f"{name}: damaged or truncated ({error})") from error
    if max_seconds is not None and seconds > max_seconds:
        raise ValueError(f"{name}: longer than {max_seconds:g} seconds")
    if to_rate is None:
        raise ValueError(f"{name}: holds no sound")
    samples = np.concatenate([*blocks, to_rate.end()])
    if not np.isfinite(samples).all():
        raise ValueError(f"{name}: holds samples that are not numbers")
    return samples


def sniff(data: bytes) -> str | None:
    """Who can read these bytes: "sndfile", or the name of an FFmpeg demuxer; None for nobody."""
    for offset, sign, reader in _SIGNS:
        if data[offset : offset + len(sign)] == sign:
            return reader
    # MPEG audio without a header begins with a frame: eleven ones, then version and layer.
    if len(data) > 2 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0:
        layer = data[1] >> 1 & 3
        return "sndfile" if layer else "aac"
    return None


class _Resampler:
    """Brings blocks of float32 samples at `rate` a second to `RATE`."""

    def __init__(self, rate: int):
        self._stream = None
        if rate != RATE:
            import soxr

            self._stream = soxr.ResampleStream(rate, RATE, 1, dtype="float32", quality="HQ")

    def __call__(self, block: np.ndarray) -> np.ndarray:
        return block if self._stream is None else self._stream.resample_chunk(block)

    def end(self) -> np.ndarray:
        """What is still inside."""
        nothing = np.zeros(0, np.float32)
        return nothing if self._stream is None else self._stream.resample_chunk(nothing, last=True)


def _sndfile(data: bytes) -> Iterator[tuple[np.ndarray, int]]:
    import soundfile

    with soundfile.SoundFile(io.BytesIO(data)) as file:
        _check(file.channels, file.samplerate)
        while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
            yield block.mean(axis=1), file.samplerate


def _ffmpeg(data: bytes, format: str) -> Iterator[tuple[np.ndarray, int]]:
    import av

    with av.open(io.BytesIO(data), format=format) as container:
        if not container.streams.audio:
            raise ValueError("it has no sound track")
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise ValueError("its sound track is of no known codec")
        _check(stream.codec_context.channels, stream.codec_context.sample_rate)
        # FFmpeg mixes channels and widens samples; the rate is left to one resampler for all.
        rate = stream.codec_context.sample_rate
        to_float = av.AudioResampler(format="flt", layout="mono", rate=rate)
        for frame in container.decode(stream):
            for part in to_float.resample(frame):
                yield part.to_ndarray().reshape(-1), rate
        for part in to_float.resample(None):
            yield part.to_ndarray().reshape(-1), rate


def _check(channels: int, rate: int) -> None:
    if not 1 <= channels <= _MAX_CHANNELS:
        raise ValueError(f"{channels} channels, at most {_MAX_CHANNELS} can be read")
    if not _RATES[0] <= rate <= _RATES[1]:
        raise ValueError(
            f"{rate} samples a second, only from {_RATES[0]} to {_RATES[1]} can be read"
        )


def _decoding_errors() -> tuple[type[Exception], ...]:
    import soundfile

    errors: tuple[type[Exception], ...] = (soundfile.SoundFileError, ValueError, EOFError)
    try:
        import av
    except ImportError:
        return errors
    return (*errors, av.FFmpegError)
