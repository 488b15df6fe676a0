"""Speech to text: Whisper, stage by stage, as pure functions over arrays.

Reading order: `container` and `load` (files to samples), `mel` (samples to a spectrogram), `config`
and `model` (spectrogram to logits), `tokenizer` (text, special and timestamp tokens), `decode` (one
window of 30 seconds), `transcribe` (audio of any length), `timing` (word timestamps), `vad` (voice
activity detection), `subtitles` (output formats).

    import audio

    whisper = audio.load_model("models/whisper-tiny.en")
    result = audio.transcribe(whisper, "speech.mp3")
    print(result.text)
"""

from audio.decode import DecodingOptions, TemperatureFallback
from audio.load import load
from audio.transcribe import Segment, Transcript, TranscriptionOptions, transcribe
from audio.whisper import Whisper, load_model

__all__ = [
    "TemperatureFallback",
    "DecodingOptions",
    "TranscriptionOptions",
    "Segment",
    "Transcript",
    "Whisper",
    "load",
    "load_model",
    "transcribe",
]
