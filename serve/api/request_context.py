"""What is known of one request while it is served.

The outermost layer makes a `Call`; keys say who asks, the routes what for, and when the answer has
gone the same layer counts and logs what came of it (`metrics.py`, `logs.py`). Never the texts.
"""

import time
import uuid
from dataclasses import dataclass, field

from starlette.types import Scope


@dataclass
class RequestContext:
    """One request.

    Attributes:
        timeout: seconds that an answer may take to compute; None for no limit.
        id: what ``x-request-id`` says.
        began: when it came, on the clock of `time.perf_counter`.
        client: who asks: the name of a key, else an address.
        model: the id of the model that answers.
        prompt_tokens: tokens of the prompt or prompts.
        cached_tokens: those of them that needed no reading.
        generated_tokens: tokens drawn.
        first_token: when the first was drawn.
        last_token: when the last was.
    """

    timeout: float | None = None
    id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    arrival_time: float = field(default_factory=time.perf_counter)
    client: str = ""
    model: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    first_token_time: float | None = None
    last_token_time: float | None = None

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.perf_counter() - self.arrival_time

    def record_token(self) -> None:
        """Notes that a token was drawn."""
        self.last_token_time = time.perf_counter()
        self.first_token_time = self.first_token_time or self.last_token_time
        self.generated_tokens += 1


def context_of(scope: Scope) -> RequestContext:
    """The call that a request's scope belongs to."""
    return scope["state"]["call"]
