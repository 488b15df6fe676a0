"""Transcription of audio of any length: window by window, or several windows in a batch.

Sequential (Radford et al. 2022, section 3.8): a window of 30 seconds is decoded, and the next one
begins at its last timestamp, so that no word is cut. The previous text can be the prompt of the
next window. Batched (`batch_size` above 1): the audio is split at pauses into independent regions,
and one window of each region is decoded in a batch, so that each decoding step reads the weights
once for all of them. Sequential decoding keeps names and style consistent; batched decoding is
faster, and an error does not propagate to the next window.

Both modes shorten pauses to three seconds before encoding (`skip_silence`), because during long
pauses the decoder hallucinates and its timestamps drift. Segments get back their times in the
original audio.

Leaves out: speaker diarization, and the reference implementation's heuristic that skips suspicious
words in long silences, because long silences are removed before decoding.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from audio import model, timing, vad
from audio.decode import (
    DecodingOptions,
    DecodingResult,
    TemperatureFallback,
    decode_with_fallback,
    detect_language,
)
from audio.load import SAMPLE_RATE, load
from audio.mel import FRAMES_PER_SECOND, log_mel
from audio.timing import Word
from audio.tokenizer import TIME_PRECISION, WhisperTokenizer
from audio.vad import Span
from audio.whisper import RunOnDevice, Whisper, run_inline

_MAX_SKIPPED_SPEECH = 1.5  # seconds; if more speech follows the last timestamp, continue there
_REGION_SECONDS = 150.0  # approximate length of a region in batched decoding
_REGION_SLACK = 5.0  # seconds by which a region can be longer, so that it ends in a pause
_MIN_PAUSE = 0.7  # seconds; segments are split at longer pauses
_FRAMES_PER_TIMESTAMP = round(TIME_PRECISION * FRAMES_PER_SECOND)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a transcript, about one sentence, with its times and scores."""

    start: float  # seconds
    end: float
    text: str  # with its leading space
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of each id
    seek: int  # first spectrogram frame of its window
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: tuple[Word, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """The text of one audio file, with its segments."""

    language: str  # a language code
    duration: float  # seconds of audio
    text: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True, kw_only=True)
class TranscriptionOptions:
    """Options of transcription beyond those of decoding one window (`DecodingOptions`).

    Attributes:
        condition_on_previous_text: use the previous text as the prompt of the next window (only
            with `batch_size` 1).
        initial_prompt: prompt of the first window; of every window if `batch_size` is above 1 or
            `condition_on_previous_text` is false.
        skip_silence: shorten long pauses before encoding.
        word_timestamps: find the start and end of every word.
        batch_size: windows decoded together; 1 decodes them one after the other.
        fallback: temperatures, and thresholds for decoding a window again.

    Raises:
        ValueError: `batch_size` is below 1.
    """

    condition_on_previous_text: bool = True
    initial_prompt: str = ""
    skip_silence: bool = True
    word_timestamps: bool = False
    batch_size: int = 1
    fallback: TemperatureFallback = TemperatureFallback()

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


_OPTIONS, _TRANSCRIPTION_OPTIONS = DecodingOptions(), TranscriptionOptions()


def transcribe(
    whisper: Whisper,
    source: str | Path | bytes | np.ndarray,
    *,
    language: str | None = None,
    options: DecodingOptions = _OPTIONS,
    transcription_options: TranscriptionOptions = _TRANSCRIPTION_OPTIONS,
    run: RunOnDevice = run_inline,
) -> Transcript:
    """Transcribe audio of any length, or translate it to English.

    Args:
        whisper: the model.
        source: a path, the bytes of a file, or float32 samples at 16 kHz.
        language: a language code or English name; None to detect it. `options.language` is ignored.
        options: options of decoding each window.
        transcription_options: options of splitting the audio into windows.
        run: calls the function that it is given (the encoder, or a step of the decoder), on the
            device thread or inline, and returns its result.

    Returns:
        The transcript; its times are in seconds.

    Raises:
        FileNotFoundError: there is no file at the path.
        ValueError: the file cannot be read, or the model does not support the language or task.
    """
    samples = source if isinstance(source, np.ndarray) else load(source)
    spans = find_speech(samples, transcription_options)
    language = find_language(whisper, samples, language, spans, run=run)
    options = replace(options, language=language)
    segments = tuple(
        generate_segments(
            whisper,
            samples,
            options=options,
            transcription_options=transcription_options,
            spans=spans,
            run=run,
        )
    )
    return Transcript(
        language=language,
        duration=len(samples) / SAMPLE_RATE,
        text="".join(segment.text for segment in segments).strip(),
        segments=segments,
    )


def find_speech(samples: np.ndarray, options: TranscriptionOptions) -> list[Span]:
    """Return the spans of speech if the options need them, or else one span of the whole audio.

    Args:
        samples: float32 [samples] at 16 kHz.
        options: speech detection runs if `skip_silence` is true or `batch_size` is above 1.
    """
    if options.skip_silence or options.batch_size > 1:
        return vad.speech_spans(samples)
    return [(0.0, len(samples) / SAMPLE_RATE)]


def find_language(
    whisper: Whisper,
    samples: np.ndarray,
    language: str | None,
    spans: Sequence[Span],
    *,
    run: RunOnDevice = run_inline,
) -> str:
    """Return the code of `language`; if None, detect it in 30 seconds from the first speech on.

    Args:
        whisper: the model.
        samples: float32 [samples] at 16 kHz.
        language: a language code or English name; None to detect it.
        spans: spans of speech; without any, the detected language is "en".
        run: calls the function that it is given (the encoder, or a step of the decoder), on the
            device thread or inline, and returns its result.

    Raises:
        ValueError: the model does not support the language.
    """
    if language is not None:
        return whisper.tokenizer.language_code(language)
    if not whisper.tokenizer.is_multilingual or not spans:
        return "en"
    begin = int(spans[0][0] * SAMPLE_RATE)
    window = log_mel(samples[begin : begin + 30 * SAMPLE_RATE], whisper.cfg.num_mels)
    probabilities = detect_language(whisper, _encode(whisper, [window], run), run=run)[0]
    return max(probabilities, key=lambda code: probabilities[code])


def generate_segments(
    whisper: Whisper,
    samples: np.ndarray,
    *,
    options: DecodingOptions,
    transcription_options: TranscriptionOptions,
    spans: Sequence[Span] | None = None,
    run: RunOnDevice = run_inline,
) -> Iterator[Segment]:
    """Transcribe audio, and yield each segment in order as soon as it is decoded.

    Args:
        whisper: the model.
        samples: float32 [samples] at 16 kHz.
        options: options of decoding each window, the language included.
        transcription_options: options of splitting the audio into windows.
        spans: spans of speech, from `find_speech`; None to find them.
        run: calls the function that it is given (the encoder, or a step of the decoder), on the
            device thread or inline, and returns its result.

    Raises:
        ValueError: the model does not support the language or task.
    """
    spans = find_speech(samples, transcription_options) if spans is None else spans
    spectrogram = log_mel(samples, whisper.cfg.num_mels)
    frames = np.arange(len(spectrogram))
    if transcription_options.skip_silence:
        # From here on, times are those of the shortened audio; `_restore_times` maps the times of
        # segments back.
        frames = vad.retained_frames(spans, len(spectrogram))
        spectrogram = spectrogram[frames]
    if not len(spectrogram):  # no speech
        return
    speech = vad.remap_spans(spans, frames)
    duration = len(spectrogram) / FRAMES_PER_SECOND
    bounds = [(0.0, duration)]
    batch_size = transcription_options.batch_size
    if batch_size > 1:
        # The number of regions is a multiple of the batch size, and their lengths are about equal,
        # so that the regions of a batch end together.
        share = duration / batch_size / math.ceil(duration / batch_size / _REGION_SECONDS)
        window = whisper.cfg.num_frames / FRAMES_PER_SECOND
        longest = max(share + _REGION_SLACK, window)
        bounds = vad.split_into_windows(spectrogram.mean(axis=1), speech, max_seconds=longest)
    initial_prompt = transcription_options.initial_prompt.strip()
    prompt = whisper.tokenizer.encode(" " + initial_prompt) if initial_prompt else ()
    regions = deque(
        _Region(round(start * FRAMES_PER_SECOND), round(end * FRAMES_PER_SECOND), prompt)
        for start, end in bounds
    )
    while regions:
        active = [region for region in regions if not region.is_done][:batch_size]
        _transcribe_windows(
            whisper, spectrogram, active, speech, options, transcription_options, run
        )
        while regions and (regions[0].segments or regions[0].is_done):  # in the order of the audio
            for segment in regions[0].segments:
                yield (
                    _restore_times(segment, frames, spans)
                    if transcription_options.skip_silence
                    else segment
                )
            regions[0].segments = []
            if not regions[0].is_done:
                break
            regions.popleft()


def _restore_times(segment: Segment, frames: np.ndarray, spans: Sequence[Span]) -> Segment:
    """Map the times of a segment back to the original audio, and move them out of pauses.

    Args:
        segment: a segment with times in the audio without long pauses.
        frames: int [T], the retained frames, from `vad.retained_frames`.
        spans: spans of speech in the original audio.
    """

    def restore(start: float, end: float) -> tuple[float, float]:
        first, last = (min(round(t * FRAMES_PER_SECOND), len(frames)) for t in (start, end))
        start = float(frames[min(first, len(frames) - 1)]) / FRAMES_PER_SECOND
        end = float(frames[max(last, 1) - 1] + 1) / FRAMES_PER_SECOND
        return vad.snap_to_speech(start, max(start, end), spans)

    words = tuple(
        replace(word, start=start, end=end)
        for word in segment.words
        for start, end in [restore(word.start, word.end)]
    )
    start, end = restore(segment.start, segment.end)
    seek = int(frames[segment.seek])
    return replace(segment, start=start, end=end, seek=seek, words=words)


@dataclass
class _Region:
    """The state of decoding a region of the spectrogram, window by window."""

    seek: int  # first frame of its next window
    end: int
    prompt: tuple[int, ...]  # token ids of the previous text, for the next window
    segments: list[Segment] = field(default_factory=list)  # decoded and not yielded yet
    last_end: float = 0.0  # seconds: end of the last word

    @property
    def is_done(self) -> bool:
        return self.seek >= self.end


def _transcribe_windows(
    whisper: Whisper,
    spectrogram: np.ndarray,
    regions: Sequence[_Region],
    spans: Sequence[Span],
    options: DecodingOptions,
    transcription_options: TranscriptionOptions,
    run: RunOnDevice,
) -> None:
    """Decode the next window of each region, and add its segments to the region."""
    if not regions:
        return
    tokenizer = whisper.tokenizer
    pauses = spans if transcription_options.batch_size > 1 else ()
    sizes = [
        window_length(region.seek, region.end, whisper.cfg.num_frames, pauses) for region in regions
    ]
    windows = [
        spectrogram[region.seek : region.seek + size]
        for region, size in zip(regions, sizes, strict=True)
    ]
    audio_features = _encode(whisper, windows, run)
    options = replace(options, prompt=regions[0].prompt)  # equal in all regions
    fallback = transcription_options.fallback
    results = decode_with_fallback(whisper, audio_features, options, fallback, run=run)
    speech = vad.merge_spans(spans, _MIN_PAUSE) if transcription_options.skip_silence else ()
    for i, (region, size, result) in enumerate(zip(regions, sizes, results, strict=True)):
        if fallback.is_silence(result):
            region.seek += size
            continue
        slices, step, is_open = next_window(
            split_at_timestamps(result, tokenizer),
            region.seek,
            size,
            spans if transcription_options.skip_silence else (),
            tokenizer,
        )
        segments = _segments(slices, result, region.seek, size, tokenizer)
        # A segment that contains a pause is split there, which needs the times of its words.
        with_words = transcription_options.word_timestamps
        if with_words or any(has_inner_pause(segment, speech) for segment in segments):
            segments = _add_word_timestamps(
                whisper,
                audio_features[i : i + 1],
                segments,
                size,
                options,
                with_words,
                region.last_end,
                run,
            )
            if words := [word for segment in segments for word in segment.words]:
                region.last_end = words[-1].end
                num_decoded = round(region.last_end * FRAMES_PER_SECOND) - region.seek
                step = num_decoded if is_open and num_decoded > 0 else step
            segments = [
                part for segment in segments for part in split_at_pauses(segment, speech, tokenizer)
            ]
            if not with_words:
                segments = [replace(segment, words=()) for segment in segments]
        segments = [s for s in segments if s.text.strip() and s.end > s.start]
        region.segments += segments
        region.seek += step
        if (
            transcription_options.condition_on_previous_text
            and transcription_options.batch_size == 1
        ):
            region.prompt = _next_prompt(region.prompt, segments, result, fallback)


def next_window(
    slices: list[TokenSlice],
    seek: int,
    size: int,
    spans: Sequence[Span],
    tokenizer: WhisperTokenizer,
) -> tuple[list[TokenSlice], int, bool]:
    """Select the token slices of a window to keep, and decide where the next window begins.

    If the last slice has no end timestamp, its sentence continues after the window: the slice is
    dropped and the next window begins at its start (unless it is the only slice). If the last slice
    has one, the next window begins at the end of this window, or at that timestamp if more than
    1.5 seconds of speech follow it.

    Args:
        slices: from `split_at_timestamps`.
        seek: first frame of the window.
        size: frames of the window.
        spans: spans of speech; empty if unknown.
        tokenizer: the model's tokenizer.

    Returns:
        The slices to keep, the frames to advance by, and whether the last slice has no end
        timestamp.
    """

    def end_frame(part: TokenSlice) -> int:  # relative to the window
        return (part[0][-1] - tokenizer.timestamp_begin) * _FRAMES_PER_TIMESTAMP

    if slices and _has_end_timestamp(slices[-1], tokenizer):
        last = end_frame(slices[-1])
        skips_speech = _speech_between(seek + last, seek + size, spans) > _MAX_SKIPPED_SPEECH
        return slices, last if skips_speech else size, False
    if len(slices) > 1:
        return slices[:-1], end_frame(slices[-2]), True
    return slices, size, True


def _next_prompt(
    prompt: tuple[int, ...],
    segments: Sequence[Segment],
    result: DecodingResult,
    fallback: TemperatureFallback,
) -> tuple[int, ...]:
    """Return the token ids of the previous text for the next window.

    They are empty if this window was decoded at a temperature above 0.5 or still needs a fallback.
    """
    if result.temperature > 0.5 or fallback.needs_fallback(result):
        return ()
    return (*prompt, *(id for segment in segments for id in segment.ids))


def window_length(seek: int, end: int, max_length: int, spans: Sequence[Span]) -> int:
    """Return the length in frames of the window that begins at `seek`.

    If the rest of the region is longer than `max_length`, the window ends at the last pause in its
    second half, or at `max_length` if there is none.

    Args:
        seek: first frame of the window.
        end: the frame at which the region ends.
        max_length: length of a full window, in frames.
        spans: spans of speech; the pauses are between them.
    """
    if end - seek <= max_length:
        return end - seek
    pauses = (round((a[1] + b[0]) / 2 * FRAMES_PER_SECOND) for a, b in itertools.pairwise(spans))
    lengths = [p - seek for p in pauses if max_length // 2 < p - seek <= max_length]
    return lengths[-1] if lengths else max_length


def has_inner_pause(segment: Segment, spans: Sequence[Span]) -> bool:
    """Return whether a segment contains a pause with speech on both sides of it.

    Args:
        segment: the segment.
        spans: spans of speech, on the same time axis as the segment.
    """
    start, end = vad.snap_to_speech(segment.start, segment.end, spans)
    return any(start < a[1] and b[0] < end for a, b in itertools.pairwise(spans))


def split_at_pauses(
    segment: Segment, spans: Sequence[Span], tokenizer: WhisperTokenizer
) -> list[Segment]:
    """Split a segment at pauses: each of its words belongs to the nearest span of speech.

    Args:
        segment: the segment; returned whole if it has no words.
        spans: spans of speech, on the same time axis as the segment.
        tokenizer: the model's tokenizer.
    """

    def nearest(word: Word) -> int:
        middle = (word.start + word.end) / 2
        return min(range(len(spans)), key=lambda i: max(spans[i][0] - middle, middle - spans[i][1]))

    if not spans or not segment.words:
        return [segment]
    groups = [list(words) for _, words in itertools.groupby(segment.words, nearest)]
    # The index of each group's first token among the ids; timestamps go with adjacent words.
    counts = itertools.accumulate(sum(len(word.ids) for word in words) for words in groups)
    text_indices = [i for i, id in enumerate(segment.ids) if id < tokenizer.eot]
    cuts = [0, *(text_indices[count] for count in itertools.islice(counts, len(groups) - 1)), None]
    segments = []
    for words, a, b in zip(groups, cuts, cuts[1:], strict=False):
        ids = segment.ids[a:b]
        start = segment.start if a == 0 else words[0].start
        end = segment.end if b is None else words[-1].end
        segments.append(
            replace(
                segment,
                start=start,
                end=end,
                text=tokenizer.decode(ids),
                ids=ids,
                logprobs=segment.logprobs[a:b],
                words=tuple(words),
            )
        )
    return segments


def _speech_between(start: int, end: int, spans: Sequence[Span]) -> float:
    """Return the seconds of speech between two frames."""
    first, last = start / FRAMES_PER_SECOND, end / FRAMES_PER_SECOND
    return sum(max(0.0, min(b, last) - max(a, first)) for a, b in spans)


def _encode(whisper: Whisper, windows: Sequence[np.ndarray], run: RunOnDevice) -> jax.Array:
    """Encode windows of a spectrogram [T, M]; return audio features [A, max_audio_len, D].

    `run` is called once for each window.
    """
    audio_features = []
    for window in windows:
        padded = np.zeros((1, whisper.cfg.num_frames, whisper.cfg.num_mels), np.float32)
        padded[0, : len(window)] = window[: whisper.cfg.num_frames]

        def encode_window(padded: np.ndarray = padded) -> jax.Array:
            return jax.block_until_ready(model.encode(whisper.params, whisper.cfg, padded)[0])

        audio_features.append(run(encode_window))
    return audio_features[0] if len(audio_features) == 1 else jnp.concatenate(audio_features)


# Token ids to segments

TokenSlice = tuple[tuple[int, ...], tuple[float, ...]]  # ids and their log-probabilities


def split_at_timestamps(result: DecodingResult, tokenizer: WhisperTokenizer) -> list[TokenSlice]:
    """Split the tokens of a window between adjacent timestamps, which end and begin a segment.

    Args:
        result: the decoded window.
        tokenizer: the model's tokenizer.

    Returns:
        For each segment its token ids, timestamps included, and their log-probabilities.
    """
    begin, ids = tokenizer.timestamp_begin, result.ids
    splits = [i for i in range(1, len(ids)) if ids[i - 1] >= begin and ids[i] >= begin]
    edges = [0, *splits, len(ids)]
    return [
        (ids[a:b], result.logprobs[a:b]) for a, b in zip(edges, edges[1:], strict=False) if a < b
    ]


def _has_end_timestamp(part: TokenSlice, tokenizer: WhisperTokenizer) -> bool:
    """Return whether a slice ends with a timestamp token that is not its start."""
    return len(part[0]) > 1 and part[0][-1] >= tokenizer.timestamp_begin


def _segments(
    slices: Sequence[TokenSlice],
    result: DecodingResult,
    seek: int,
    size: int,
    tokenizer: WhisperTokenizer,
) -> list[Segment]:
    """Convert the slices of a window to segments; the window has `size` frames from `seek` on."""
    begin, segments = tokenizer.timestamp_begin, []
    for ids, logprobs in slices:
        start, end = 0.0, size / FRAMES_PER_SECOND
        if ids[0] >= begin:
            start = (ids[0] - begin) * TIME_PRECISION
        if len(ids) > 1 and ids[-1] >= begin:
            end = (ids[-1] - begin) * TIME_PRECISION
        offset = seek / FRAMES_PER_SECOND
        segments.append(
            Segment(
                start=round(offset + start, 2),
                end=round(offset + end, 2),
                text=tokenizer.decode(ids),
                ids=ids,
                logprobs=logprobs,
                seek=seek,
                temperature=result.temperature,
                avg_logprob=result.avg_logprob,
                compression_ratio=result.compression_ratio,
                no_speech_prob=result.no_speech_prob,
            )
        )
    return segments


def _add_word_timestamps(
    whisper: Whisper,
    audio_features: jax.Array,
    segments: Sequence[Segment],
    size: int,
    options: DecodingOptions,
    with_probabilities: bool,
    last_end: float,
    run: RunOnDevice,
) -> list[Segment]:
    """Return the segments of a window with their words, and with times that match the words."""
    if not segments:
        return []
    tokenizer, offset = whisper.tokenizer, segments[0].seek / FRAMES_PER_SECOND
    texts = [[id for id in segment.ids if id < tokenizer.eot] for segment in segments]
    words = timing.align(
        whisper,
        audio_features,
        [id for text in texts for id in text],
        num_frames=size,
        language=options.language,
        task=options.task,
        with_probabilities=with_probabilities,
        run=run,
    )
    words = [
        replace(word, start=round(offset + word.start, 2), end=round(offset + word.end, 2))
        for word in words
    ]
    spans = [(segment.start, segment.end) for segment in segments]
    assigned = timing.assign_words(words, spans, [len(text) for text in texts], last_end=last_end)
    return [
        replace(segment, words=words, start=round(start, 2), end=round(end, 2))
        for segment, (words, (start, end)) in zip(segments, assigned, strict=True)
    ]
