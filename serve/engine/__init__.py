"""The engine: many conversations, one device thread.

Read `requests.py` (what goes in and out), then `device.py` (whose turn it is among models),
`scheduler.py` (who computes next in one), `runner.py` (what is computed), `engine.py` (what joins
them).
"""

from serve.engine.device import Device, Lane, default_device
from serve.engine.engine import Engine, Stats
from serve.engine.requests import Began, Busy, Done, Event, Failed, Request, Scored, Token

__all__ = [
    "Began",
    "Busy",
    "Device",
    "Done",
    "Engine",
    "Event",
    "Failed",
    "Lane",
    "Request",
    "Scored",
    "Stats",
    "Token",
    "default_device",
]
