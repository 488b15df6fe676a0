"""Sound from files: bytes of any common format to one channel of float32 at 16,000 Hz.

The bytes say what a file is; its name is a hint for the few formats that have no signature. Files
joined into one are split (`container`) and decoded one after the other. libsndfile decodes what it
is proven to read whole: plain WAV, AIFF, FLAC, Ogg (Vorbis, Opus) and MP3. Everything else goes to
FFmpeg's libraries, which go on behind damaged packets. Some formats that FFmpeg knows (playlists)
are texts that name other files to open: only demuxers of one file's sound are admitted, and no
protocol is.

Leaves out: video, and choosing among several sound tracks (FFmpeg's choice is taken).
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from audio import container

SAMPLE_RATE = 16_000  # samples a second, what Whisper listens to

_BLOCK = 2**18  # frames decoded at a time
_MAX_CHANNELS = 64
_RATES = (1_000, 768_000)  # samples a second that a file may have
# Of FFmpeg's demuxers, those that read sound from one file and open no other.
_DEMUXERS = (
    "aac,ac3,act,adx,aea,aiff,amr,amrnb,amrwb,apac,ape,asf,ast,au,avi,bfstm,brstm,caf,dsf,dss,dts,"
    "dtshd,eac3,flac,flv,g722,g729,gsm,hca,iff,ilbc,ircam,lc3,loas,matroska,mlp,mmf,mov,mp3,mpc,"
    "mpc8,mpeg,mpegts,mxf,nistsphere,nsv,nut,ogg,oma,osq,pvf,qcp,qoa,rm,rso,sbc,shn,siff,sox,spdif,"
    "swf,tak,truehd,tta,voc,vqf,w64,wav,wtv,wv,wve,xvag,xwma"
)

Block = tuple[np.ndarray, int]  # float32 samples of one channel, and how many a second


class _NotPlain(Exception):
    """libsndfile is not proven to read these bytes whole."""


class _NoSound(ValueError):
    """FFmpeg knows no format that begins so, or finds no sound in it."""


class _TooLong(Exception):
    """The sound lasts longer than it may."""


def load(
    source: str | Path | bytes, *, name: str | None = None, max_seconds: float | None = None
) -> np.ndarray:
    """Decode a sound file to 16 kHz mono.

    Args:
        source: a path, or the bytes of the file.
        name: the file's name, of which the suffix counts; None for that of the path.
        max_seconds: longer sounds are refused, before they fill the memory.

    Returns:
        float32 [samples], mostly between -1 and 1; channels are averaged.

    Raises:
        FileNotFoundError: nothing at the path.
        ValueError: the file is empty, of no known format, damaged beyond reading, without a sample,
            or longer than `max_seconds`; or its format needs the packages of the extra `audio`.
    """
    label, data = (name or "sound", source) if isinstance(source, bytes) else (str(source), None)
    if data is None:
        data = Path(source).read_bytes()
    if not data:
        raise ValueError(f"{label}: the file is empty")
    suffix = Path(name if name is not None else label).suffix
    limit = float("inf") if max_seconds is None else max_seconds
    decoded: list[np.ndarray] = []
    parts: list[container.Part] = []
    try:
        parts = container.split_files(data) or [container.Part(data, True)]
        for part, is_certain in parts:
            left = limit - sum(map(len, decoded)) / SAMPLE_RATE
            try:
                decoded.append(_resampled(_sndfile(part), left))
            except _NotPlain:
                try:
                    # What stands behind a file has no name.
                    hint = suffix if is_certain else ""
                    decoded.append(_resampled(_ffmpeg(part, hint), left))
                except _NoSound:
                    if is_certain:
                        raise
    except _TooLong:
        raise ValueError(f"{label}: longer than {limit:g} seconds") from None
    except ImportError as error:
        raise ValueError(
            f"{label}: this file needs the package {error.name}: pip install 'pellucid[audio]'"
        ) from error
    except ValueError as error:
        which = f"part {len(decoded) + 1} of {len(parts)}: " if len(parts) > 1 else ""
        raise ValueError(f"{label}: {which}{error}") from error
    samples = np.concatenate([np.zeros(0, np.float32), *decoded])
    if not len(samples):
        raise ValueError(f"{label}: holds no sound")
    if not np.isfinite(samples).all():
        raise ValueError(f"{label}: holds samples that are not numbers")
    return samples


def _resampled(blocks: Iterator[Block], max_seconds: float) -> np.ndarray:
    """All blocks at `RATE`, float32 [samples]; each has its own rate.

    Raises:
        _TooLong: they last longer than `max_seconds`.
    """
    done, seconds = [np.zeros(0, np.float32)], 0.0
    for rate, run in itertools.groupby(blocks, key=lambda block: block[1]):
        stream = None
        if rate != SAMPLE_RATE:
            import soxr

            stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        for samples, _ in run:
            seconds += len(samples) / rate
            if seconds > max_seconds:
                raise _TooLong
            # Block by block: at a high rate the whole would fill the memory.
            done.append(samples if stream is None else stream.resample_chunk(samples))
        if stream is not None:
            done.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    return np.concatenate(done)


def _sndfile(part: bytes) -> Iterator[Block]:
    """Decode with libsndfile.

    Raises:
        _NotPlain: the structure is not one of those that it reads whole, or it fails.
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
    """Decode with FFmpeg, behind damaged packets too.

    Raises:
        ImportError: the package av is not installed.
        ValueError: no known format, no sound track, or more packets damaged than read.
    """
    import av

    file = io.BytesIO(part)
    file.name = f"sound{suffix}"  # a hint for FFmpeg's probe
    limits = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "none"}
    try:
        # Tags in an old encoding are no reason to refuse the sound.
        media = av.open(file, options=limits, metadata_errors="replace")
    except (av.FFmpegError, ValueError):
        raise _NoSound(
            "not a sound file of a known format, or damaged at its start; flac, m4a, mp3, mp4, "
            "mpeg, mpga, ogg, opus, wav, webm and most others that FFmpeg reads are known"
        ) from None
    with media:
        stream = media.streams.best("audio")
        if stream is None:
            raise _NoSound("it has no sound track")
        if stream.codec_context is None:
            raise ValueError("its sound track is of no known codec")
        to_float: dict[tuple, av.AudioResampler] = {}
        num_read = num_damaged = 0
        for packet in _packets(media, stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                num_damaged += 1
                continue
            num_read += 1
            for frame in frames:
                form = (frame.format.name, frame.layout.name, frame.rate)
                if form not in to_float:
                    _check(frame.layout.nb_channels, frame.rate)
                    # Layout and rate stay. Interleaved: PyAV reads no more than eight planes.
                    to_float[form] = av.AudioResampler("flt")
                for wide in to_float[form].resample(frame):
                    samples = wide.to_ndarray().reshape(-1, wide.layout.nb_channels)
                    yield samples.mean(axis=1), frame.rate
        if num_damaged > num_read:
            raise ValueError(f"damaged: {num_damaged} of {num_damaged + num_read} packets")


def _packets(media, stream) -> Iterator:
    """The packets of a stream, up to the end or to where the file is cut."""
    import av

    packets = media.demux(stream)
    while True:
        try:
            yield next(packets)
        except (StopIteration, av.FFmpegError):
            return


def _check(channels: int, rate: int) -> None:
    if not 1 <= channels <= _MAX_CHANNELS:
        raise ValueError(f"{channels} channels, at most {_MAX_CHANNELS} can be read")
    if not _RATES[0] <= rate <= _RATES[1]:
        raise ValueError(
            f"{rate} samples a second, only from {_RATES[0]} to {_RATES[1]} can be read"
        )
