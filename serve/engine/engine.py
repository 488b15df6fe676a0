"""The thread that computes, and the doors to it.

Everything that touches a model's arrays happens on one thread, one bounded piece of work at a time;
the threads of several models take turns on the device. Callers put requests in and get events out,
from an event loop (`stream`) or from ordinary code (`generate`); leaving either early cancels the
request within one piece of work.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from typing import Protocol

from serve.engine.requests import Busy, Done, Event, Failed, Request, Scored, Token
from serve.engine.scheduler import Decode, Prefill, Scheduler, Sequence

log = logging.getLogger(__name__)

_DEVICE = threading.Lock()  # several models take turns, one piece of work each
FAILED = "The server had an error while processing your request."
IDLE_SECONDS = 3.0  # of quiet before the engine does something of its own


class Computer(Protocol):
    """What the engine needs of a model; `Runner` is the real one."""

    def prefill(self, row: Sequence) -> object | None: ...
    def decode(self, rows: list[Sequence]) -> object: ...
    def recover(self) -> bool: ...


class Engine:
    """Generates for many requests at a time.

    Args:
        computer: the model; touched by the engine's own thread only.
        scheduler: who computes next.
        context: positions a sequence may have.
        when_idle: work to do, one piece at a time, whenever nothing was asked for a while.
    """

    def __init__(
        self,
        computer: Computer,
        scheduler: Scheduler,
        context: int,
        when_idle: Iterable[Callable[[], None]] = (),
    ) -> None:
        self._computer, self._scheduler, self._context = computer, scheduler, context
        self._when_idle = list(when_idle)
        self._changed = threading.Condition()
        self._arrived: list[Sequence] = []  # guarded by _changed
        self._is_closing = False  # guarded by _changed
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    # -- doors ---------------------------------------------------------------------------------

    async def stream(self, request: Request) -> AsyncGenerator[Event, None]:
        """Yields the events of a request; always ends in Done or Failed.

        Raises:
            Busy: too many requests wait.
            ValueError: the request does not fit the model's context.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(events.put_nowait, event)

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

    def close(self, *, drain: bool = True, timeout: float = 30.0) -> None:
        """Stops the thread. May be called again.

        Args:
            drain: finish what was accepted, as far as it goes within the timeout; the rest, or
                everything, ends in Done("cancelled").
            timeout: seconds.
        """
        with self._changed:
            self._is_closing = True
            if not drain:
                self._cancel_all()
            self._changed.notify()
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._changed:
                self._cancel_all()
            self._thread.join(5.0)  # the piece of work in hand

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
            if self._is_closing:
                deliver(Done("cancelled"))
                return sequence
            if len(self._scheduler.waiting) + len(self._arrived) >= self._scheduler.max_waiting:
                raise Busy
            self._arrived.append(sequence)
            self._changed.notify()
        return sequence

    def _cancel(self, sequence: Sequence) -> None:
        with self._changed:
            sequence.is_cancelled = True
            self._changed.notify()

    def _cancel_all(self) -> None:
        for sequence in [*self._arrived, *self._scheduler.waiting, *self._scheduler.active]:
            sequence.is_cancelled = True

    # -- the device thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._work()
        except Exception:
            log.exception("the device thread cannot go on")
            with self._changed:
                self._is_closing = True
                for row in [*self._arrived, *self._scheduler.waiting, *self._scheduler.active]:
                    self._end(row, Failed(FAILED))

    def _work(self) -> None:
        scheduler = self._scheduler
        while True:
            is_quiet = False
            with self._changed:
                while scheduler.is_idle and not self._arrived and not is_quiet:
                    if self._is_closing:
                        return
                    is_called = self._changed.wait(IDLE_SECONDS if self._when_idle else None)
                    is_quiet = not is_called
                while self._arrived and len(scheduler.waiting) < scheduler.max_waiting:
                    scheduler.submit(self._arrived.pop(0))
                for sequence in [*scheduler.waiting, *scheduler.active]:
                    if sequence.is_cancelled:
                        self._end(sequence, Done("cancelled"))
                work = scheduler.next()
            if work is not None:
                self._compute(work)
            elif is_quiet:
                try:
                    with _DEVICE:
                        self._when_idle.pop(0)()
                except Exception:
                    log.exception("work in an idle moment failed")
                    self._computer.recover()

    def _compute(self, work: Prefill | Decode) -> None:
        rows = [work.sequence] if isinstance(work, Prefill) else list(work.sequences)
        try:
            with _DEVICE:
                if isinstance(work, Prefill):
                    drawn = self._computer.prefill(work.sequence)
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
            return
        if rows[0].scores is not None:
            self._tell_scores(rows[0])
        if drawn is not None:
            with self._changed:
                for i, row in enumerate(rows):
                    self._take(row, drawn, i)

    def _tell_scores(self, row: Sequence) -> None:
        """Delivers what the chunk just read says of the prompt, once even if it was read twice."""
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
            self._end(row, Done("stop"))
            return
        row.ids.append(token)
        if row.generated > row.delivered:
            row.delivered += 1
            row.deliver(_token(token, drawn, i, request.top_logprobs))
        if row.generated == request.max_tokens:
            self._end(row, Done("length"))

    def _end(self, row: Sequence, event: Done | Failed) -> None:
        self._scheduler.finish(row)
        row.deliver(event)


def _token(token: int, drawn, i: int, top_logprobs: int | None) -> Token:
    if top_logprobs is None:
        return Token(token)
    ids, values = drawn.top_ids[i, :top_logprobs], drawn.top_logprobs[i, :top_logprobs]
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(token, float(drawn.logprobs[i]), top)
