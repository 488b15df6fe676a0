"""The engine: many conversations, one device thread.

Read `requests.py` (what goes in and out), then `scheduler.py` (who computes next), `runner.py`
(what is computed), `engine.py` (the thread that joins them), `load.py` (how a model gets here).
"""

from serve.engine.engine import Engine
from serve.engine.load import ServedModel, load_model
from serve.engine.requests import Busy, Done, Event, Failed, Request, Scored, Token

__all__ = [
    "Busy",
    "Done",
    "Engine",
    "Event",
    "Failed",
    "Request",
    "Scored",
    "ServedModel",
    "Token",
    "load_model",
]
