"""Test the audio routes and `pellucid transcribe` over a socket."""

import io
import json
import subprocess
import sys
import time

import httpx
import numpy as np
import openai
import pytest
import soundfile
from openai import OpenAI

from serve.api.app import create_app
from serve.api.routes.audio import SpeechEvent, Transcription, VerboseTranscription
from serve.api.settings import ServerSettings
from serve.models import resolve
from serve.models.registry import Registry
from serve.models.spec import LoadOptions, ModelFiles
from tests.audio.conftest import GOLDEN
from tests.audio.ten_minutes import hum, pink, white
from tests.naming import names
from tests.serve import scripted
from tests.serve.old_client import OldClient, install

pytestmark = pytest.mark.heavy

MODEL = "whisper-tiny.en"
MULTILINGUAL = "whisper-base"
CLIP = GOLDEN / "austen-0890.flac"
TEXT = "Unless to be rather cold-hearted and rather selfish is to be ill-disposed."


@pytest.fixture(scope="module")
def speech_address(model_file, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    files = ModelFiles(MODEL, model_file(MODEL), "openai")
    spec = resolve.describe(
        files, LoadOptions(cache_budget=2**20, dtype="float32", home=home, notify=print)
    )
    assert spec.kind == "speech"
    several = ModelFiles(MULTILINGUAL, model_file(MULTILINGUAL), "openai")
    other = resolve.describe(
        several, LoadOptions(cache_budget=2**20, dtype="float32", home=home, notify=print)
    )
    registry = Registry([scripted.model(), spec, other], {"whisper-1": MODEL})
    with scripted.serve_app(create_app(ServerSettings(home=home), registry)) as address:
        yield address


@pytest.fixture(scope="module")
def client(speech_address):
    with OpenAI(base_url=f"{speech_address}/v1", api_key="any", max_retries=0) as client:
        yield client


def transcribe(client, file=CLIP, **options):
    return client.audio.transcriptions.create(**{"model": "whisper-1", "file": file} | options)


def wav(samples, rate=16_000):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return ("sound.wav", file.getvalue())


def post(address, file=("a.wav", b"RIFF"), route="transcriptions", **fields):
    files = {"file": file} if file else None
    url = f"{address}/v1/audio/{route}"
    return httpx.post(url, data={"model": MODEL} | fields, files=files, timeout=120)


def test_json_response_has_text_and_usage(client):
    answer = transcribe(client)
    assert answer.text == TEXT
    assert answer.usage.type == "duration"
    assert answer.usage.seconds == 6
    assert answer.logprobs is None


def test_json_response_with_logprobs_lists_tokens(client):
    answer = transcribe(client, include=["logprobs"])
    assert "".join(item.token for item in answer.logprobs).strip() == TEXT
    assert all(item.logprob <= 0 for item in answer.logprobs)
    assert bytes(int(b) for item in answer.logprobs for b in item.bytes).decode().strip() == TEXT


def test_responses_match_schema(speech_address, client):
    description = httpx.get(f"{speech_address}/openapi.json").json()
    for route in ("transcriptions", "translations"):
        operation = description["paths"][f"/v1/audio/{route}"]["post"]
        (form,) = operation["requestBody"]["content"].items()
        assert form[0] == "multipart/form-data" and "SpeechForm" in form[1]["schema"]["$ref"]
        assert {"application/json", "text/plain"} <= set(operation["responses"]["200"]["content"])
    form = description["components"]["schemas"]["SpeechForm"]
    assert {"file", "model"} <= set(form["required"])
    assert form["properties"]["file"] == {"type": "string", "format": "binary", "title": "File"}
    file = ("a.flac", CLIP.read_bytes())
    brief = post(speech_address, file, **{"include[]": "logprobs"}).json()
    Transcription.model_validate(brief, strict=True)
    request_fields = {
        "response_format": "verbose_json",
        "timestamp_granularities[]": ["word", "segment"],
    }
    VerboseTranscription.model_validate(
        post(speech_address, file, **request_fields).json(), strict=True
    )
    events = post(speech_address, file, stream="true").text.split("\n\n")
    datas = [event.removeprefix("data: ") for event in events if event.startswith("data: {")]
    assert len(datas) > 1
    for data in datas:
        SpeechEvent.model_validate_json(data, strict=True)


def test_text_srt_and_vtt_responses_are_well_formed(client):
    assert transcribe(client, response_format="text") == TEXT + "\n"
    srt = transcribe(client, response_format="srt")
    assert srt.startswith("1\n00:00:00,") and " --> 00:00:0" in srt and TEXT in srt
    vtt = transcribe(client, response_format="vtt")
    assert vtt.startswith("WEBVTT\n\n00:00:00.")


def test_verbose_json_response_has_segments(client):
    answer = transcribe(client, response_format="verbose_json")
    assert (answer.language, answer.duration, answer.text) == ("english", 5.3, TEXT)
    (segment,) = answer.segments
    assert segment.id == 0 and segment.text.strip() == TEXT
    assert 0 <= segment.start < 0.5 and 4.5 < segment.end <= 5.3
    assert answer.words is None


def test_verbose_json_response_with_words_has_word_timestamps(client):
    answer = transcribe(
        client, response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert "".join(word.word for word in answer.words) == TEXT.replace(" ", "")
    assert all(
        a.end <= b.start + 0.01 for a, b in zip(answer.words, answer.words[1:], strict=False)
    )
    assert answer.segments
    only = transcribe(client, response_format="verbose_json", timestamp_granularities=["word"])
    assert only.segments is None and len(only.words) == len(answer.words)


def test_streamed_text_equals_whole_text(client):
    *deltas, done = transcribe(client, stream=True)
    assert {event.type for event in deltas} == {"transcript.text.delta"}
    assert "".join(event.delta for event in deltas) == TEXT
    assert done.type == "transcript.text.done" and done.text == TEXT
    usage = done.usage
    assert usage.type == "tokens"
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    details = usage.input_token_details
    assert usage.input_tokens == details.audio_tokens + details.text_tokens
    assert details.audio_tokens == 265 and usage.output_tokens > 10  # 50 positions a second
    assert type(done).model_validate(done.model_dump(), strict=True)


@pytest.mark.slow
def test_streamed_text_of_long_audio_arrives_per_window(client):
    """Regression: four windows were decoded in one batch, so all text arrived at the end."""
    samples, rate = soundfile.read(CLIP)
    sound = np.concatenate([samples, np.zeros(rate)] * 15)  # 95 seconds: four windows
    started, arrivals = time.perf_counter(), []
    for _ in transcribe(client, wav(sound), stream=True):
        arrivals.append(time.perf_counter() - started)
    assert len(arrivals) > 8 and arrivals[3] < 0.7 * arrivals[-1], arrivals


@pytest.mark.slow  # a minute of audio
def test_long_audio_is_decoded_in_batches(client):
    samples, rate = soundfile.read(CLIP)
    pause = np.zeros(rate * 4)
    many = np.concatenate([part for _ in range(7) for part in (samples, pause)])  # 65 s
    answer = transcribe(client, wav(many), response_format="verbose_json")
    assert answer.text.count("rather selfish") == 7
    starts = np.array([s.start for s in answer.segments if "unless" in s.text.lower()])
    assert np.abs(starts - 9.3 * np.arange(7)).max() < 1.0


def bursts(kind):
    """Return noise bursts in a quiet room."""
    rng = np.random.default_rng(0)
    sound = rng.normal(0, 1e-4, 12 * 16_000)
    for second in (2, 7):
        sound[second * 16_000 :][: 3 * 16_000] += 0.05 * kind(rng, 3 * 16_000)
    return sound


def notes():
    """Return a melody of overtones with rests, which resembles speech."""
    rng, t = np.random.default_rng(0), np.arange(4800) / 16_000
    parts = []
    for _ in range(12):
        pitch = 220 * 2 ** (rng.integers(0, 24) / 12)
        parts.append(sum(np.sin(2 * np.pi * pitch * k * t) / k for k in range(1, 6)))
        parts[-1] = 0.1 * parts[-1] * np.exp(-8 * t)
        parts.append(np.zeros(int(rng.uniform(0, 1.0) * 16_000)))
    return np.concatenate(parts)


@pytest.mark.parametrize(
    "sound",
    [
        np.zeros(160_000),
        np.random.default_rng(0).normal(0, 0.001, 160_000),
        np.random.default_rng(0).normal(0, 0.1, 160_000),
        bursts(white),
        bursts(pink),
        bursts(hum),
        notes(),
    ],
    ids=["silence", "hiss", "noise", "white bursts", "pink bursts", "hum bursts", "notes"],
)
def test_transcript_of_silence_or_noise_is_empty(client, sound):
    answer = transcribe(client, wav(np.clip(sound, -1, 1)), response_format="verbose_json")
    assert (answer.text, answer.segments) == ("", [])


def quiet_speech(seconds):
    """Return speech of this duration, attenuated by 70 dB."""
    return np.resize(soundfile.read(CLIP)[0], seconds * 16_000) * 10 ** (-70 / 20)


@pytest.mark.parametrize("route", ["transcriptions", "translations"])
@pytest.mark.parametrize("kind", ["silence", "white", "pink", "tone"])
def test_transcript_of_over_60_s_without_speech_is_empty(speech_address, kind, route):
    """Regression: more than 60 seconds without speech caused a division by zero and a 500."""
    rng, num = np.random.default_rng(0), 61 * 16_000
    sound = {
        "silence": lambda: np.zeros(num),
        "white": lambda: 0.1 * white(rng, num),
        "pink": lambda: 0.1 * pink(rng, num),
        "tone": lambda: 0.3 * np.sin(2 * np.pi * 440 * np.arange(num) / 16_000),
    }[kind]()
    file, fields = wav(np.clip(sound, -1, 1)), {"model": MULTILINGUAL}
    answer = post(speech_address, file, route, **fields, response_format="verbose_json")
    assert answer.status_code == 200, answer.text
    assert answer.json()["duration"] == 61
    assert (answer.json()["text"], answer.json()["segments"]) == ("", [])
    for format in ("json", "text", "srt", "vtt"):
        assert post(speech_address, file, route, **fields, response_format=format).is_success
    events = post(speech_address, file, route, **fields, stream="true")
    assert events.is_success and "transcript.text.done" in events.text


def test_quiet_speech_over_60_s_keeps_its_duration(client):
    quiet = quiet_speech(61)
    assert transcribe(client, wav(quiet), response_format="verbose_json").duration == 61


@pytest.mark.parametrize(
    "file",
    [("a.wav", b""), ("a.mp3", b"I am no sound"), ("a.flac", CLIP.read_bytes()[:60])],
    ids=["empty", "text", "truncated"],
)
def test_file_without_audio_is_refused(client, file):
    with pytest.raises(openai.BadRequestError) as error:
        transcribe(client, file)
    assert (error.value.type, error.value.param) == ("invalid_request_error", "file")
    assert " object at " not in str(error.value)
    assert transcribe(client).text == TEXT


@pytest.mark.parametrize("type", ["audio/wav", "text/plain", "application/octet-stream", "video/x"])
@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a", "a.txt", "../a.m4a", "\u00e4.docx"])
def test_file_name_and_content_type_do_not_change_text(speech_address, name, type):
    answer = post(speech_address, (name, CLIP.read_bytes(), type))
    assert answer.json()["text"] == TEXT


def test_file_of_two_concatenated_flacs_is_read_completely(client):
    """Regression: the audio after the first FLAC stream was lost without an error."""
    other = (GOLDEN / "austen-0880.flac").read_bytes()
    answer = transcribe(client, ("a.flac", CLIP.read_bytes() + other))
    assert "rather selfish" in answer.text and "young man" in answer.text


def test_mp4_with_mp3_suffix_is_transcribed(client):
    """The format is detected from the content, here AAC in MP4, not from the suffix."""
    av = pytest.importorskip("av")
    samples, rate = soundfile.read(CLIP, dtype="float32")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.rate = rate
        container.mux([*stream.encode(frame), *stream.encode(None)])
    assert "rather selfish" in transcribe(client, ("a.mp3", file.getvalue())).text


@pytest.fixture(scope="module")
def old(speech_address):
    return OldClient(install(), speech_address)


def test_client_of_2023_transcribes(old):
    call = f"answer = openai.Audio.transcribe('whisper-1', open({str(CLIP)!r}, 'rb')"
    assert old.run(f"{call})")["text"] == TEXT
    assert old.run(f"{call}, response_format='text')") == TEXT + "\n"
    assert old.run(f"{call}, response_format='srt', prompt='Dear Sir')").startswith("1\n00:00:00,")
    verbose = old.run(f"{call}, response_format='verbose_json', temperature=0, language='en')")
    assert verbose["language"] == "english" and verbose["segments"][0]["text"].strip() == TEXT
    output = old.command("api", "audio.transcribe", "-m", "whisper-1", "-f", str(CLIP))
    assert json.loads(output)["text"] == TEXT


def test_errors_raise_exceptions_of_client_of_2023(old):
    for call, fields in (
        (
            f"transcribe('whisper-1', open({str(GOLDEN / 'README.md')!r}, 'rb'))",
            [400, "file", None],
        ),
        (
            f"translate('whisper-1', open({str(CLIP)!r}, 'rb'))",
            [400, "model", "unsupported_value"],
        ),
        (
            f"transcribe('nobody', open({str(CLIP)!r}, 'rb'))",
            [404, "model", "model_not_found"],
        ),
    ):
        result = old.run(
            f"try:\n    openai.Audio.{call}\nexcept openai.error.InvalidRequestError as error:\n"
            "    answer = [error.http_status, error.param, error.code]"
        )
        assert result == fields


def test_single_sample_and_8_channel_audio_are_accepted(client):
    assert transcribe(client, wav(np.zeros(1))).text == ""
    samples, rate = soundfile.read(CLIP)
    eight = np.repeat(samples, 12)[:, None].repeat(8, axis=1)[: 192_000 * 2]
    assert transcribe(client, wav(eight, 192_000)).text != ""


@pytest.mark.parametrize(
    ("fields", "param", "code", "facts"),
    [
        ({"temperature": "warm"}, "temperature", "invalid_value", ["number"]),
        ({"temperature": "1.5"}, "temperature", "decimal_above_max_value", [1, 1.5]),
        ({"response_format": "docx"}, "response_format", "invalid_value", ["'docx'", "'srt'"]),
        ({"response_format": "diarized_json"}, "response_format", "unsupported_value", []),
        ({"language": "klingon"}, "language", "invalid_value", ["'klingon'"]),
        ({"language": "de"}, "language", "invalid_value", ["'de'", "en"]),
        (
            {"timestamp_granularities[]": "word"},
            "timestamp_granularities",
            "invalid_value",
            ["verbose_json"],
        ),
        ({"stream": "maybe"}, "stream", "invalid_value", ["boolean"]),
    ],
)
def test_invalid_fields_are_refused(speech_address, fields, param, code, facts):
    answer = post(speech_address, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error
    assert names(error["message"], *facts)


def test_repeated_field_is_refused(speech_address):
    """Regression: the last value was used, and the first was dropped without an error."""
    form = {"model": [MODEL, MULTILINGUAL], "language": ["en", "en"]}
    with CLIP.open("rb") as file:
        answer = httpx.post(
            f"{speech_address}/v1/audio/transcriptions", data=form, files={"file": file}
        )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "model", "invalid_form")


def test_empty_fields_count_as_absent(speech_address):
    """Regression: empty fields such as `language=` returned 400; browsers send all fields."""
    names = ("prompt", "response_format", "temperature", "language", "stream", "user")
    lists = ("timestamp_granularities[]", "include[]", "keywords[]", "timestamp_granularities")
    for text in ("", "  "):
        fields = dict.fromkeys((*names, *lists), text)
        answer = post(speech_address, file=("a.flac", CLIP.read_bytes()), **fields)
        assert answer.status_code == 200 and answer.json()["text"] == TEXT, answer.text
        error = post(speech_address, **{"model": text}).json()["error"]
        assert error["param"] == "model" and error["code"] == "missing_required_parameter", error
    fields = {"timestamp_granularities[]": ["", "word"], "response_format": "verbose_json"}
    answer = post(speech_address, file=("a.flac", CLIP.read_bytes()), **fields)
    assert answer.status_code == 200 and "segments" not in answer.json()


def test_invalid_requests_are_refused(speech_address):
    assert post(speech_address, file=None).json()["error"]["code"] == "invalid_form"  # none
    empty = post(speech_address, file=("", b"")).json()["error"]
    assert (empty["param"], empty["code"]) == ("file", "missing_required_parameter")
    answer = post(speech_address, model="scripted")
    assert answer.status_code == 404 and MODEL in answer.json()["error"]["message"]
    answer = post(speech_address, route="translations")
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "model")
    assert error["code"] == "unsupported_value"
    answer = post(speech_address, file=("a.wav", bytes(25 * 2**20 + 1)))
    assert answer.status_code == 413  # and OpenAI's own sentence
    assert "Maximum content size limit (26214400) exceeded" in answer.text
    answer = httpx.post(f"{speech_address}/v1/audio/transcriptions", json={"model": MODEL})
    assert answer.status_code == 400


def pellucid(*args):
    command = [sys.executable, "-m", "serve", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_transcribe_command_writes_text_to_stdout_and_json_to_folder(tmp_path, model_file):
    speech = f"tiny={model_file(MODEL)}"
    done = pellucid("transcribe", CLIP, "--model", speech, "--dtype", "float32", "--stats")
    assert (done.returncode, done.stdout) == (0, TEXT + "\n"), done.stderr
    assert names(done.stderr, "float32"), "the statistics show the dtype"
    done = pellucid(
        *("transcribe", CLIP, GOLDEN / "austen-0880.flac", "--model", speech),
        *("--dtype", "float32", "--format", "json", "--words", "--output-dir", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "austen-0890.json").read_text())
    assert written["text"] == TEXT and len(written["words"]) > 10
    assert (tmp_path / "austen-0880.json").exists()


def test_transcribe_command_continues_after_bad_file(tmp_path, model_file):
    """Regression: a silent file ended the command with a traceback before the later files."""
    silent, text, joined = (tmp_path / name for name in ("silent.wav", "text.mp3", "joined.flac"))
    silent.write_bytes(wav(np.zeros(19_200))[1])
    text.write_text("I am no sound")
    joined.write_bytes(CLIP.read_bytes() * 2)
    speech = ("--model", f"tiny={model_file(MODEL)}", "--dtype", "float32")
    done = pellucid("transcribe", silent, text, tmp_path / "absent.wav", CLIP, joined, *speech)
    assert done.stdout.count("rather selfish") == 3
    assert done.returncode == 3 and "Traceback" not in done.stderr
    for file in (silent, text, "absent.wav"):
        assert str(getattr(file, "name", file)) in done.stderr
    for format in ("json", "srt", "vtt", "tsv", "text"):
        done = pellucid("transcribe", silent, *speech, "--format", format)
        assert done.returncode == 0, done.stderr
    assert pellucid("transcribe", text, *speech).returncode == 2
    picture = tmp_path / "alignment.png"
    done = pellucid("transcribe", silent, *speech, "--alignment", picture)
    assert done.returncode == 0 and not picture.exists() and picture.name in done.stderr


def test_transcribe_command_with_two_files_of_one_name_is_refused(tmp_path):
    files = [tmp_path / "a.wav", tmp_path / "a.flac"]
    for file in files:
        file.write_bytes(CLIP.read_bytes())
    done = pellucid("transcribe", *files, "--output-dir", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()


def test_transcribe_command_with_invalid_arguments_exits_with_code(tmp_path):
    absent = pellucid("transcribe", "nothing.wav")
    assert absent.returncode == 3 and names(absent.stderr, "nothing.wav")
    wrong = pellucid("transcribe", CLIP, "--format", "docx")
    assert wrong.returncode == 2
    assert names(wrong.stderr, "docx", "text", "json", "srt", "vtt", "tsv")
