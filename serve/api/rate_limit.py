"""Limit the request rate of each client, and refuse new requests while the server drains.

The limit is in requests per minute, for each key, or for each address if there are no keys. It is a
token bucket: a client may send a minute's requests at once, and then as many as are refilled. Each
response to a POST reports the remaining requests and the time to a full bucket in OpenAI's
``x-ratelimit-*`` headers. A refusal says how long to wait. Methods other than POST are not limited.
The engine limits its queue, and `body_limit.py` the size of bodies.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import APIError, translate
from serve.api.request_context import context_of
from transformer.engine import Busy

MAX_CLIENTS = 10_000  # number of buckets at which full ones are evicted
DRAIN_RETRY_SECONDS = 5
RATE_HEADERS = tuple(f"x-ratelimit-{name}-requests" for name in ("limit", "remaining", "reset"))


@translate(Busy)
def overloaded(error: Busy) -> APIError:
    """Return the 429 error for a full queue, or for a client that has too many waiting requests."""
    reason = "That model is currently overloaded with other requests."
    if error.num_waiting is not None:
        reason = f"{error.num_waiting} of your requests are waiting already, which is the limit."
    seconds = math.ceil(error.retry_after)
    return APIError(
        429,
        f"{reason} Please try again in {seconds}s.",
        type="requests",
        code="rate_limit_exceeded",
        headers={"retry-after": str(max(seconds, 1))},
    )


@dataclass
class _Bucket:
    tokens: float
    updated_at: float  # time of the last refill, in seconds of the limiter's clock


class RateLimiter:
    """Limit the request rate with a token bucket per client. One token is one request.

    Args:
        per_minute: Number of requests that a client may make in a minute.
        clock: Returns the current time in seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self.per_minute, self._clock = per_minute, clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, client: str) -> tuple[bool, float]:
        """Take a token from a client's bucket, if it holds one.

        Returns:
            Whether a token was taken, and the remaining tokens, including a fraction.
        """
        now = self._clock()
        bucket = self._buckets.get(client)
        if bucket is None:
            if len(self._buckets) >= MAX_CLIENTS:
                self._evict(now)
            bucket = self._buckets[client] = _Bucket(float(self.per_minute), now)
        bucket.tokens = self._refilled(bucket, now)
        bucket.updated_at = now
        granted = bucket.tokens >= 1
        bucket.tokens -= granted
        return granted, bucket.tokens

    def seconds_until(self, target: float, tokens: float) -> float:
        """Return the seconds until a bucket is refilled from ``tokens`` to ``target`` tokens."""
        return max(target - tokens, 0) * 60 / self.per_minute

    def _refilled(self, bucket: _Bucket, now: float) -> float:
        return min(
            bucket.tokens + (now - bucket.updated_at) * self.per_minute / 60, self.per_minute
        )

    def _evict(self, now: float) -> None:
        full = [c for c, b in self._buckets.items() if self._refilled(b, now) >= self.per_minute]
        for client in full or list(self._buckets):
            del self._buckets[client]


class Admission:
    """Pure ASGI middleware that admits a request, or refuses it with the time to wait.

    Args:
        app: The next application.
        limiter: The rate limiter; None for no limit.
        is_draining: Returns whether the server refuses new requests.
    """

    def __init__(self, app: ASGIApp, limiter: RateLimiter | None, is_draining: Callable[[], bool]):
        self.app, self.limiter, self.is_draining = app, limiter, is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if self.is_draining():
            error = APIError(
                503,
                "The server is shutting down. Please try again later.",
                type="server_error",
                headers={"retry-after": str(DRAIN_RETRY_SECONDS), "connection": "close"},
            )
            return await error.response()(scope, receive, send)
        if self.limiter is None:
            return await self.app(scope, receive, send)
        granted, remaining = self.limiter.take(context_of(scope).client)
        headers = rate_headers(self.limiter, remaining)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers)
            await send(message)

        if granted:
            return await self.app(scope, receive, send_with_headers)
        limit, wait = self.limiter.per_minute, self.limiter.seconds_until(1, remaining)
        error = APIError(
            429,
            f"Rate limit reached for requests per min (RPM): Limit {limit}, Used {limit}, "
            f"Requested 1. Please try again in {format_duration(wait)}.",
            type="requests",
            code="rate_limit_exceeded",
            headers={"retry-after": str(max(math.ceil(wait), 1))},
        )
        await error.response()(scope, receive, send_with_headers)


def rate_headers(limiter: RateLimiter, remaining: float) -> dict[str, str]:
    """Return OpenAI's response headers for a rate limit."""
    until_full = format_duration(limiter.seconds_until(limiter.per_minute, remaining))
    values = (str(limiter.per_minute), str(int(remaining)), until_full)
    return dict(zip(RATE_HEADERS, values, strict=True))


def format_duration(seconds: float) -> str:
    """Format a duration as in OpenAI's headers.

    >>> format_duration(0.017), format_duration(1), format_duration(20.5)
    ('17ms', '1s', '20.5s')
    >>> format_duration(360), format_duration(3661)
    ('6m0s', '1h1m1s')
    """
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    tenths = math.ceil(seconds * 10)
    minutes, tenths = divmod(tenths, 600)
    text = f"{tenths / 10:g}s"
    if minutes:
        hours, minutes = divmod(minutes, 60)
        text = f"{minutes}m{text}"
        text = f"{hours}h{text}" if hours else text
    return text
