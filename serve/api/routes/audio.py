"""POST /v1/audio/transcriptions and /v1/audio/translations: speech to text.

The body is a form with an audio file of at most 25 MB. Its format is detected from its bytes, or
else from its suffix. At temperature 0, the default, decoding is greedy and falls back to higher
temperatures when the text is repetitive or improbable. Only windows with speech are decoded, so
silence and noise produce no text.

``stream`` sends a ``transcript.text.delta`` event for each segment and ``transcript.text.done`` at
the end. Streamed audio is decoded sequentially. Without streaming, audio of over a minute is
decoded four windows at a time, so a few words may differ. OpenAI ignores ``stream`` for whisper-1;
here it works for every model. ``keywords`` are words that are likely to occur in the audio.
Speakers are not distinguished: ``diarized_json`` is refused.
"""

import asyncio
import math
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

import audio
from audio import subtitles
from audio.load import SAMPLE_RATE
from audio.tokenizer import TIME_PRECISION
from audio.transcribe import Segment, Transcript
from serve.api.errors import APIError, unsupported
from serve.api.multipart import File, read_all, read_form, temporary_file
from serve.api.openapi import route_docs
from serve.api.request_context import context_of
from serve.api.requests import Body, tag
from serve.api.responses import ResponseModel
from serve.api.sse import Event, cancel_on_disconnect, event_stream
from serve.api.state import get_loaded_model
from serve.api.unused_fields import UNUSED
from serve.models.speech import SpeechModel

router = APIRouter(prefix="/v1/audio")

MAX_BYTES = 25 * 2**20  # of an audio file
BODY_LIMITS = {  # bytes of a body by path: the file and the rest of the form
    f"/v1/audio/{route}": MAX_BYTES + 2**20 for route in ("transcriptions", "translations")
}
MAX_SECONDS = 2 * 3600.0  # of audio: a small file can hold days of silence
BATCH_SIZE = 4  # windows of long audio decoded at a time
LONG_SECONDS = 60.0  # longer audio is decoded in batches

_FORMATS = "['flac', 'm4a', 'mp3', 'mp4', 'mpeg', 'mpga', 'oga', 'ogg', 'wav', 'webm']"


class ChunkingStrategy(Body):
    """OpenAI's settings for splitting audio. They have no effect, because Pellucid has its own."""

    type: Literal["server_vad"]
    prefix_padding_ms: int | None = None
    silence_duration_ms: int | None = None
    threshold: float | None = None


Chunking = Annotated[
    Annotated[Literal["auto"], Tag("a string")] | Annotated[ChunkingStrategy, Tag("an object")],
    Discriminator(tag),
]


class SpeechForm(Body):
    """Form of POST /v1/audio/transcriptions and /v1/audio/translations."""

    file: File
    model: str
    prompt: str = ""
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt", "diarized_json"] = "json"
    temperature: Annotated[float, Field(ge=0, le=1)] = 0.0
    language: str | None = None
    timestamp_granularities: list[Literal["word", "segment"]] = ["segment"]
    include: list[Literal["logprobs"]] = []
    keywords: list[str] = []
    stream: bool = False
    languages: Annotated[list[str], UNUSED] = []
    chunking_strategy: Annotated[Chunking | None, UNUSED] = None
    user: Annotated[str | None, UNUSED] = None


class Logprob(ResponseModel):
    """A token of the transcript with its logprob and bytes."""

    token: str
    logprob: float
    bytes: list[int]


class SpeechUsage(ResponseModel):
    """The duration of the audio, rounded up to seconds."""

    type: Literal["duration"]
    seconds: int


class InputTokenDetails(ResponseModel):
    """The input tokens of a transcription, split into prompt text and audio."""

    audio_tokens: int
    text_tokens: int


class TokenUsage(ResponseModel):
    """Token counts of a transcription."""

    type: Literal["tokens"]
    input_tokens: int
    input_token_details: InputTokenDetails
    output_tokens: int
    total_tokens: int


class Transcription(ResponseModel):
    """The response for `response_format` "json"."""

    text: str
    logprobs: list[Logprob] | None = None
    usage: SpeechUsage


class SpeechSegment(ResponseModel):
    """A segment of a transcript: a phrase with its start and end in seconds."""

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


class SpeechWord(ResponseModel):
    """A word of a transcript with its start and end in seconds."""

    word: str
    start: float
    end: float


class VerboseTranscription(ResponseModel):
    """The response for `response_format` "verbose_json"."""

    task: Literal["transcribe", "translate"]
    language: str
    duration: float
    text: str
    segments: list[SpeechSegment] | None = None
    words: list[SpeechWord] | None = None
    usage: SpeechUsage


class SpeechEvent(ResponseModel):
    """A `transcript.text.delta` with `delta`, or a `transcript.text.done` with `text`, `usage`."""

    type: Literal["transcript.text.delta", "transcript.text.done"]
    delta: str | None = None
    text: str | None = None
    logprobs: list[Logprob] | None = None
    usage: TokenUsage | None = None


def _speech_route_docs(*, events: type[ResponseModel] | None = None) -> dict[str, Any]:
    """Return the `route_docs` of a route that takes a form and returns JSON, verbose JSON or text.

    Args:
        events: Model of each server-sent event, if the route can stream.
    """
    arguments = route_docs(Transcription, form=SpeechForm, events=events)
    content = arguments["responses"][200]["content"]
    brief = content["application/json"]["schema"]
    verbose = route_docs(VerboseTranscription)["responses"][200]["content"]["application/json"]
    content["application/json"] = {"schema": {"anyOf": [brief, verbose["schema"]]}}
    content["text/plain"] = {"schema": {"type": "string"}}
    return arguments


@router.post("/transcriptions", **_speech_route_docs(events=SpeechEvent))
async def create_transcription(request: Request) -> Response:
    """Transcribe speech in an audio file."""
    return await _respond(request, "transcribe")


@router.post("/translations", **_speech_route_docs(events=SpeechEvent))
async def create_translation(request: Request) -> Response:
    """Translate speech in an audio file to English text."""
    return await _respond(request, "translate")


async def _respond(request: Request, task: Literal["transcribe", "translate"]) -> Response:
    with temporary_file() as sink:
        body = await read_form(request, SpeechForm, {"file": sink}, MAX_BYTES)
        data = await read_all(sink)
    model = await get_loaded_model(request, body.model, SpeechModel)
    _check(body, model, task)
    context_of(request.scope).model = model.id
    samples = await asyncio.to_thread(_decode_audio, data, body.file.filename)
    is_long = len(samples) > LONG_SECONDS * SAMPLE_RATE
    transcription_options = audio.TranscriptionOptions(
        # One window at a time when streaming: in a batch, the text of all windows except the first
        # would arrive at the end.
        batch_size=BATCH_SIZE if is_long and not body.stream else 1,
        condition_on_previous_text=not is_long,
        initial_prompt=body.prompt,
        word_timestamps="word" in body.timestamp_granularities,
        fallback=audio.TemperatureFallback(temperatures=(body.temperature,))
        if body.temperature
        else audio.TemperatureFallback(),
    )
    decoding_options = audio.DecodingOptions(task=task, hotwords=", ".join(body.keywords))
    transcriber = _Transcriber(
        model, samples, body.language, decoding_options, transcription_options
    )
    if body.stream:
        return await event_stream(request, _events(transcriber, body))
    transcript = await cancel_on_disconnect(request.receive, transcriber.run())
    return _format_response(transcript, body, task, transcriber)


# --- requests ---------------------------------------------------------------------------------


def _check(body: SpeechForm, model: SpeechModel, task: str) -> None:
    """Raise an APIError for options that the model or this server does not support."""
    tokenizer = model.whisper.tokenizer
    if body.response_format == "diarized_json":
        raise unsupported(
            "response_format",
            body.response_format,
            "This server does not distinguish speakers: use json, text, srt, verbose_json or vtt.",
        )
    if "word" in body.timestamp_granularities and body.response_format != "verbose_json":
        raise APIError(
            400,
            "Word timestamps need response_format 'verbose_json': set it, or remove 'word' from "
            "timestamp_granularities.",
            param="timestamp_granularities",
            code="invalid_value",
        )
    if body.include and body.response_format != "json":
        raise unsupported("include", body.include[0], "'include' needs response_format 'json'.")
    if task == "translate" and not tokenizer.is_multilingual:
        raise unsupported(
            "model",
            model.id,
            "This model is English-only: use a multilingual one to translate.",
        )
    if body.language is not None:
        try:
            tokenizer.language_code(body.language)
        except ValueError as error:
            raise APIError(
                400, f"Invalid 'language': {error}.", param="language", code="invalid_value"
            ) from None


def _decode_audio(data: bytes, name: str) -> np.ndarray:
    try:
        return audio.load(data, name=name, max_seconds=MAX_SECONDS)
    except ValueError as error:
        raise APIError(
            400,
            f"Invalid file format. Supported formats: {_FORMATS} ({error})",
            param="file",
        ) from None


# --- transcription ----------------------------------------------------------------------------


class _Transcriber:
    """The transcription of one audio file. It stops soon after the iterator of `stream` closes."""

    def __init__(
        self,
        model: SpeechModel,
        samples: np.ndarray,
        language: str | None,
        decoding_options: audio.DecodingOptions,
        transcription_options: audio.TranscriptionOptions,
    ):
        self._model, self._samples, self._language = model, samples, language
        self._decoding_options = decoding_options
        self._transcription_options = transcription_options
        self.tokenizer = model.whisper.tokenizer
        self._stop = threading.Event()
        self.language = "en"
        self.segments: list[Segment] = []

    async def run(self) -> Transcript:
        """Return the complete transcript."""
        async for _ in self.stream():
            pass
        return self.transcript

    @property
    def transcript(self) -> Transcript:
        """The transcript so far."""
        return Transcript(
            language=self.language,
            duration=len(self._samples) / SAMPLE_RATE,
            text="".join(segment.text for segment in self.segments).strip(),
            segments=tuple(self.segments),
        )

    async def stream(self) -> AsyncGenerator[Segment, None]:
        """Yield the segments as they are decoded."""
        segments = self._transcribe()
        try:
            while (segment := await asyncio.to_thread(next, segments, None)) is not None:
                self.segments.append(segment)
                yield segment
        finally:
            self._stop.set()

    def _transcribe(self) -> Iterator[Segment]:
        self.language, spans = self._model.detect_language(
            self._samples, self._language, self._transcription_options
        )
        options = replace(self._decoding_options, language=self.language)
        yield from self._model.transcribe(
            self._samples, options, self._transcription_options, spans, stop=self._stop
        )


async def _events(transcriber: _Transcriber, body: SpeechForm) -> AsyncGenerator[Event, None]:
    extra = ["logprobs"] if body.include else []
    async for segment in transcriber.stream():
        text = segment.text if len(transcriber.segments) > 1 else segment.text.lstrip()
        event: Event = {"type": "transcript.text.delta", "delta": text}
        yield event | {name: _logprobs(transcriber, [segment]) for name in extra}
    done: Event = {"type": "transcript.text.done", "text": transcriber.transcript.text}
    yield (
        done
        | {name: _logprobs(transcriber, transcriber.segments) for name in extra}
        | {"usage": _token_usage(transcriber, body)}
    )


# --- responses --------------------------------------------------------------------------------


def _format_response(
    transcript: Transcript, body: SpeechForm, task: str, transcriber: _Transcriber
) -> Response:
    if body.response_format in ("text", "srt", "vtt"):
        return PlainTextResponse(subtitles.render(transcript, body.response_format))
    if body.response_format == "json":
        response = {"text": transcript.text, "usage": _usage(transcript)}
        if body.include:
            response["logprobs"] = _logprobs(transcriber, transcript.segments)
        return JSONResponse(response)
    response = subtitles.verbose_json(transcript, task=task)
    if task == "translate":
        response["language"] = "english"
    if "word" in body.timestamp_granularities:
        response.setdefault("words", [])
    if "segment" not in body.timestamp_granularities:
        del response["segments"]
    return JSONResponse(response | {"usage": _usage(transcript)})


def _usage(transcript: Transcript) -> dict[str, Any]:
    return {"type": "duration", "seconds": math.ceil(transcript.duration)}


def _token_usage(transcriber: _Transcriber, body: SpeechForm) -> dict[str, Any]:
    """Return token counts; an audio token is a position of the encoder, 50 per second of audio."""
    encode = transcriber.tokenizer.encode
    audio_tokens = math.ceil(transcriber.transcript.duration / TIME_PRECISION)
    text_tokens = sum(len(encode(text)) for text in (body.prompt, *body.keywords) if text)
    output_tokens = sum(len(segment.ids) for segment in transcriber.segments)
    return {
        "type": "tokens",
        "input_tokens": audio_tokens + text_tokens,
        "input_token_details": {"audio_tokens": audio_tokens, "text_tokens": text_tokens},
        "output_tokens": output_tokens,
        "total_tokens": audio_tokens + text_tokens + output_tokens,
    }


def _logprobs(transcriber: _Transcriber, segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """Return the text tokens of segments with their logprobs."""
    tokenizer, logprobs = transcriber.tokenizer, []
    for segment in segments:
        for id, logprob in zip(segment.ids, segment.logprobs, strict=True):
            if id < tokenizer.eot:
                data = tokenizer.encoding.decode_single_token_bytes(id)
                text = data.decode("utf-8", "replace")
                logprobs.append({"token": text, "logprob": logprob, "bytes": list(data)})
    return logprobs
