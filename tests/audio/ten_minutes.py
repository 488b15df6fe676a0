"""Ten minutes of audio with a known transcript: speech with pauses and background noise.

    python -m tests.audio.ten_minutes FILE.flac      writes the audio to a file, to listen to

The audio is assembled from recordings (`tests/golden/audio`) and sentences of
`tests/bench/passage.txt` in voices of espeak-ng, which reports when each word begins. Most pauses
last one or two seconds, every eighth pause 8 to 20 seconds. The background is silence, then white
noise, pink noise and mains hum, and half of the long pauses have loud noise. The result is
deterministic for one version of espeak-ng; the PyPI package espeakng-loader provides espeak-ng and
its voices.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import soxr

import audio
from audio.load import SAMPLE_RATE

GOLDEN = Path(__file__).parent.parent / "golden" / "audio"
PASSAGE = Path(__file__).parent.parent / "bench" / "passage.txt"
SECONDS = 600
VOICES = ("en-us", "en+f2", "en-us+m3", "en", "en-us+f4", "en-gb-x-rp")

AUSTEN = {
    "austen-0870": "And Mr. John Dashwood had then leisure to consider how much there might be "
    "prudently in his power to do for them.",
    "austen-0880": "He was not an ill-disposed young man.",
    "austen-0890": "Unless to be rather cold-hearted and rather selfish is to be ill-disposed.",
    "austen-0920": "Had he married a more amiable woman, he might have been made still more "
    "respectable than he was.",
    "austen-0930": "He might even have been made amiable himself.",
}
# Parts of sonnet-1.ogg between its pauses: start and end in seconds, and the words.
SONNET = (
    (2.67, 5.38, "From fairest creatures we desire increase,"),
    (5.89, 8.60, "That thereby beauty's rose might never die,"),
    (9.23, 14.32, "But as the riper should by time decease, His tender heir might bear his "
     "memory:"),
    (15.23, 22.43, "But thou contracted to thine own bright eyes, Feed'st thy light's flame with "
     "self-substantial fuel,"),
    (22.77, 25.45, "Making a famine where abundance lies,"),
    (25.69, 30.34, "Thy self thy foe, to thy sweet self too cruel:"),
    (31.21, 36.49, "Thou that art now the world's fresh ornament, And only herald to the gaudy "
     "spring,"),
    (36.98, 40.34, "Within thine own bud buriest thy content,"),
    (40.62, 43.62, "And tender churl mak'st waste in niggarding:"),
    (44.54, 47.99, "Pity the world, or else this glutton be,"),
    (48.53, 52.18, "To eat the world's due, by the grave and thee."),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """A part of the audio with speech and no pause. Times are in seconds."""

    text: str
    start: float
    end: float
    samples: np.ndarray
    is_read: bool = False  # read by a person, not synthesized
    word_starts: tuple[float, ...] = ()  # of all words of `text`, if known


def build() -> tuple[np.ndarray, list[Utterance]]:
    """Return the samples, float32 [600 * 16,000], and the utterances in order."""
    rng = np.random.default_rng(7)
    sound, truth, position = np.zeros(SECONDS * SAMPLE_RATE, np.float32), [], 1.0
    for number, utterance in enumerate(_alternate()):
        pause = rng.uniform(0.8, 2.2)
        if number % 8 == 7:
            pause = rng.uniform(8, 20)
            if number % 16 == 15:
                _loud_noise(sound, rng, position + 1, position + pause - 2)
        position += pause
        length = len(utterance.samples) / SAMPLE_RATE
        if position + length > SECONDS - 1:
            break
        loudness = 10 ** (rng.uniform(-28, -18) / 20)
        samples = utterance.samples * (loudness / np.sqrt(np.mean(utterance.samples**2)))
        begin = round(position * SAMPLE_RATE)
        sound[begin : begin + len(samples)] += samples
        starts = tuple(begin / SAMPLE_RATE + t for t in utterance.word_starts)
        truth.append(
            replace(
                utterance,
                start=begin / SAMPLE_RATE,
                end=begin / SAMPLE_RATE + length,
                word_starts=starts,
            )
        )
        position += length
    _background(sound, rng)
    return np.clip(sound, -1, 1), truth


def read_aloud() -> list[Utterance]:
    """Return the recordings of people, split at pauses."""
    utterances = []
    for name, text in AUSTEN.items():
        utterances.append(
            _utterance(text, _trim(audio.load(GOLDEN / f"{name}.flac")), is_read=True)
        )
    sonnet = audio.load(GOLDEN / "sonnet-1.ogg")
    for start, end, text in SONNET:
        samples = sonnet[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
        utterances.append(_utterance(text, samples, is_read=True))
    return utterances


def synthesized() -> Iterator[Utterance]:
    """Yield the sentences of the passage in alternating voices, endlessly."""
    text = " ".join(PASSAGE.read_text("utf-8").split())
    sentences = [s for s in re.split(r"(?<=[.])\s+", text) if 20 < len(s) < 160 and s[-1] == "."]
    number = 0
    while True:
        for sentence in sentences:
            yield speak(sentence, VOICES[number % len(VOICES)])
            number += 1


def _alternate() -> Iterator[Utterance]:
    """Yield two synthesized sentences, then one recording, repeatedly."""
    synthetic, recordings, number = synthesized(), read_aloud(), 0
    while True:
        yield next(synthetic)
        yield next(synthetic)
        yield recordings[number % len(recordings)]
        number += 1


def _utterance(text: str, samples: np.ndarray, **fields) -> Utterance:
    return Utterance(
        text=text, start=0.0, end=len(samples) / SAMPLE_RATE, samples=samples, **fields
    )


def _trim(samples: np.ndarray) -> np.ndarray:
    """Remove samples at both ends that are more than 35 dB below the loudest 10 ms."""
    step = SAMPLE_RATE // 100
    levels = np.sqrt(np.mean(samples[: len(samples) // step * step].reshape(-1, step) ** 2, axis=1))
    loud = np.flatnonzero(levels > levels.max() * 10 ** (-35 / 20))
    return samples[loud[0] * step : (loud[-1] + 1) * step]


# Noise


def white(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return white noise (equal power at every frequency), float32 [count] with RMS 1."""
    return rng.normal(size=count).astype(np.float32)


def pink(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return pink noise (power inversely proportional to frequency), as of rooms and engines."""
    spectrum = np.fft.rfft(rng.normal(size=count))
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1))
    noise = np.fft.irfft(spectrum, count)
    return (noise / noise.std()).astype(np.float32)


def hum(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return mains hum of 50 Hz with its harmonics."""
    t = np.arange(count) / SAMPLE_RATE
    noise = sum(np.sin(2 * np.pi * 50 * k * t + rng.uniform(0, 6)) / k for k in range(1, 12))
    return (noise / noise.std()).astype(np.float32)


def _background(sound: np.ndarray, rng: np.random.Generator) -> None:
    """Add white noise after two minutes of silence, then pink noise, then hum."""
    for start, end, kind, level in (
        (120, 270, white, -62),
        (270, 450, pink, -52),
        (450, SECONDS, hum, -50),
    ):
        samples = slice(start * SAMPLE_RATE, end * SAMPLE_RATE)
        sound[samples] += kind(rng, (end - start) * SAMPLE_RATE) * 10 ** (level / 20)


def _loud_noise(sound: np.ndarray, rng: np.random.Generator, start: float, end: float) -> None:
    first, last = round(start * SAMPLE_RATE), round(end * SAMPLE_RATE)
    sound[first:last] += pink(rng, last - first) * 10 ** (-30 / 20)


# espeak-ng


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)
_AT_ONCE, _UTF8, _BY_CHARACTER, _SPEED = 2, 1, 1, 1  # constants of speak_lib.h
_END, _WORD = 0, 1


@functools.cache
def _espeak() -> tuple[ctypes.CDLL, int]:
    """Load the library espeak-ng; return it and its sample rate in hertz."""
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(_AT_ONCE, 0, espeakng_loader.get_data_path().encode(), 0)
    if rate <= 0:
        raise OSError("espeak-ng finds no voices; reinstall the package espeakng-loader")
    return library, rate


def speak(text: str, voice: str, speed: int = 150) -> Utterance:
    """Synthesize a text with a voice of espeak-ng, with the start of each word.

    Raises:
        ImportError: the package espeakng-loader is not installed.
        ValueError: espeak-ng does not have the voice.
    """
    library, rate = _espeak()
    sound: list[np.ndarray] = []
    starts: dict[int, float] = {}  # by the position of the word in the text

    @_CALLBACK
    def receive(samples, count, events):
        if count > 0:
            sound.append(np.ctypeslib.as_array(samples, (count,)).copy())
        while events[0].type != _END:
            if events[0].type == _WORD:
                starts.setdefault(events[0].text_position - 1, events[0].milliseconds / 1000)
            events = ctypes.cast(ctypes.addressof(events[0]) + ctypes.sizeof(_Event), type(events))
        return 0

    library.espeak_SetSynthCallback(receive)
    if library.espeak_SetVoiceByName(voice.encode()):
        raise ValueError(f"voice must be one of espeak-ng's, got {voice!r}")
    library.espeak_SetParameter(_SPEED, speed, 0)
    data = text.encode()
    library.espeak_Synth(data, len(data) + 1, 0, _BY_CHARACTER, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    samples = np.concatenate(sound).astype(np.float32) / 32768
    samples = soxr.resample(samples, rate, SAMPLE_RATE).astype(np.float32)
    trimmed = _trim(samples)
    # Seconds trimmed from the start, which are subtracted from the starts of the words.
    cut = next(i for i in range(len(samples)) if samples[i : i + 800].tobytes()
               == trimmed[:800].tobytes()) / SAMPLE_RATE  # fmt: skip
    positions = [match.start() for match in re.finditer(r"\S+", text)]
    are_known = all(position in starts for position in positions)
    return _utterance(
        text,
        trimmed,
        word_starts=tuple(max(starts[p] - cut, 0.0) for p in positions) if are_known else (),
    )


if __name__ == "__main__":
    samples, truth = build()
    soundfile.write(sys.argv[1], samples, SAMPLE_RATE)
    for utterance in truth:
        print(f"{utterance.start:7.2f} {utterance.end:7.2f}  {utterance.text}")
