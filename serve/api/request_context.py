"""The state of one request while it is served.

The outermost middleware creates a `RequestContext`, authentication sets its client, the routes set
its model and token counts. After the response `metrics.py` and `logs.py` report it. It holds no
text of prompts or responses.
"""

import time
import uuid
from dataclasses import dataclass, field

from starlette.types import Scope

from serve.api.unused_fields import Unused


@dataclass
class RequestContext:
    """The state of one request. Times are seconds of `time.perf_counter`.

    Attributes:
        timeout: Longest time to compute a response, in seconds; None for no limit.
        id: Value of the ``x-request-id`` header.
        arrival_time: Time at which the request arrived.
        client: Name of the API key, or the client's address.
        owner: Name of the API key, to which stored objects belong; "" without a key.
        priority: 0 for interactive requests, 1 for those of a batch; see `SequenceRequest`.
        model: Id of the model.
        is_pattern: Whether the name of the model in the request matched a pattern of names.
        unused_fields: Fields of the request without effect; see `unused_fields.py`.
        not_assessed: Categories that the moderation model does not assess.
        prompt_tokens: Number of tokens of all prompts.
        cached_tokens: Number of prompt tokens found in the prefix cache.
        generated_tokens: Number of generated tokens.
        first_token_time: Time at which the first token was generated.
        last_token_time: Time at which the latest token was generated.
    """

    timeout: float | None = None
    id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    arrival_time: float = field(default_factory=time.perf_counter)
    client: str = ""
    owner: str = ""
    priority: int = 0
    model: str = ""
    is_pattern: bool = False
    unused_fields: list[Unused] = field(default_factory=list)
    not_assessed: tuple[str, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    first_token_time: float | None = None
    last_token_time: float | None = None

    @property
    def seconds(self) -> float:
        """The seconds since the request arrived."""
        return time.perf_counter() - self.arrival_time

    def record_token(self) -> None:
        """Count a generated token and record its time."""
        self.last_token_time = time.perf_counter()
        self.first_token_time = self.first_token_time or self.last_token_time
        self.generated_tokens += 1


def context_of(scope: Scope) -> RequestContext:
    """Return the context of the request with this ASGI scope."""
    return scope["state"]["context"]
