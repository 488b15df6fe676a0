"""Sound to text: Whisper, stage by stage, as pure functions over arrays.

Read in this order: `container` and `load` (files to samples), `mel` (samples to a spectrogram),
`config` and `model` (spectrogram to logits), `tokens` (what the ids mean), `decode` (one window of
30 seconds), `transcribe` (sounds of any length), `timing` (when each word was said), `vad` (where
anybody speaks), `subtitles` (writing it all down).

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
