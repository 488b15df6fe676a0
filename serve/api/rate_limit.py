"""How much one client may ask for, and that a server on its way out takes nothing new.

Requests a minute are limited, for each key, or each address where there are no keys. It is a token
bucket: a minute's worth may come at once, then as many as flow back. Each answer to a POST says in
OpenAI's ``x-ratelimit-*`` headers how many are left and when all are back; a refusal says how long
to wait, and clients do. Every other method is free. How long requests wait for the device, and
how many may, is the engine's business; the size of a body is that of `body_limit.py`.
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

MAX_CLIENTS = 10_000  # clients that are remembered before those with full buckets are forgotten
DRAIN_RETRY_SECONDS = 5
RATE_HEADERS = tuple(f"x-ratelimit-{what}-requests" for what in ("limit", "remaining", "reset"))


@translate(Busy)
def overloaded(error: Busy) -> APIError:
    """Return the 429 of a full queue, or of a client's full part of it."""
    reason = "That model is currently overloaded with other requests."
    if error.num_waiting is not None:
        reason = f"{error.num_waiting} of your requests wait already, as many as may."
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
    updated_at: float  # when that many were left


class RateLimiter:
    """A token bucket for each client.

    Args:
        per_minute: requests a client may make in a minute.
        clock: seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self.per_minute, self._clock = per_minute, clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, client: str) -> tuple[bool, float]:
        """Takes a request from a client's bucket, if one is there.

        Returns:
            Whether it was there, and how many requests are left, a fraction among them.
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

    def seconds_until(self, wanted: float, left: float) -> float:
        """How long it takes until `wanted` requests are there."""
        return max(wanted - left, 0) * 60 / self.per_minute

    def _refilled(self, bucket: _Bucket, now: float) -> float:
        return min(
            bucket.tokens + (now - bucket.updated_at) * self.per_minute / 60, self.per_minute
        )

    def _evict(self, now: float) -> None:
        full = [c for c, b in self._buckets.items() if self._refilled(b, now) >= self.per_minute]
        for client in full or list(self._buckets):
            del self._buckets[client]


class Admission:
    """Pure ASGI middleware that lets a request in, or says when to come again.

    Args:
        app: the next application.
        rate: the limit; None for none.
        is_draining: whether the server finishes what it has and takes nothing new.
    """

    def __init__(self, app: ASGIApp, limiter: RateLimiter | None, is_draining: Callable[[], bool]):
        self.app, self.limiter, self.is_draining = app, limiter, is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
        granted, left = self.limiter.take(context_of(scope).client)
        headers = rate_headers(self.limiter, left)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers)
            await send(message)

        if granted:
            return await self.app(scope, receive, send_with_headers)
        limit, wait = self.limiter.per_minute, self.limiter.seconds_until(1, left)
        error = APIError(
            429,
            f"Rate limit reached for requests per min (RPM): Limit {limit}, Used {limit}, "
            f"Requested 1. Please try again in {format_duration(wait)}.",
            type="requests",
            code="rate_limit_exceeded",
            headers={"retry-after": str(max(math.ceil(wait), 1))},
        )
        await error.response()(scope, receive, send_with_headers)


def rate_headers(rate: RateLimiter, left: float) -> dict[str, str]:
    """What OpenAI says of a limit on requests."""
    until_full = format_duration(rate.seconds_until(rate.per_minute, left))
    values = (str(rate.per_minute), str(int(left)), until_full)
    return dict(zip(RATE_HEADERS, values, strict=True))


def format_duration(seconds: float) -> str:
    """As OpenAI's headers spell it.

    >>> duration(0.017), duration(1), duration(20.5), duration(360), duration(3661)
    ('17ms', '1s', '20.5s', '6m0s', '1h1m1s')
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
