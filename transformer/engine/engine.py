"""What joins requests, scheduler and model, and the doors to it.

Callers put requests in and get events out, from an event loop (`stream`) or from ordinary code
(`generate`); leaving either early cancels the request before its model's next piece of work.
Everything that touches a model's arrays happens on the device thread (`device.py`), one bounded
piece at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from transformer.engine.device import Device, Piece, Source, default_device
from transformer.engine.requests import (
    Began,
    Busy,
    Completion,
    Done,
    Event,
    Failed,
    Request,
    Scored,
    Token,
)
from transformer.engine.scheduler import Decode, Prefill, Scheduler, Sequence

log = logging.getLogger(__name__)

FAILED = "The server had an error while processing your request."
UNREAD = "The answer was not read as it came, and was given up."
MAX_UNREAD = 4096  # events that may wait for who asked; most have read one before the next comes
ENOUGH_TOKENS = 32  # of a row that was alone, for its speed to mean something
LONGEST_RETRY = 60.0  # seconds; what a client is told at most when the queue is full


class Computer(Protocol):
    """What the engine needs of a model; `Runner` is the real one."""

    max_rows: int  # that decode together just now

    def prefill(self, row: Sequence, copy: tuple[int, int] | None) -> object | None: ...
    def decode(self, rows: list[Sequence]) -> object: ...
    def recover(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What an engine did since it began, and how it stands. Tokens, if nothing else is said.

    Attributes:
        prompt_tokens: of prompts that were read.
        cached_tokens: those among them that had been read before.
        generated_tokens: drawn and delivered.
        chunks: pieces of prompts that were computed.
        steps: of decoding.
        stepped_rows: rows in all those steps together.
        requests: that ended, by how: "stop", "length", "cancelled", "timeout", "failed".
        restarts: rows that gave their blocks back and started over.
        waiting: requests in the queue now.
        running: requests in a slot now.
        slots: requests that can be in one.
        blocks: of the cache.
        blocks_held: by running requests now.
        blocks_remembering: held by nobody, kept for prompts that begin alike.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    chunks: int = 0
    steps: int = 0
    stepped_rows: int = 0
    requests: dict[str, int]
    restarts: int = 0
    waiting: int = 0
    running: int = 0
    slots: int = 0
    blocks: int = 0
    blocks_held: int = 0
    blocks_remembering: int = 0


class Engine(Source):
    """Generates for many requests at a time.

    Args:
        computer: the model; touched by the device thread only.
        scheduler: who computes next.
        context: positions a sequence may have.
        device: where it computes; the process's own if not given.
        clock: seconds, as of `Request.deadline`.
        on_speed: told (tokens, seconds) when a request that had the model for itself ends.
    """

    def __init__(
        self,
        computer: Computer,
        scheduler: Scheduler,
        context: int,
        device: Device | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_speed: Callable[[int, float], None] = lambda tokens, seconds: None,
    ) -> None:
        self._computer, self._scheduler, self._context = computer, scheduler, context
        self._device = device or default_device()
        self._changed = self._device.changed  # guards everything below, and the scheduler
        self._clock, self._on_speed = clock, on_speed
        self._is_closing = False
        self._counts: Counter[str] = Counter()  # fields of Stats
        self._ends: Counter[str] = Counter()  # how requests ended
        self._speeds: list[tuple[int, float]] = []  # that `on_speed` was not told yet
        self._ended = self._clock()  # when a request last did
        self._pace = 1.0  # seconds from the end of one request to that of the next, on average

    # -- doors ---------------------------------------------------------------------------------

    async def stream(self, request: Request) -> AsyncGenerator[Event, None]:
        """Yields the events of a request; always ends in Done or Failed.

        Who does not read on for `MAX_UNREAD` events is given up: memory is for those who do.

        Raises:
            Busy: too many requests wait.
            ValueError: the request does not fit the model's context.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def put(event: Event) -> None:
            if events.qsize() == MAX_UNREAD:
                self._cancel(sequence)
                event = Failed(UNREAD)
            if events.qsize() <= MAX_UNREAD:
                events.put_nowait(event)

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(put, event)

        sequence = self._submit(request, deliver)
        try:
            while True:
                event = await events.get()
                yield event
                if isinstance(event, Done | Failed):
                    return
        finally:
            self._cancel(sequence)

    def generate(self, request: Request) -> Generator[Event, None, None]:
        """The same, for ordinary code."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        sequence = self._submit(request, events.put)
        try:
            while True:
                event = events.get()
                yield event
                if isinstance(event, Done | Failed):
                    return
        finally:
            self._cancel(sequence)

    def generate_batch(self, requests: Iterable[Request]) -> list[Completion]:
        """Return the answers to many requests, in their order.

        Requests are taken from the iterable as there is room for them, so it may be long.

        Raises:
            Busy: too many requests of others wait.
            RuntimeError: an answer could not be finished.
            ValueError: a request does not fit the model's context.
        """
        room = 2 * self._scheduler.num_slots  # running, and enough waiting to replace them
        arrived: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        submitted: list[Sequence] = []
        events: list[list[Event]] = []  # of each request
        done = 0
        todo = iter(requests)
        try:
            while True:
                for request in itertools.islice(todo, room + done - len(submitted)):
                    # The first is admitted as any request is; those that follow belong to it.
                    request = replace(request, is_later=request.is_later or len(submitted) > done)
                    deliver = partial(_tagged, arrived.put, len(submitted))
                    events.append([])
                    submitted.append(self._submit(request, deliver))
                if done == len(submitted):
                    return [_completion(own) for own in events]
                number, event = arrived.get()
                events[number].append(event)
                if isinstance(event, Failed):
                    raise RuntimeError(event.message)
                done += isinstance(event, Done)
        finally:
            for sequence in submitted:
                self._cancel(sequence)

    def close(self, *, drain: bool = True, timeout: float = 30.0) -> None:
        """Ends what was accepted, and accepts no more. May be called again.

        Args:
            drain: finish what was accepted, as far as it goes within the timeout; the rest, or
                everything, ends in Done("cancelled").
            timeout: seconds.
        """
        with self._changed:
            self._is_closing = True
            if not drain:
                self._cancel_all()
            if not self._changed.wait_for(lambda: self.is_idle, timeout):
                self._cancel_all()
                self._changed.wait_for(lambda: self.is_idle, 5.0)  # the piece of work in hand

    @property
    def is_alive(self) -> bool:
        """Whether requests will be answered."""
        return self._device.is_alive and not self._is_closing

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits."""
        return self._scheduler.is_idle

    def stats(self) -> Stats:
        """Counts since the start, and how things stand now."""
        with self._changed:
            scheduler, blocks = self._scheduler, self._scheduler.blocks
            return Stats(
                **self._counts,
                requests=dict(self._ends),
                restarts=scheduler.restarts,
                waiting=len(scheduler.waiting),
                running=len(scheduler.active),
                slots=scheduler.num_slots,
                blocks=blocks.count,
                blocks_held=blocks.count - blocks.available,
                blocks_remembering=blocks.remembering,
            )

    def _submit(self, request: Request, deliver: Callable[[Event], None]) -> Sequence:
        least = 1 if request.prompt_logprobs is None else 0
        if not request.prompt or request.max_tokens < least:
            raise ValueError("a request needs a prompt and at least one token to generate or score")
        if len(request.prompt) + request.max_tokens > self._context:
            raise ValueError(
                f"{len(request.prompt)} prompt tokens and {request.max_tokens} to generate are "
                f"more than the context of {self._context}"
            )
        sequence = Sequence(request, deliver)
        with self._changed:
            if not self.is_alive:
                deliver(Done("cancelled") if self._is_closing else Failed(FAILED))
                return sequence
            if self._scheduler.is_idle:
                self._ended = self._clock()
            try:
                self._scheduler.submit(sequence)
            except Busy as busy:
                retry_after = min(max(self._pace, 1.0), LONGEST_RETRY)
                raise Busy(retry_after, busy.waiting) from None
            self._device.wake(self)
        return sequence

    def _cancel(self, sequence: Sequence) -> None:
        sequence.is_cancelled = True  # looked at before this engine's next piece of work

    def _cancel_all(self) -> None:
        for sequence in [*self._scheduler.waiting, *self._scheduler.active]:
            sequence.is_cancelled = True

    # -- on the device thread ------------------------------------------------------------------

    def next(self) -> Piece | None:
        """A chunk or a step, whichever the scheduler says."""
        scheduler, now = self._scheduler, self._clock()
        for sequence in [*scheduler.waiting, *scheduler.active]:
            if sequence.is_cancelled:
                self._end(sequence, Done("cancelled"))
            elif (deadline := sequence.request.deadline) is not None and now >= deadline:
                self._end(sequence, Done("timeout"))
        work = scheduler.next(self._computer.max_rows)
        if work is None:
            return None
        if len(scheduler.active) > 1:
            for sequence in scheduler.active:
                sequence.was_alone = False
        return partial(self._compute, work)

    def fail(self, error: Exception) -> None:
        """Ends every request: something went wrong that is no request's own."""
        for sequence in [*self._scheduler.waiting, *self._scheduler.active]:
            self._end(sequence, Failed(FAILED))

    def _compute(self, work: Prefill | Decode) -> None:
        rows = [work.sequence] if isinstance(work, Prefill) else list(work.sequences)
        try:
            if isinstance(work, Prefill):
                drawn = self._computer.prefill(work.sequence, work.copy)
            else:
                drawn = self._computer.decode(rows)
        except Exception:
            log.exception("a computation failed; its requests end")
            is_lost = self._computer.recover()
            with self._changed:
                for row in rows:
                    self._end(row, Failed(FAILED))
                if is_lost:  # the cache went with the failure: the others start over
                    for row in self._scheduler.active[::-1]:
                        self._scheduler.start_over(row)
                    self._scheduler.blocks.forget_all()
            return
        with self._changed:
            if isinstance(work, Prefill):
                self._scheduler.file(work.sequence)
                self._tell_reading(work.sequence)
                self._counts["chunks"] += 1
            else:
                self._counts["steps"] += 1
                self._counts["stepped_rows"] += len(rows)
            if drawn is not None:
                for i, row in enumerate(rows):
                    self._take(row, drawn, i)
            speeds, self._speeds = self._speeds, []
        for speed in speeds:  # outside the lock: whoever is told may take his time
            self._on_speed(*speed)

    def _tell_reading(self, row: Sequence) -> None:
        """Delivers what a chunk says of the prompt, and that it was read, once each."""
        if row.scores is not None:
            self._tell_scores(row)
        if not row.is_reading and not row.has_begun:
            row.has_begun, row.began = True, self._clock()
            row.deliver(Began(row.cached))
            self._counts["prompt_tokens"] += len(row.request.prompt)
            self._counts["cached_tokens"] += row.cached

    def _tell_scores(self, row: Sequence) -> None:
        drawn, row.scores = row.scores, None
        k = row.request.prompt_logprobs
        if row.scored == 0:
            row.scored = 1
            row.deliver(Scored((Token(row.ids[0]),)))
        end = min(row.length + 1, len(row.request.prompt))  # its last token foretells the next
        first = row.length - len(drawn.ids) + 1  # the position of drawn.ids[0]
        tokens = tuple(
            _token(row.ids[at], drawn, at - first, k) for at in range(max(row.scored, first), end)
        )
        if tokens:
            row.scored = end
            row.deliver(Scored(tokens))

    def _take(self, row: Sequence, drawn, i: int) -> None:
        """Adds a drawn token to its row and tells the client."""
        token, request = int(drawn.ids[i]), row.request
        if request.max_tokens == 0:  # only the prompt was of interest
            self._end(row, Done("length"))
            return
        if row.generated < len(row.known):  # it started over: what it said before stands
            token = row.known[row.generated]
        if token in request.stop_ids:
            is_told = request.top_logprobs is not None
            end = _token(token, drawn, i, request.top_logprobs) if is_told else None
            self._end(row, Done("stop", end))
            return
        row.ids.append(token)
        if row.generated > row.delivered:
            row.delivered += 1
            row.deliver(_token(token, drawn, i, request.top_logprobs))
            self._counts["generated_tokens"] += 1
        if row.generated == request.max_tokens:
            self._end(row, Done("length"))

    def _end(self, row: Sequence, event: Done | Failed) -> None:
        self._scheduler.finish(row)
        row.deliver(event)
        now = self._clock()
        self._pace, self._ended = 0.8 * self._pace + 0.2 * (now - self._ended), now
        self._ends[event.reason if isinstance(event, Done) else "failed"] += 1
        if row.was_alone and row.delivered > ENOUGH_TOKENS:
            self._speeds.append((row.delivered - 1, now - row.began))
        if self.is_idle:
            self._changed.notify_all()


def _tagged(put: Callable[[tuple[int, Event]], None], number: int, event: Event) -> None:
    put((number, event))


def _completion(events: list[Event]) -> Completion:
    end = events[-1]
    assert isinstance(end, Done)
    tokens = tuple(event for event in events if isinstance(event, Token))
    return Completion(
        ids=tuple(token.id for token in tokens),
        reason=end.reason,
        tokens=tokens,
        scored=tuple(t for event in events if isinstance(event, Scored) for t in event.tokens),
    )


def _token(token: int, drawn, i: int, top_logprobs: int | None) -> Token:
    if top_logprobs is None:
        return Token(token)
    ids, values = drawn.top_ids[i, :top_logprobs], drawn.top_logprobs[i, :top_logprobs]
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(token, float(drawn.logprobs[i]), top)
