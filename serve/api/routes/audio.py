"""POST /v1/audio/transcriptions and /v1/audio/translations: what is said in a sound file.

The body is a form with a file of at most 25 MB. Its bytes say what it is; its suffix counts only
where they do not. At temperature 0, the default, decoding is greedy, and goes on at higher
temperatures where the result looks wrong. Windows are opened only where somebody speaks, so silence
and noise yield no text.

``stream`` sends a ``transcript.text.delta`` for each segment and ``transcript.text.done`` at the
end. A sound of over a minute is then gone through in turn, so a few words may differ from the
answer that is not streamed, whose windows are decoded four at a time. OpenAI ignores ``stream`` for
whisper-1; here it works for every model. ``keywords`` are words likely to occur. Speakers are not
told apart: ``diarized_json`` is refused.
"""

import asyncio
import math
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import Field
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
from serve.api.requests import Body
from serve.api.responses import ResponseModel
from serve.api.sse import Event, cancel_on_disconnect, event_stream
from serve.api.state import get_loaded_model
from serve.models.speech import SpeechModel

router = APIRouter(prefix="/v1/audio")

MAX_BYTES = 25 * 2**20  # of a file
BODY_LIMITS = {  # what a body may take: the file, and the form around it
    f"/v1/audio/{route}": MAX_BYTES + 2**20 for route in ("transcriptions", "translations")
}
MAX_SECONDS = 2 * 3600.0  # of sound: a small file can hold days of silence
BATCH_SIZE = 4  # windows of a long sound decoded at once
LONG_SECONDS = 60.0  # seconds from which a sound is long

_FORMATS = "['flac', 'm4a', 'mp3', 'mp4', 'mpeg', 'mpga', 'oga', 'ogg', 'wav', 'webm']"


class SpeechForm(Body):
    """A form with a sound file."""

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


class Logprob(ResponseModel):
    token: str
    logprob: float
    bytes: list[int]


class SpeechUsage(ResponseModel):
    type: Literal["duration"]
    seconds: int


class InputTokenDetails(ResponseModel):
    audio_tokens: int
    text_tokens: int


class TokenUsage(ResponseModel):
    type: Literal["tokens"]
    input_tokens: int
    input_token_details: InputTokenDetails
    output_tokens: int
    total_tokens: int


class Transcription(ResponseModel):
    """What `json` gives."""

    text: str
    logprobs: list[Logprob] | None = None
    usage: SpeechUsage


class SpeechSegment(ResponseModel):
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
    word: str
    start: float
    end: float


class VerboseTranscription(ResponseModel):
    """What `verbose_json` gives."""

    task: Literal["transcribe", "translate"]
    language: str
    duration: float
    text: str
    segments: list[SpeechSegment] | None = None
    words: list[SpeechWord] | None = None
    usage: SpeechUsage


class SpeechEvent(ResponseModel):
    """`transcript.text.delta` with `delta`, or `transcript.text.done` with `text` and `usage`."""

    type: Literal["transcript.text.delta", "transcript.text.done"]
    delta: str | None = None
    text: str | None = None
    logprobs: list[Logprob] | None = None
    usage: TokenUsage | None = None


def _speech_route_docs(*, events: type[ResponseModel] | None = None) -> dict[str, Any]:
    """A route that takes a form and answers with JSON, brief or verbose, or with text."""
    arguments = route_docs(Transcription, form=SpeechForm, events=events)
    content = arguments["responses"][200]["content"]
    brief = content["application/json"]["schema"]
    verbose = route_docs(VerboseTranscription)["responses"][200]["content"]["application/json"]
    content["application/json"] = {"schema": {"anyOf": [brief, verbose["schema"]]}}
    content["text/plain"] = {"schema": {"type": "string"}}
    return arguments


@router.post("/transcriptions", **_speech_route_docs(events=SpeechEvent))
async def create_transcription(request: Request) -> Response:
    """Write down what is said in a sound file."""
    return await _answer(request, "transcribe")


@router.post("/translations", **_speech_route_docs(events=SpeechEvent))
async def create_translation(request: Request) -> Response:
    """Write down in English what is said in a sound file."""
    return await _answer(request, "translate")


async def _answer(request: Request, task: Literal["transcribe", "translate"]) -> Response:
    with temporary_file() as sink:
        body = await read_form(request, SpeechForm, {"file": sink}, MAX_BYTES)
        sound = await read_all(sink)
    model = await get_loaded_model(request, body.model, SpeechModel)
    _check(body, model, task)
    context_of(request.scope).model = model.id
    samples = await asyncio.to_thread(_decode_audio, sound, body.file.filename)
    is_long = len(samples) > LONG_SECONDS * SAMPLE_RATE
    plan = audio.TranscriptionOptions(
        # In turn where the text is wanted as it is written: at once, the text of all regions but
        # the first arrives at the end.
        batch_size=BATCH_SIZE if is_long and not body.stream else 1,
        condition_on_previous_text=not is_long,
        initial_prompt=body.prompt,
        word_timestamps="word" in body.timestamp_granularities,
        fallback=audio.TemperatureFallback(temperatures=(body.temperature,))
        if body.temperature
        else audio.TemperatureFallback(),
    )
    options = audio.DecodingOptions(task=task, hotwords=", ".join(body.keywords))
    hearing = _Transcriber(model, samples, body.language, options, plan)
    if body.stream:
        return await event_stream(request, _events(hearing, body))
    found = await cancel_on_disconnect(request.receive, hearing.run())
    return _format_response(found, body, task, hearing)


# --- reading ----------------------------------------------------------------------------------


def _check(body: SpeechForm, model: SpeechModel, task: str) -> None:
    """Refuses what this model, or this server, cannot do."""
    tokens = model.whisper.tokenizer
    if body.response_format == "diarized_json":
        raise unsupported(
            "response_format",
            body.response_format,
            "Speakers are not told apart here: use json, text, srt, verbose_json or vtt.",
        )
    if "word" in body.timestamp_granularities and body.response_format != "verbose_json":
        raise APIError(
            400,
            "Times of words are in 'verbose_json' only: set response_format to verbose_json, or "
            "leave 'word' out of timestamp_granularities.",
            param="timestamp_granularities",
            code="invalid_value",
        )
    if body.include and body.response_format != "json":
        raise unsupported("include", body.include[0], "Logprobs are in 'json' only.")
    if task == "translate" and not tokens.is_multilingual:
        raise unsupported("model", model.id, "It knows English only, and cannot translate.")
    if body.language is not None:
        try:
            tokens.language_code(body.language)
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


# --- listening --------------------------------------------------------------------------------


class _Transcriber:
    """One sound on its way to text. Its work ends soon after nobody waits for it any more."""

    def __init__(
        self,
        model: SpeechModel,
        samples: np.ndarray,
        language: str | None,
        options: audio.DecodingOptions,
        plan: audio.TranscriptionOptions,
    ):
        self._model, self._samples, self._language = model, samples, language
        self._options, self._plan, self.tokens = options, plan, model.whisper.tokenizer
        self._stop = threading.Event()
        self.language = "en"
        self.segments: list[Segment] = []

    async def run(self) -> Transcript:
        """All of it."""
        async for _ in self.stream():
            pass
        return self.transcript

    @property
    def transcript(self) -> Transcript:
        """What was heard so far."""
        return Transcript(
            language=self.language,
            duration=len(self._samples) / SAMPLE_RATE,
            text="".join(segment.text for segment in self.segments).strip(),
            segments=tuple(self.segments),
        )

    async def stream(self) -> AsyncGenerator[Segment, None]:
        """Segment after segment, as they are written."""
        segments = self._transcribe()
        try:
            while (segment := await asyncio.to_thread(next, segments, None)) is not None:
                self.segments.append(segment)
                yield segment
        finally:
            self._stop.set()

    def _transcribe(self) -> Iterator[Segment]:
        self.language, spans = self._model.detect_language(
            self._samples, self._language, self._plan
        )
        options = replace(self._options, language=self.language)
        yield from self._model.transcribe(
            self._samples, options, self._plan, spans, stop=self._stop
        )


async def _events(hearing: _Transcriber, body: SpeechForm) -> AsyncGenerator[Event, None]:
    extra = ["logprobs"] if body.include else []
    async for segment in hearing.stream():
        text = segment.text if len(hearing.segments) > 1 else segment.text.lstrip()
        event: Event = {"type": "transcript.text.delta", "delta": text}
        yield event | {name: _logprobs(hearing, [segment]) for name in extra}
    done: Event = {"type": "transcript.text.done", "text": hearing.transcript.text}
    yield (
        done
        | {name: _logprobs(hearing, hearing.segments) for name in extra}
        | {"usage": _token_usage(hearing, body)}
    )


# --- writing ----------------------------------------------------------------------------------


def _format_response(
    found: Transcript, body: SpeechForm, task: str, hearing: _Transcriber
) -> Response:
    if body.response_format in ("text", "srt", "vtt"):
        return PlainTextResponse(subtitles.render(found, body.response_format))
    if body.response_format == "json":
        answer = {"text": found.text, "usage": _usage(found)}
        if body.include:
            answer["logprobs"] = _logprobs(hearing, found.segments)
        return JSONResponse(answer)
    answer = subtitles.verbose_json(found, task=task)
    if task == "translate":
        answer["language"] = "english"
    if "word" in body.timestamp_granularities:
        answer.setdefault("words", [])
    if "segment" not in body.timestamp_granularities:
        del answer["segments"]
    return JSONResponse(answer | {"usage": _usage(found)})


def _usage(found: Transcript) -> dict[str, Any]:
    return {"type": "duration", "seconds": math.ceil(found.duration)}


def _token_usage(hearing: _Transcriber, body: SpeechForm) -> dict[str, Any]:
    """What went in and came out, an audio token being a position of the encoder: 50 a second."""
    heard = math.ceil(hearing.transcript.duration / TIME_PRECISION)
    read = sum(len(hearing.tokens.encode(text)) for text in (body.prompt, *body.keywords) if text)
    written = sum(len(segment.ids) for segment in hearing.segments)
    return {
        "type": "tokens",
        "input_tokens": heard + read,
        "input_token_details": {"audio_tokens": heard, "text_tokens": read},
        "output_tokens": written,
        "total_tokens": heard + read + written,
    }


def _logprobs(hearing: _Transcriber, segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """The tokens of text with their log-probabilities."""
    tokens, found = hearing.tokens, []
    for segment in segments:
        for id, logprob in zip(segment.ids, segment.logprobs, strict=True):
            if id < tokens.eot:
                data = tokens.encoding.decode_single_token_bytes(id)
                text = data.decode("utf-8", "replace")
                found.append({"token": text, "logprob": logprob, "bytes": list(data)})
    return found
