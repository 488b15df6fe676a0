"""Sounds of any length: window after window, or several windows at once.

In turn (Radford et al. 2022, section 3.8): a window of 30 seconds is written down; the next begins
at the last point in time that was written, so that no word is cut; what was said before may be
given to the decoder as context. At once: the sound is cut into regions at pauses, independent of
each other; a window of each shares the steps of the decoder, whose weights are then read once for
all of them. The first way keeps names and style consistent, and its text arrives in order as
windows are finished; the second is quicker, and an error does not carry over.

Either way a long pause is shortened to three seconds before anybody listens (`skip_silence`): in it
the decoder loses its sense of time, or starts to invent. Times are set right afterwards.

Leaves out: telling speakers apart, and the reference's heuristic for skipping suspicious words in
long silences, of which there are none.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
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

_MAX_SKIPPED_SPEECH = 1.5  # seconds of speech that a window must not leave unwritten
_REGION_SECONDS = (
    150.0  # seconds, about as long as what is gone through in turn beside other regions
)
_REGION_SLACK = 5.0  # seconds by which a region may be longer, to end in a pause
_MIN_PAUSE = 0.7  # seconds of pause that no segment lies across
_FRAMES_PER_TIMESTAMP = round(
    TIME_PRECISION * FRAMES_PER_SECOND
)  # frames between two points in time


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of speech, about a sentence."""

    start: float  # seconds
    end: float
    text: str  # with the space before it
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of each id
    seek: int  # the frame its window began at
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: tuple[Word, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """All that was heard in a sound."""

    language: str  # its code
    duration: float  # seconds
    text: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True, kw_only=True)
class TranscriptionOptions:
    """How a sound is gone through.

    Attributes:
        condition: give what was written before to the next window (with `batch` 1).
        initial_prompt: text given to the first window (with `batch`, to every window).
        skip_silence: leave out what no speech is near to.
        words: find the time of every word.
        batch: windows decoded at once; 1 goes through the sound in turn.
        fallback: when a window is tried again.
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
    sound: str | Path | bytes | np.ndarray,
    *,
    language: str | None = None,
    options: DecodingOptions = _OPTIONS,
    transcription_options: TranscriptionOptions = _TRANSCRIPTION_OPTIONS,
    run: RunOnDevice = run_inline,
) -> Transcript:
    """Writes down what is said in a sound.

    Args:
        sound: a file, its bytes, or samples at 16 kHz.
        language: a code or name; None to detect it. (`options.language` is not looked at.)
        options: how each window is decoded.
        run: does the pieces of device work.

    Raises:
        ValueError: the file cannot be read, or the model does not know the language or task.
    """
    samples = sound if isinstance(sound, np.ndarray) else load(sound)
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


def find_speech(samples: np.ndarray, plan: TranscriptionOptions) -> list[Span]:
    """Where anybody speaks, if the plan asks; else the whole sound."""
    if plan.skip_silence or plan.batch_size > 1:
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
    """The code of the given language, or of the one heard where speech begins.

    Raises:
        ValueError: the model does not know the language.
    """
    if language is not None:
        return whisper.tokenizer.language_code(language)
    if not whisper.tokenizer.is_multilingual or not spans:
        return "en"
    begin = int(spans[0][0] * SAMPLE_RATE)
    window = log_mel(samples[begin : begin + 30 * SAMPLE_RATE], whisper.cfg.num_mels)
    shares = detect_language(whisper, _encode(whisper, [window], run), run=run)[0]
    return max(shares, key=lambda code: shares[code])


def generate_segments(
    whisper: Whisper,
    samples: np.ndarray,
    *,
    options: DecodingOptions,
    transcription_options: TranscriptionOptions,
    spans: Sequence[Span] | None = None,
    run: RunOnDevice = run_inline,
) -> Iterator[Segment]:
    """Yields segments as soon as they are written; arguments as of `transcribe`."""
    spans = find_speech(samples, transcription_options) if spans is None else spans
    spectrogram = log_mel(samples, whisper.cfg.num_mels)
    kept = np.arange(len(spectrogram))
    if transcription_options.skip_silence:
        # From here on time stands still in long pauses, until `_in_place` sets a segment right.
        kept = vad.retained_frames(spans, len(spectrogram))
        spectrogram = spectrogram[kept]
    if not len(spectrogram):  # nobody speaks
        return
    heard = vad.remap_spans(spans, kept)
    whole = len(spectrogram) / FRAMES_PER_SECOND
    regions = [(0.0, whole)]
    if transcription_options.batch_size > 1:
        # A multiple of the batch, of about the same length, so that they come to an end together.
        share = (
            whole
            / transcription_options.batch_size
            / math.ceil(whole / transcription_options.batch_size / _REGION_SECONDS)
        )
        window = whisper.cfg.num_frames / FRAMES_PER_SECOND
        longest = max(share + _REGION_SLACK, window)
        regions = vad.split_into_windows(spectrogram.mean(axis=1), heard, max_seconds=longest)
    prompt = transcription_options.initial_prompt.strip()
    before = whisper.tokenizer.encode(" " + prompt) if prompt else ()
    regions = [tuple(round(t * FRAMES_PER_SECOND) for t in region) for region in regions]
    jobs = deque(_Region(start, end, before) for start, end in regions)
    while jobs:
        active = [job for job in jobs if not job.is_done][: transcription_options.batch_size]
        _transcribe_windows(
            whisper, spectrogram, active, heard, options, transcription_options, run
        )
        while jobs and (jobs[0].segments or jobs[0].is_done):  # in the order of the sound
            for segment in jobs[0].segments:
                yield (
                    _restore_times(segment, kept, spans)
                    if transcription_options.skip_silence
                    else segment
                )
            jobs[0].segments = []
            if not jobs[0].is_done:
                break
            jobs.popleft()


def _restore_times(segment: Segment, kept: np.ndarray, spans: Sequence[Span]) -> Segment:
    """A segment with its times in the whole sound, none of them in the midst of a pause."""

    def placed(start: float, end: float) -> tuple[float, float]:
        first, last = (min(round(t * FRAMES_PER_SECOND), len(kept)) for t in (start, end))
        start = float(kept[min(first, len(kept) - 1)]) / FRAMES_PER_SECOND
        end = float(kept[max(last, 1) - 1] + 1) / FRAMES_PER_SECOND
        return vad.snap_to_speech(start, max(start, end), spans)

    words = tuple(
        replace(word, start=start, end=end)
        for word in segment.words
        for start, end in [placed(word.start, word.end)]
    )
    start, end = placed(segment.start, segment.end)
    seek = int(kept[segment.seek])
    return replace(segment, start=start, end=end, seek=seek, words=words)


@dataclass
class _Region:
    """A region of the spectrogram that is written down window after window."""

    seek: int  # frames: where its next window begins
    end: int
    prompt: tuple[int, ...]  # what the next window is told was said before
    segments: list[Segment] = field(default_factory=list)  # written and not handed out yet
    last_end: float = 0.0  # seconds: when the last word ended

    @property
    def is_done(self) -> bool:
        return self.seek >= self.end


def _transcribe_windows(
    whisper: Whisper,
    spectrogram: np.ndarray,
    jobs: Sequence[_Region],
    spans: Sequence[Span],
    options: DecodingOptions,
    plan: TranscriptionOptions,
    run: RunOnDevice,
) -> None:
    """Writes down a window of each job."""
    if not jobs:
        return
    tokens = whisper.tokenizer
    pauses = spans if plan.batch_size > 1 else ()
    sizes = [window_length(job.seek, job.end, whisper.cfg.num_frames, pauses) for job in jobs]
    sounds = _encode(
        whisper,
        [spectrogram[job.seek : job.seek + size] for job, size in zip(jobs, sizes, strict=True)],
        run,
    )
    options = replace(options, prompt=jobs[0].prompt)  # they differ only where there is one job
    results = decode_with_fallback(whisper, sounds, options, plan.fallback, run=run)
    speech = vad.merge_spans(spans, _MIN_PAUSE) if plan.skip_silence else ()
    for i, (job, size, result) in enumerate(zip(jobs, sizes, results, strict=True)):
        if plan.fallback.is_silence(result):
            job.seek += size
            continue
        parts, step, is_open = next_window(
            split_at_timestamps(result, tokens),
            job.seek,
            size,
            spans if plan.skip_silence else (),
            tokens,
        )
        segments = _segments(parts, result, job.seek, size, tokens)
        # A segment that lies across a pause is cut there, for which its words must be found.
        if plan.word_timestamps or any(has_inner_pause(segment, speech) for segment in segments):
            segments = _add_word_timestamps(
                whisper,
                sounds[i : i + 1],
                segments,
                size,
                options,
                plan.word_timestamps,
                job.last_end,
                run,
            )
            if words := [word for segment in segments for word in segment.words]:
                job.last_end = words[-1].end
                heard = round(job.last_end * FRAMES_PER_SECOND) - job.seek
                step = heard if is_open and heard > 0 else step
            segments = [
                part for segment in segments for part in split_at_pauses(segment, speech, tokens)
            ]
            if not plan.word_timestamps:
                segments = [replace(segment, words=()) for segment in segments]
        segments = [s for s in segments if s.text.strip() and s.end > s.start]
        job.segments += segments
        job.seek += step
        if plan.condition_on_previous_text and plan.batch_size == 1:
            job.prompt = _next_prompt(job.prompt, segments, result, plan.fallback)


def next_window(
    parts: list[TokenSlice], seek: int, size: int, spans: Sequence[Span], tokens: WhisperTokenizer
) -> tuple[list[TokenSlice], int, bool]:
    """Decide which parts of a window stay, and where the next window begins.

    A last part without an end goes on behind the window, so that the next window begins with it. An
    end says that nothing follows; where somebody seems to speak, the rest is read again.

    Args:
        parts: from `cut`, of the window that begins at frame `seek` and has `size` frames.
        spans: of speech, if they are known.

    Returns:
        The parts, the frames to go on by, and whether the last part had no end.
    """

    def end(part: TokenSlice) -> int:  # in frames of the window
        return (part[0][-1] - tokens.timestamp_begin) * _FRAMES_PER_TIMESTAMP

    if parts and _has_end_timestamp(parts[-1], tokens):
        last = end(parts[-1])
        is_passed_over = _speech_between(seek + last, seek + size, spans) > _MAX_SKIPPED_SPEECH
        return parts, last if is_passed_over else size, False
    if len(parts) > 1:
        return parts[:-1], end(parts[-2]), True
    return parts, size, True


def _next_prompt(
    before: tuple[int, ...],
    segments: Sequence[Segment],
    result: DecodingResult,
    fallback: TemperatureFallback,
) -> tuple[int, ...]:
    """What the next window is told was said before.

    A text with much chance in it, or one that looks wrong, is no good context.
    """
    if result.temperature > 0.5 or fallback.needs_fallback(result):
        return ()
    return (*before, *(id for segment in segments for id in segment.ids))


def window_length(seek: int, end: int, most: int, spans: Sequence[Span]) -> int:
    """Return the length of the window that begins at `seek`, in frames.

    Args:
        seek, end: where the rest of the region begins and ends, in frames.
        most: the length of a whole window, in frames.
        spans: of speech. A window that is not the last of its region ends in the last pause
            between two of them that is more than half a window away.
    """
    if end - seek <= most:
        return end - seek
    pauses = (round((a[1] + b[0]) / 2 * FRAMES_PER_SECOND) for a, b in itertools.pairwise(spans))
    fitting = [p - seek for p in pauses if most // 2 < p - seek <= most]
    return fitting[-1] if fitting else most


def has_inner_pause(segment: Segment, spans: Sequence[Span]) -> bool:
    """Whether a segment takes in a pause and speech on both sides of it."""
    start, end = vad.snap_to_speech(segment.start, segment.end, spans)
    return any(start < a[1] and b[0] < end for a, b in itertools.pairwise(spans))


def split_at_pauses(
    segment: Segment, spans: Sequence[Span], tokens: WhisperTokenizer
) -> list[Segment]:
    """A segment cut at pauses: each of its words goes with the span that is nearest to it."""

    def nearest(word: Word) -> int:
        middle = (word.start + word.end) / 2
        return min(range(len(spans)), key=lambda i: max(spans[i][0] - middle, middle - spans[i][1]))

    if not spans or not segment.words:
        return [segment]
    groups = [list(words) for _, words in itertools.groupby(segment.words, nearest)]
    # Where each part's words begin among the ids; a point in time goes with the words beside it.
    counts = itertools.accumulate(sum(len(word.ids) for word in words) for words in groups)
    texts = [i for i, id in enumerate(segment.ids) if id < tokens.eot]
    cuts = [0, *(texts[count] for count in itertools.islice(counts, len(groups) - 1)), None]
    parts = []
    for words, a, b in zip(groups, cuts, cuts[1:], strict=False):
        ids = segment.ids[a:b]
        start = segment.start if a == 0 else words[0].start
        end = segment.end if b is None else words[-1].end
        parts.append(
            replace(
                segment,
                start=start,
                end=end,
                text=tokens.decode(ids),
                ids=ids,
                logprobs=segment.logprobs[a:b],
                words=tuple(words),
            )
        )
    return parts


def _speech_between(start: int, end: int, spans: Sequence[Span]) -> float:
    """Seconds of speech between two frames."""
    start, end = start / FRAMES_PER_SECOND, end / FRAMES_PER_SECOND
    return sum(max(0.0, min(b, end) - max(a, start)) for a, b in spans)


def _encode(whisper: Whisper, windows: Sequence[np.ndarray], run: RunOnDevice) -> jax.Array:
    """Encodes windows of spectrogram [T, M], each its own piece of work; [A, max_audio_len, D]."""
    sounds = []
    for window in windows:
        padded = np.zeros((1, whisper.cfg.num_frames, whisper.cfg.num_mels), np.float32)
        padded[0, : len(window)] = window[: whisper.cfg.num_frames]

        def read(padded: np.ndarray = padded) -> jax.Array:
            return jax.block_until_ready(model.encode(whisper.params, whisper.cfg, padded)[0])

        sounds.append(run(read))
    return sounds[0] if len(sounds) == 1 else jax.numpy.concatenate(sounds)


# From ids to segments

TokenSlice = tuple[tuple[int, ...], tuple[float, ...]]  # ids and their log-probabilities


def split_at_timestamps(result: DecodingResult, tokens: WhisperTokenizer) -> list[TokenSlice]:
    """Cuts what was written between two points in time that stand side by side."""
    begin, ids = tokens.timestamp_begin, result.ids
    places = [i for i in range(1, len(ids)) if ids[i - 1] >= begin and ids[i] >= begin]
    edges = [0, *places, len(ids)]
    return [
        (ids[a:b], result.logprobs[a:b]) for a, b in zip(edges, edges[1:], strict=False) if a < b
    ]


def _has_end_timestamp(part: TokenSlice, tokens: WhisperTokenizer) -> bool:
    """Whether a part ends with a point in time."""
    return len(part[0]) > 1 and part[0][-1] >= tokens.timestamp_begin


def _segments(
    parts: Sequence[TokenSlice],
    result: DecodingResult,
    seek: int,
    size: int,
    tokens: WhisperTokenizer,
) -> list[Segment]:
    """Segments of the parts of a window that begins at frame `seek` and has `size` of them."""
    begin, segments = tokens.timestamp_begin, []
    for ids, logprobs in parts:
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
                text=tokens.decode(ids),
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
    sound: jax.Array,
    segments: Sequence[Segment],
    size: int,
    options: DecodingOptions,
    scored: bool,
    last_end: float,
    run: RunOnDevice,
) -> list[Segment]:
    """The segments of a window with the times of their words, and their own made to agree."""
    if not segments:
        return []
    tokens, offset = whisper.tokenizer, segments[0].seek / FRAMES_PER_SECOND
    texts = [[id for id in segment.ids if id < tokens.eot] for segment in segments]
    words = timing.align(
        whisper,
        sound,
        [id for text in texts for id in text],
        num_frames=size,
        language=options.language,
        task=options.task,
        with_probabilities=scored,
        run=run,
    )
    words = [
        replace(word, start=round(offset + word.start, 2), end=round(offset + word.end, 2))
        for word in words
    ]
    spans = [(segment.start, segment.end) for segment in segments]
    placed = timing.assign_words(words, spans, [len(text) for text in texts], last_end=last_end)
    return [
        replace(segment, words=own, start=round(start, 2), end=round(end, 2))
        for segment, (own, (start, end)) in zip(segments, placed, strict=True)
    ]
