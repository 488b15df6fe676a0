"""Audio decoding: files of any common format to one channel of float32 at 16,000 Hz.

The format is detected from the bytes; the file name is a hint for the few formats without a
signature. Concatenated files are split (`container`) and decoded one after the other. libsndfile
decodes files that it is known to read to the end: plain WAV, AIFF, FLAC, Ogg (Vorbis, Opus) and
MP3. All others go to FFmpeg's libraries, which continue after damaged packets. Some FFmpeg formats
(playlists) name other files to open, so only demuxers of a single audio file are allowed, and no
protocols.

Leaves out: video, and the choice among several audio tracks (FFmpeg's default is used).
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from audio import container

SAMPLE_RATE = 16_000  # samples per second of Whisper's input

_BLOCK = 2**18  # sample frames (one sample per channel) decoded at a time
_MAX_CHANNELS = 64
_RATES = (1_000, 768_000)  # hertz: lowest and highest sample rate of a file
# FFmpeg's demuxers that read audio from one file and open no other.
_DEMUXERS = (
    "aac,ac3,act,adx,aea,aiff,amr,amrnb,amrwb,apac,ape,asf,ast,au,avi,bfstm,brstm,caf,dsf,dss,dts,"
    "dtshd,eac3,flac,flv,g722,g729,gsm,hca,iff,ilbc,ircam,lc3,loas,matroska,mlp,mmf,mov,mp3,mpc,"
    "mpc8,mpeg,mpegts,mxf,nistsphere,nsv,nut,ogg,oma,osq,pvf,qcp,qoa,rm,rso,sbc,shn,siff,sox,spdif,"
    "swf,tak,truehd,tta,voc,vqf,w64,wav,wtv,wv,wve,xvag,xwma"
)

Block = tuple[np.ndarray, int]  # float32 samples of one channel, sample rate


class _NotPlain(Exception):
    """libsndfile might not read these bytes to the end."""


class _NoSound(ValueError):
    """FFmpeg does not recognize the format, or finds no audio track."""


class _TooLong(Exception):
    """The audio is longer than the limit."""


def load(
    source: str | Path | bytes, *, name: str | None = None, max_seconds: float | None = None
) -> np.ndarray:
    """Decode an audio file to 16 kHz mono.

    Args:
        source: a path, or the bytes of the file.
        name: a file name whose suffix hints at the format; None to use that of the path.
        max_seconds: audio that is longer raises an error before all of it is decoded; None for no
            limit.

    Returns:
        float32 [samples], mostly between -1 and 1; channels are averaged.

    Raises:
        FileNotFoundError: there is no file at the path.
        ValueError: the file is empty, of an unknown format, too damaged, without samples, or longer
            than `max_seconds`; or its format needs `pip install 'pellucid[audio]'`.
    """
    if isinstance(source, bytes):
        label, data = name or "sound", source
    else:
        label, data = str(source), Path(source).read_bytes()
    if not data:
        raise ValueError(f"{label}: the file is empty")
    suffix = Path(name if name is not None else label).suffix
    limit = float("inf") if max_seconds is None else max_seconds
    decoded: list[np.ndarray] = []
    parts: list[container.Part] = []
    try:
        parts = container.split_files(data) or [container.Part(data, True)]
        for part, is_certain in parts:
            remaining = limit - sum(map(len, decoded)) / SAMPLE_RATE
            try:
                decoded.append(_resample(_sndfile(part), remaining))
            except _NotPlain:
                try:
                    # The suffix is that of the first file; bytes after its end have no name.
                    hint = suffix if is_certain else ""
                    decoded.append(_resample(_ffmpeg(part, hint), remaining))
                except _NoSound:
                    if is_certain:
                        raise
    except _TooLong:
        raise ValueError(f"{label}: the audio is longer than {limit:g} seconds") from None
    except ImportError as error:
        raise ValueError(
            f"{label}: this format needs the package {error.name}: pip install 'pellucid[audio]'"
        ) from error
    except ValueError as error:
        prefix = f"part {len(decoded) + 1} of {len(parts)}: " if len(parts) > 1 else ""
        raise ValueError(f"{label}: {prefix}{error}") from error
    samples = np.concatenate([np.zeros(0, np.float32), *decoded])
    if not len(samples):
        raise ValueError(f"{label}: the file has no samples")
    if not np.isfinite(samples).all():
        raise ValueError(f"{label}: the file has samples that are not finite numbers")
    return samples


def _resample(blocks: Iterator[Block], max_seconds: float) -> np.ndarray:
    """Resample blocks of possibly different rates to `SAMPLE_RATE`; return float32 [samples].

    Raises:
        _TooLong: the blocks are longer than `max_seconds`.
    """
    resampled, seconds = [np.zeros(0, np.float32)], 0.0
    for rate, run in itertools.groupby(blocks, key=lambda block: block[1]):
        stream = None
        if rate != SAMPLE_RATE:
            import soxr

            stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        for samples, _ in run:
            seconds += len(samples) / rate
            if seconds > max_seconds:
                raise _TooLong
            # Block by block, because a whole file at a high rate might not fit into memory.
            resampled.append(samples if stream is None else stream.resample_chunk(samples))
        if stream is not None:
            resampled.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    return np.concatenate(resampled)


def _sndfile(part: bytes) -> Iterator[Block]:
    """Decode with libsndfile.

    Raises:
        _NotPlain: libsndfile might not read the file to the end, or fails.
    """
    import soundfile

    is_plain = {
        "wav": container.is_plain_wav,
        "ogg": container.is_plain_ogg,
        "": container.is_plain_mp3,
        "flac": bool,
        "aiff": bool,
    }.get(container.detect_format(part))
    if is_plain is None or not is_plain(part):
        raise _NotPlain
    try:
        with soundfile.SoundFile(io.BytesIO(part)) as file:
            _check(file.channels, file.samplerate)
            num_frames = 0
            while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
                num_frames += len(block)
                yield block.mean(axis=1), file.samplerate
            if num_frames == 0 or num_frames != file.frames:
                raise _NotPlain
    except soundfile.SoundFileError:
        raise _NotPlain from None


def _ffmpeg(part: bytes, suffix: str) -> Iterator[Block]:
    """Decode with FFmpeg, which continues after damaged packets.

    Raises:
        ImportError: the package av is not installed.
        ValueError: unknown format, no audio track, or more packets damaged than decoded.
    """
    import av

    file = io.BytesIO(part)
    file.name = f"sound{suffix}"  # a hint for FFmpeg's probe
    limits = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "none"}
    try:
        # "replace": a tag that is not UTF-8 must not make the file unreadable.
        media = av.open(file, options=limits, metadata_errors="replace")
    except (av.FFmpegError, ValueError):  # pyright: ignore[reportPrivateImportUsage]  # documented
        raise _NoSound(
            "the file has no known audio format, or is damaged at its start; flac, m4a, mp3, mp4, "
            "mpeg, mpga, ogg, opus, wav, webm and most other formats of FFmpeg can be read"
        ) from None
    with media:
        stream = media.streams.best("audio")
        if stream is None:
            raise _NoSound("the file has no audio track")
        if stream.codec_context is None:
            raise ValueError("the codec of its audio track is unknown")
        resamplers: dict[tuple, av.AudioResampler] = {}
        num_decoded = num_damaged = 0
        for packet in _packets(media, stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:  # pyright: ignore[reportPrivateImportUsage]  # documented name
                num_damaged += 1
                continue
            num_decoded += 1
            for frame in frames:
                layout = (frame.format.name, frame.layout.name, frame.rate)
                if layout not in resamplers:
                    _check(frame.layout.nb_channels, frame.rate)
                    # Interleaved ("flt"), because PyAV reads at most eight planes. The resampler
                    # keeps the channel layout and the sample rate.
                    resamplers[layout] = av.AudioResampler("flt")
                for resampled in resamplers[layout].resample(frame):
                    samples = resampled.to_ndarray().reshape(-1, resampled.layout.nb_channels)
                    yield samples.mean(axis=1), frame.rate
        if num_damaged > num_decoded:
            raise ValueError(
                f"{num_damaged} of its {num_damaged + num_decoded} packets are damaged"
            )


def _packets(media, stream) -> Iterator:
    """Yield the packets of a stream, up to its end or to where the file is truncated."""
    import av

    with contextlib.suppress(av.FFmpegError):  # pyright: ignore[reportPrivateImportUsage]
        yield from media.demux(stream)


def _check(channels: int, rate: int) -> None:
    if not 1 <= channels <= _MAX_CHANNELS:
        raise ValueError(f"the file has {channels} channels; at most {_MAX_CHANNELS} are supported")
    if not _RATES[0] <= rate <= _RATES[1]:
        raise ValueError(f"the sample rate must be {_RATES[0]} to {_RATES[1]} Hz, got {rate}")
