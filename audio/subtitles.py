"""Output formats of a transcript: plain text, SubRip, WebVTT, tab-separated values, JSON.

SubRip (.srt) numbers its cues and writes times as 00:01:02,345. WebVTT (W3C) begins with the line
"WEBVTT" and writes 00:01:02.345. Both forbid "-->" within a cue. Times in tab-separated values are
whole milliseconds. JSON has every field of OpenAI's "verbose_json".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from audio.tokenizer import LANGUAGES
from audio.transcribe import Segment, Transcript

FORMATS = ("text", "json", "srt", "vtt", "tsv")


def render(transcript: Transcript, format: str, *, words: bool = False) -> str:
    """Return a transcript in one of `FORMATS`, with a newline at its end.

    Args:
        transcript: the transcript to format.
        format: one of `FORMATS`.
        words: write one cue per word in srt, vtt and tsv, if the transcript has word timestamps.

    Raises:
        ValueError: the format is unknown.
    """
    if format == "text":
        return transcript.text + "\n"
    if format == "json":
        return json.dumps(verbose_json(transcript), ensure_ascii=False, indent=2) + "\n"
    cues = [(s.start, s.end, s.text.strip()) for s in transcript.segments]
    if words:
        cues = [
            (w.start, w.end, w.text.strip()) for s in transcript.segments for w in s.words
        ] or cues
    if format == "srt":
        blocks = (
            f"{number}\n{format_timestamp(start, ',')} --> {format_timestamp(end, ',')}\n"
            f"{_cue_text(text)}\n"
            for number, (start, end, text) in enumerate(cues, 1)
        )
        return "\n".join(blocks)
    if format == "vtt":
        blocks = (
            f"{format_timestamp(start)} --> {format_timestamp(end)}\n{_escape_vtt(text)}\n"
            for start, end, text in cues
        )
        return "\n".join(["WEBVTT\n", *blocks])
    if format == "tsv":
        lines = (
            f"{round(start * 1000)}\t{round(end * 1000)}\t{' '.join(text.split())}\n"
            for start, end, text in cues
        )
        return "start\tend\ttext\n" + "".join(lines)
    raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")


def verbose_json(transcript: Transcript, *, task: str = "transcribe") -> dict[str, Any]:
    """Return a transcript as OpenAI's "verbose_json", with words if it has word timestamps.

    Args:
        transcript: the transcript to convert.
        task: "transcribe" or "translate", copied into the result.
    """
    words = [
        {"word": word.text.strip(), "start": word.start, "end": word.end}
        for segment in transcript.segments
        for word in segment.words
    ]
    return {
        "task": task,
        "language": LANGUAGES[transcript.language],
        "duration": round(transcript.duration, 2),
        "text": transcript.text,
        "segments": verbose_segments(transcript.segments),
        **({"words": words} if words else {}),
    }


def verbose_segments(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """Return the list `segments` of OpenAI's "verbose_json"."""
    return [
        {
            "id": number,
            "seek": segment.seek,
            "start": segment.start,
            "end": segment.end,
            "text": segment.text,
            "tokens": list(segment.ids),
            "temperature": segment.temperature,
            "avg_logprob": segment.avg_logprob,
            "compression_ratio": segment.compression_ratio,
            "no_speech_prob": segment.no_speech_prob,
        }
        for number, segment in enumerate(segments)
    ]


def format_timestamp(seconds: float, point: str = ".") -> str:
    """Format a time as hours, minutes, seconds and milliseconds: 00:01:02.345.

    Args:
        seconds: the time, at least 0.
        point: the decimal mark, "," in SubRip.
    """
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    hours, minutes = divmod(minutes, 60)
    whole_seconds, milliseconds = divmod(milliseconds, 1000)
    return f"{hours:02d}:{minutes:02d}:{whole_seconds:02d}{point}{milliseconds:03d}"


def _cue_text(text: str) -> str:
    return " ".join(text.replace("-->", "->").split())


def _escape_vtt(text: str) -> str:
    return _cue_text(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
