"""Command line of speech to text: `python -m audio --model FOLDER speech.mp3`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from audio import plots
from audio.load import load
from audio.subtitles import FORMATS, render
from audio.transcribe import TranscriptionOptions, transcribe
from audio.whisper import load_model


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program name; None for `sys.argv[1:]`.

    Returns:
        The exit status: 0, or 1 if a file or the model could not be read.
    """
    parser = argparse.ArgumentParser(
        prog="python -m audio", description="Transcribe audio files with Whisper."
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="FOLDER",
        help="folder with config.json, tokenizer.json, and model.safetensors or model.bin",
    )
    parser.add_argument("--language", help="language code or English name; detected if omitted")
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument(
        "--word-timestamps", action="store_true", help="find the start and end of every word"
    )
    parser.add_argument(
        "--words", dest="word_timestamps", action="store_true", help=argparse.SUPPRESS
    )  # former name, still accepted
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        default=1,
        help="windows decoded at once (default 1)",
    )
    # former name of --batch-size, still accepted
    parser.add_argument("--batch", dest="batch_size", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="dtype of the weights",
    )
    parser.add_argument(
        "--spectrogram",
        type=Path,
        metavar="PNG",
        help="plot the spectrogram and its words to this file",
    )
    parser.add_argument(
        "--alignment",
        type=Path,
        metavar="PNG",
        help="plot the alignment of tokens with time to this file",
    )
    parser.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args(argv)
    if (args.spectrogram or args.alignment) and len(args.files) > 1:
        parser.error(f"--spectrogram and --alignment take one file, got {len(args.files)}")
    try:
        whisper = load_model(args.model, dtype=args.dtype)
        for path in args.files:
            samples = load(path)
            options = TranscriptionOptions(
                word_timestamps=args.word_timestamps or bool(args.spectrogram),
                batch_size=args.batch_size,
            )
            transcript = transcribe(
                whisper, samples, language=args.language, transcription_options=options
            )
            sys.stdout.write(render(transcript, args.format, words=args.word_timestamps))
            if args.spectrogram:
                words = [word for segment in transcript.segments for word in segment.words]
                plots.plot_spectrogram(args.spectrogram, samples, words)
            if args.alignment:
                plots.plot_alignment(args.alignment, whisper, samples, transcript)
    except (OSError, ValueError) as error:
        print(f"python -m audio: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
