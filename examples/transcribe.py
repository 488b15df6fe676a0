"""Print the text of a recording: `python examples/transcribe.py MODEL_FOLDER speech.mp3`."""

import sys

import audio

whisper = audio.load_model(sys.argv[1])
for segment in audio.transcribe(whisper, sys.argv[2]).segments:
    print(f"{segment.start:.1f}-{segment.end:.1f} s:{segment.text}")
