"""The engine: continuous batching, which generates many sequences at a time.

    from transformer.engine import SequenceRequest, build_engine

Reading order: `requests.py` (requests and events), `device.py` (how models share the device),
`scheduler.py` (which sequences are computed next), `block_pool.py` (the blocks of the KV cache and
the prefix cache), `runner.py` (the computation), `engine.py` (which joins these), `build.py` (from
weights to an engine).
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
    Grammar,
    GrammarError,
    GrammarMatcher,
    PrefillDone,
    PromptLogprobs,
    SequenceRequest,
    Token,
)

__all__ = [
    "Busy",
    "Completion",
    "Device",
    "Done",
    "Engine",
    "Event",
    "Failed",
    "Grammar",
    "GrammarError",
    "GrammarMatcher",
    "PrefillDone",
    "PromptLogprobs",
    "SequenceRequest",
    "Stats",
    "Token",
    "WorkQueue",
    "build_engine",
    "default_device",
]
