"""`pellucid transcribe`: transcribes or translates the speech in audio files.

Plain text goes to stdout segment by segment while it is decoded, progress to stderr. The other
formats (JSON, subtitles) are written as whole documents; `--output-dir` writes one document per
audio file.
"""

import dataclasses
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from serve.cli import console
from serve.cli.options import model_option
from serve.exceptions import Failure, NotFound, WrongUsage

if TYPE_CHECKING:
    import numpy as np

    from audio import DecodingOptions, Transcript, TranscriptionOptions
    from serve.models.speech import SpeechModel

DEFAULT_MODEL = "whisper-base"
FORMATS = ("text", "json", "srt", "vtt", "tsv")  # those of `audio.subtitles`
_SUFFIX = {"text": "txt"}


def transcribe(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Audio files.")],
    model: Annotated[
        str,
        model_option("A speech model of `pellucid models`, or NAME=PATH for a folder."),
    ] = DEFAULT_MODEL,
    language: Annotated[
        str | None,
        typer.Option(help="The spoken language, as a code or a name. [default: detected]"),
    ] = None,
    format: Annotated[
        str, typer.Option("--format", "-f", help=f"One of {', '.join(FORMATS)}.")
    ] = "text",
    word_timestamps: Annotated[
        bool,
        typer.Option("--word-timestamps", help="Find the time of each word; a subtitle per word."),
    ] = False,
    translate: Annotated[
        bool, typer.Option("--translate", help="Translate the speech into English.")
    ] = False,
    prompt: Annotated[
        str, typer.Option(help="Text that precedes the audio; guides names and style.")
    ] = "",
    beam_size: Annotated[
        int | None, typer.Option(min=1, help="Beams of beam search; slower, more accurate.")
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(min=1, help="30-second windows decoded at once; 1 decodes them in sequence."),
    ] = 4,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Write a document for each file to this folder."),
    ] = None,
    spectrogram: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Plot the spectrogram with its words.")
    ] = None,
    alignment: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Plot the alignment of words and audio.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, int8, or auto.")] = "auto",
    stats: Annotated[bool, typer.Option("--stats", help="Print speed to stderr.")] = False,
) -> None:
    """Transcribe the speech in audio files."""
    if format not in FORMATS:
        raise WrongUsage(f"--format {format}: use one of {', '.join(FORMATS)}")
    if len(files) > 1 and format != "text" and output_dir is None:
        raise WrongUsage(
            f"cannot write {len(files)} transcripts as {format} to stdout; give --output-dir"
        )
    if len(files) > 1 and (spectrogram or alignment):
        raise WrongUsage(
            f"--spectrogram and --alignment need exactly one audio file, got {len(files)}"
        )
    if output_dir is not None and (clash := _name_clash(files)):
        raise WrongUsage(
            f"{clash[0]} and {clash[1]} would both be written to {_output_name(clash[0], format)}; "
            "transcribe them one by one, each with its own --output-dir"
        )
    import audio
    from audio import subtitles

    failures: list[Failure] = []

    def fail(failure: Failure) -> None:
        console.error(str(failure))
        failures.append(failure)

    present = [file for file in files if file.is_file()]
    for file in files:
        if file not in present:
            fail(NotFound(f"there is no file {file}"))
    if not present:
        raise typer.Exit(failures[0].exit_code)
    served = _load_model(model, dtype)
    task: Literal["transcribe", "translate"] = "translate" if translate else "transcribe"
    options = audio.DecodingOptions(task=task, language=language or "en", beam_size=beam_size)
    try:
        served.whisper.tokenizer.sot_sequence(options.language, task, timestamps=True)
    except ValueError as error:
        raise WrongUsage(f"{served.id}: {error}") from None
    plan = audio.TranscriptionOptions(
        initial_prompt=prompt,
        word_timestamps=word_timestamps or bool(spectrogram),
        batch_size=batch_size,
    )
    to_stdout = output_dir is None and format == "text"
    for file in present:
        started = time.perf_counter()
        try:
            samples, transcript = _transcribe(served, file, language, options, plan, to_stdout)
        except Failure as failure:
            fail(failure)
            continue
        if not transcript.segments:
            console.info(f"{file.name}: no speech in {transcript.duration:.1f} s")
        document = subtitles.render(transcript, format, words=word_timestamps)
        if output_dir is not None:
            output_dir.mkdir(parents=True, exist_ok=True)
            target = output_dir / _output_name(file, format)
            target.write_text(document, "utf-8")
            console.info(str(target))
        elif not to_stdout:
            console.write(document, end="")
        if stats:
            seconds = time.perf_counter() - started
            console.info(
                f"[{transcript.duration:.1f} s of audio · {seconds:.1f} s · "
                f"{transcript.duration / seconds:.1f} times real time · {served.dtype}]"
            )
        _plot(served, samples, transcript, spectrogram, alignment)
    if failures:
        raise typer.Exit(failures[0].exit_code)


def _transcribe(
    served: "SpeechModel",
    file: Path,
    language: str | None,
    options: "DecodingOptions",
    plan: "TranscriptionOptions",
    to_stdout: bool,
) -> "tuple[np.ndarray, Transcript]":
    """Return the samples and the transcript of a file; print segments while they are decoded.

    Raises:
        Failure: the file cannot be read.
        WrongUsage: the file is not audio.
    """
    import audio
    from audio.load import SAMPLE_RATE

    try:
        samples = audio.load(file)
    except OSError as error:
        raise Failure(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise WrongUsage(str(error)) from None
    duration = len(samples) / SAMPLE_RATE
    code, spans = served.detect_language(samples, language, plan)
    options = dataclasses.replace(options, language=code)
    segments = []
    for segment in served.transcribe(samples, options, plan, spans, stop=threading.Event()):
        segments.append(segment)
        if to_stdout:
            console.write(segment.text.strip())
        else:
            console.info(f"{file.name}: {segment.end:.0f} of {duration:.0f} s")
    text = "".join(segment.text for segment in segments).strip()
    transcript = audio.Transcript(
        language=code, duration=duration, text=text, segments=tuple(segments)
    )
    return samples, transcript


def _plot(
    served: "SpeechModel",
    samples: "np.ndarray",
    transcript: "Transcript",
    spectrogram: Path | None,
    alignment: Path | None,
) -> None:
    """Plot the spectrogram and the alignment of a file if their paths are given."""
    from audio import plots

    try:
        if spectrogram:
            words = [word for segment in transcript.segments for word in segment.words]
            plots.plot_spectrogram(spectrogram, samples, words)
        if alignment and transcript.segments:
            plots.plot_alignment(alignment, served.whisper, samples, transcript)
        elif alignment:
            console.info(f"{alignment} is not written: the audio holds no speech")
    except ValueError as error:
        raise Failure(str(error)) from None


def _output_name(file: Path, format: str) -> str:
    """Return the name of the file for the transcript of an audio file."""
    return f"{file.stem}.{_SUFFIX.get(format, format)}"


def _name_clash(files: Sequence[Path]) -> tuple[Path, Path] | None:
    """Return two audio files whose transcripts would have the same file name, or None."""
    stems: dict[str, Path] = {}
    for file in files:
        if file.stem in stems:
            return stems[file.stem], file
        stems[file.stem] = file
    return None


def _load_model(name: str, dtype: str) -> "SpeechModel":
    from serve.cli import local
    from serve.models.speech import load_speech_model

    files = local.locate_model_of_kind(name, "speech", f"give --model {DEFAULT_MODEL}")
    with local.report_load_errors(files):
        return load_speech_model(
            files.id, files.path, owned_by=files.publisher, dtype=dtype, notify=console.info
        )
