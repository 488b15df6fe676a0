"""Files in, samples out; whatever is not sound is a ValueError that says so."""

import io

import numpy as np
import pytest
import soundfile

from audio import load
from audio.load import RATE, sniff

TONE = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE).astype(np.float32) / 2


def encoded(samples: np.ndarray, rate: int = RATE, **how) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **how)
    return file.getvalue()


def in_container(format: str, codec: str, rate: int = 48_000) -> bytes:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        sound = np.sin(2 * np.pi * 440 * np.arange(rate) / rate) / 2
        frame = av.AudioFrame.from_ndarray(
            (sound * 32767).astype(np.int16)[None], format="s16", layout="mono"
        )
        frame.rate = rate
        for part in av.AudioResampler(stream.format, "mono", rate).resample(frame):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return file.getvalue()


def loudest(samples: np.ndarray) -> float:
    """The frequency with the most power, in hertz."""
    return float(np.abs(np.fft.rfft(samples)).argmax() * RATE / len(samples))


@pytest.mark.parametrize(
    "how",
    [
        dict(format="WAV", subtype="PCM_16"),
        dict(format="WAV", subtype="FLOAT"),
        dict(format="FLAC"),
        dict(format="OGG", subtype="VORBIS"),
        dict(format="OGG", subtype="OPUS"),
        dict(format="MP3"),
        dict(format="AIFF"),
    ],
    ids=lambda how: "-".join(how.values()),
)
def test_formats_of_libsndfile(how):
    samples = load(encoded(TONE, **how))
    assert samples.dtype == np.float32
    assert abs(len(samples) - RATE) < RATE / 8  # MP3 adds silence at both ends
    assert abs(loudest(samples) - 440) < 8


CONTAINERS = [
    ("mp4", "aac"),
    ("mp4", "libmp3lame"),
    ("mp4", "alac"),
    ("mp4", "libopus"),
    ("ipod", "aac"),  # .m4a
    ("mov", "pcm_s16le"),
    ("adts", "aac"),  # .aac
    ("webm", "libopus"),
    ("matroska", "libmp3lame"),
    ("mpeg", "mp2"),
    ("mp3", "libmp3lame"),  # .mpga
    ("ogg", "libopus"),  # .oga
]


@pytest.mark.parametrize(("format", "codec"), CONTAINERS, ids=lambda name: name)
def test_formats_of_ffmpeg(format, codec):
    samples = load(in_container(format, codec))
    assert abs(len(samples) - RATE) < RATE / 8
    assert abs(loudest(samples) - 440) < 8


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("format", "codec"), CONTAINERS, ids=lambda name: name)
def test_damaged_files_are_read_in_part_or_refused(format, codec):
    """Cut short, or with bytes overwritten: some sound or a ValueError, soon."""
    whole, rng = in_container(format, codec), np.random.default_rng(0)
    damaged = [whole[: len(whole) * part // 8] for part in range(1, 8)]
    for _ in range(8):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 20):
            data[place] = rng.integers(256)
        damaged.append(bytes(data))
    damaged.append(whole[:64] + bytes(10_000))
    damaged.append(whole[:64] + rng.bytes(10_000))
    for data in damaged:
        try:
            samples = load(data, max_seconds=60)
        except ValueError:
            continue
        assert samples.ndim == 1 and np.isfinite(samples).all()


def test_a_film_is_read_by_its_sound():
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        pictures = container.add_stream("mpeg4", rate=10)
        pictures.width = pictures.height = 16
        pictures.pix_fmt = "yuv420p"
        sound = container.add_stream("aac", rate=RATE, layout="mono")
        for _ in range(10):
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
            container.mux(pictures.encode(frame))
        frame = av.AudioFrame.from_ndarray(TONE[None], format="fltp", layout="mono")
        frame.rate = RATE
        container.mux([*sound.encode(frame), *sound.encode(None), *pictures.encode(None)])
    assert abs(loudest(load(file.getvalue())) - 440) < 8


def test_a_film_without_sound():
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        pictures = container.add_stream("mpeg4", rate=10)
        pictures.width = pictures.height = 16
        pictures.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        container.mux([*pictures.encode(frame), *pictures.encode(None)])
    with pytest.raises(ValueError, match="no sound track"):
        load(file.getvalue())


@pytest.mark.parametrize("rate", [1, 2**31 - 1])
def test_a_rate_that_cannot_be_meant(rate):
    """A file of a few bytes could say that it lasts for days, or ask for a huge filter."""
    data = bytearray(encoded(TONE, format="WAV"))
    data[24:28] = rate.to_bytes(4, "little")
    with pytest.raises(ValueError, match="samples a second"):
        load(bytes(data))


def test_a_header_that_promises_more_than_there_is():
    data = bytearray(encoded(TONE, format="WAV"))
    data[40:44] = (2**32 - 2).to_bytes(4, "little")
    assert len(load(bytes(data))) == RATE


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 192_000])
def test_any_rate(rate):
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)
    samples = load(encoded(tone, rate, format="WAV", subtype="FLOAT"))
    assert abs(len(samples) - RATE) <= 2
    assert abs(loudest(samples) - 440) < 2


def test_channels_are_averaged():
    channels = np.stack([TONE * i / 8 for i in range(8)], axis=1)
    samples = load(encoded(channels, format="WAV", subtype="FLOAT"))
    np.testing.assert_allclose(samples, TONE * 3.5 / 8, atol=1e-6)


def test_a_name_is_not_trusted(tmp_path):
    path = tmp_path / "speech.mp3"
    path.write_bytes(encoded(TONE, format="FLAC"))
    assert len(load(path)) == RATE


def test_one_sample():
    assert len(load(encoded(TONE[:1], format="WAV"))) == 1


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"Dear Sir or Madam", "not a sound file"),
        (b"#EXTM3U\n/etc/passwd\n", "not a sound file"),  # a playlist names other files
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a sound file"),
        (encoded(TONE[:0], format="WAV"), "no sound"),
        (encoded(TONE, format="FLAC")[:30], "damaged"),
        (b"\x00\x00\x00\x20ftypisom" + bytes(50), "damaged"),
        (b"\x1a\x45\xdf\xa3" + bytes(50), "damaged"),
        (encoded(np.full(100, np.nan, np.float32), format="WAV", subtype="FLOAT"), "not numbers"),
    ],
    ids=["empty", "text", "playlist", "image", "no-samples", "flac", "mp4", "webm", "nan"],
)
def test_what_is_not_sound(data, says):
    with pytest.raises(ValueError, match=says):
        load(data)


def test_too_long_is_refused_before_it_is_decoded_whole():
    hour = encoded(np.zeros(3600 * 1000, np.float32), 1000, format="FLAC")
    with pytest.raises(ValueError, match="longer than 60 seconds"):
        load(hour, max_seconds=60)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing.wav")


def test_sniff():
    assert sniff(b"RIFF\0\0\0\0AVI ") is None
    assert sniff(b"\xff\xfb\x90\x00") == "sndfile"  # MPEG layer III
    assert sniff(b"\xff\xf1\x50\x80") == "aac"
