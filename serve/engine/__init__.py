"""The engine: many conversations, one device thread.

Read `requests.py` (what goes in and out), then `device.py` (whose turn it is among models),
`scheduler.py` (who computes next in one), `runner.py` (what is computed), `engine.py` (what joins
them), `load.py` (how a model gets here); `embedder.py` is all of it for encoders, `speech.py` for
Whisper, `drawing.py` for pictures.
"""

from serve.engine.device import Device, Lane, default_device
from serve.engine.drawing import DrawingModel, load_painter
from serve.engine.embedder import EmbeddingModel, load_embedder
from serve.engine.engine import Engine, Stats
from serve.engine.load import ServedModel, load_adapter, load_model
from serve.engine.requests import Began, Busy, Done, Event, Failed, Request, Scored, Token
from serve.engine.speech import SpeechModel, load_speech

AnyModel = ServedModel | EmbeddingModel | SpeechModel | DrawingModel

__all__ = [
    "AnyModel",
    "Began",
    "Busy",
    "Device",
    "Done",
    "DrawingModel",
    "EmbeddingModel",
    "Engine",
    "Event",
    "Failed",
    "Lane",
    "Request",
    "Scored",
    "ServedModel",
    "SpeechModel",
    "Stats",
    "Token",
    "default_device",
    "load_adapter",
    "load_embedder",
    "load_model",
    "load_painter",
    "load_speech",
]
