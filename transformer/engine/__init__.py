"""The engine: many sequences generated at a time, by one device thread.

    from transformer.engine import Request, build_engine

Read `requests.py` (what goes in and out), then `device.py` (whose turn it is among models),
`scheduler.py` (which sequence computes next), `runner.py` (what is computed), `engine.py` (what
joins them), `build.py` (from weights to an engine).
"""

from transformer.engine.build import build_engine
from transformer.engine.device import Device, WorkQueue, default_device
from transformer.engine.engine import Engine, Stats
from transformer.engine.requests import (
    Busy,
    Completion,
    Done,
    Event,
    Failed,
    PrefillDone,
    PromptLogprobs,
    SequenceRequest,
    Token,
)

__all__ = [
    "PrefillDone",
    "Busy",
    "Completion",
    "Device",
    "Done",
    "Engine",
    "Event",
    "Failed",
    "WorkQueue",
    "SequenceRequest",
    "PromptLogprobs",
    "Stats",
    "Token",
    "build_engine",
    "default_device",
]
