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

from transformer.engine.device import Device, WorkItem, WorkSource, default_device
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
from transformer.engine.scheduler import Decode, Prefill, Scheduler, Sequence

log = logging.getLogger(__name__)

FAILURE_MESSAGE = "The server had an error while processing your request."
UNREAD_MESSAGE = "The answer was not read as it came, and was given up."
MAX_UNREAD_EVENTS = (
    4096  # events that may wait for who asked; most have read one before the next comes
)
MIN_TIMED_TOKENS = 32  # of a row that was alone, for its speed to mean something
MAX_RETRY_AFTER = 60.0  # seconds; what a client is told at most when the queue is full


class ModelRunner(Protocol):
    """What the engine needs of a model; `Runner` is the real one."""

    max_batch_size: int  # that decode together just now

    def prefill(self, sequence: Sequence, block_copy: tuple[int, int] | None) -> object | None: ...
    def decode(self, sequences: list[Sequence]) -> object: ...
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
    prefill_chunks: int = 0
    decode_steps: int = 0
    decoded_rows: int = 0
    finished: dict[str, int]
    preemptions: int = 0
    waiting: int = 0
    running: int = 0
    slots: int = 0
    blocks: int = 0
    blocks_held: int = 0
    blocks_cached: int = 0


class Engine(WorkSource):
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
        runner: ModelRunner,
        scheduler: Scheduler,
        context: int,
        device: Device | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_speed: Callable[[int, float], None] = lambda tokens, seconds: None,
    ) -> None:
        self._runner, self._scheduler, self._context = runner, scheduler, context
        self._device = device or default_device()
        self._condition = self._device.condition  # guards everything below, and the scheduler
        self._clock, self._on_speed = clock, on_speed
        self._is_closing = False
        self._counts: Counter[str] = Counter()  # fields of Stats
        self._finished: Counter[str] = Counter()  # how requests ended
        self._pending_speeds: list[tuple[int, float]] = []  # that `on_speed` was not told yet
        self._last_finish = self._clock()  # when a request last did
        self._finish_interval = (
            1.0  # seconds from the end of one request to that of the next, on average
        )

    # -- doors ---------------------------------------------------------------------------------

    async def stream(self, request: SequenceRequest) -> AsyncGenerator[Event, None]:
        """Yields the events of a request; always ends in Done or Failed.

        Who does not read on for `MAX_UNREAD` events is given up: memory is for those who do.

        Raises:
            Busy: too many requests wait.
            ValueError: the request does not fit the model's context.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def put(event: Event) -> None:
            if events.qsize() == MAX_UNREAD_EVENTS:
                self._cancel(sequence)
                event = Failed(UNREAD_MESSAGE)
            if events.qsize() <= MAX_UNREAD_EVENTS:
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

    def generate(self, request: SequenceRequest) -> Generator[Event, None, None]:
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

    def generate_batch(self, sequences: Iterable[SequenceRequest]) -> list[Completion]:
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
        todo = iter(sequences)
        try:
            while True:
                for request in itertools.islice(todo, room + done - len(submitted)):
                    # The first is admitted as any request is; those that follow belong to it.
                    request = replace(
                        request, is_later=request.is_accepted or len(submitted) > done
                    )
                    deliver = partial(_put_numbered, arrived.put, len(submitted))
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
        with self._condition:
            self._is_closing = True
            if not drain:
                self._cancel_all()
            if not self._condition.wait_for(lambda: self.is_idle, timeout):
                self._cancel_all()
                self._condition.wait_for(lambda: self.is_idle, 5.0)  # the piece of work in hand

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
        with self._condition:
            scheduler, blocks = self._scheduler, self._scheduler.block_pool
            return Stats(
                **self._counts,
                finished=dict(self._finished),
                preemptions=scheduler.num_preemptions,
                waiting=len(scheduler.waiting),
                running=len(scheduler.running),
                slots=scheduler.num_slots,
                blocks=blocks.num_blocks,
                blocks_held=blocks.num_blocks - blocks.num_free_blocks,
                blocks_cached=blocks.num_cached_blocks,
            )

    def _submit(self, request: SequenceRequest, deliver: Callable[[Event], None]) -> Sequence:
        least = 1 if request.prompt_logprobs is None else 0
        if not request.prompt or request.max_tokens < least:
            raise ValueError("a request needs a prompt and at least one token to generate or score")
        if len(request.prompt) + request.max_tokens > self._context:
            raise ValueError(
                f"{len(request.prompt)} prompt tokens and {request.max_tokens} to generate are "
                f"more than the context of {self._context}"
            )
        sequence = Sequence(request, deliver)
        with self._condition:
            if not self.is_alive:
                deliver(Done("cancelled") if self._is_closing else Failed(FAILURE_MESSAGE))
                return sequence
            if self._scheduler.is_idle:
                self._last_finish = self._clock()
            try:
                self._scheduler.submit(sequence)
            except Busy as busy:
                retry_after = min(max(self._finish_interval, 1.0), MAX_RETRY_AFTER)
                raise Busy(retry_after, busy.num_waiting) from None
            self._device.wake(self)
        return sequence

    def _cancel(self, sequence: Sequence) -> None:
        sequence.is_cancelled = True  # looked at before this engine's next piece of work

    def _cancel_all(self) -> None:
        for sequence in [*self._scheduler.waiting, *self._scheduler.running]:
            sequence.is_cancelled = True

    # -- on the device thread ------------------------------------------------------------------

    def next_item(self) -> WorkItem | None:
        """A chunk or a step, whichever the scheduler says."""
        scheduler, now = self._scheduler, self._clock()
        for sequence in [*scheduler.waiting, *scheduler.running]:
            if sequence.is_cancelled:
                self._finish(sequence, Done("cancelled"))
            elif (deadline := sequence.request.deadline) is not None and now >= deadline:
                self._finish(sequence, Done("timeout"))
        work = scheduler.schedule(self._runner.max_batch_size)
        if work is None:
            return None
        if len(scheduler.running) > 1:
            for sequence in scheduler.running:
                sequence.was_alone = False
        return partial(self._compute, work)

    def fail(self, error: Exception) -> None:
        """Ends every request: something went wrong that is no request's own."""
        for sequence in [*self._scheduler.waiting, *self._scheduler.running]:
            self._finish(sequence, Failed(FAILURE_MESSAGE))

    def _compute(self, work: Prefill | Decode) -> None:
        rows = [work.sequence] if isinstance(work, Prefill) else list(work.sequences)
        try:
            if isinstance(work, Prefill):
                drawn = self._runner.prefill(work.sequence, work.block_copy)
            else:
                drawn = self._runner.decode(rows)
        except Exception:
            log.exception("a computation failed; its requests end")
            is_lost = self._runner.recover()
            with self._condition:
                for row in rows:
                    self._finish(row, Failed(FAILURE_MESSAGE))
                if is_lost:  # the cache went with the failure: the others start over
                    for row in self._scheduler.running[::-1]:
                        self._scheduler.preempt(row)
                    self._scheduler.block_pool.reset_prefix_cache()
            return
        with self._condition:
            if isinstance(work, Prefill):
                self._scheduler.register(work.sequence)
                self._report_prefill(work.sequence)
                self._counts["prefill_chunks"] += 1
            else:
                self._counts["decode_steps"] += 1
                self._counts["decoded_rows"] += len(rows)
            if drawn is not None:
                for i, row in enumerate(rows):
                    self._append_token(row, drawn, i)
            speeds, self._pending_speeds = self._pending_speeds, []
        for speed in speeds:  # outside the lock: whoever is told may take his time
            self._on_speed(*speed)

    def _report_prefill(self, row: Sequence) -> None:
        """Delivers what a chunk says of the prompt, and that it was read, once each."""
        if row.chunk_scores is not None:
            self._report_prompt_logprobs(row)
        if not row.is_prefilling and not row.is_prefill_reported:
            row.is_prefill_reported, row.prefill_end = True, self._clock()
            row.deliver(PrefillDone(row.num_cached_tokens))
            self._counts["prompt_tokens"] += len(row.request.prompt)
            self._counts["cached_tokens"] += row.num_cached_tokens

    def _report_prompt_logprobs(self, row: Sequence) -> None:
        drawn, row.chunk_scores = row.chunk_scores, None
        k = row.request.prompt_logprobs
        if row.num_scored == 0:
            row.num_scored = 1
            row.deliver(PromptLogprobs((Token(row.ids[0]),)))
        end = min(
            row.num_computed_tokens + 1, len(row.request.prompt)
        )  # its last token foretells the next
        first = row.num_computed_tokens - len(drawn.ids) + 1  # the position of drawn.ids[0]
        tokens = tuple(
            _token(row.ids[at], drawn, at - first, k)
            for at in range(max(row.num_scored, first), end)
        )
        if tokens:
            row.num_scored = end
            row.deliver(PromptLogprobs(tokens))

    def _append_token(self, row: Sequence, drawn, i: int) -> None:
        """Adds a drawn token to its row and tells the client."""
        token, request = int(drawn.ids[i]), row.request
        if request.max_tokens == 0:  # only the prompt was of interest
            self._finish(row, Done("length"))
            return
        if row.num_generated < len(
            row.preempted_ids
        ):  # it started over: what it said before stands
            token = row.preempted_ids[row.num_generated]
        if token in request.stop_ids:
            is_told = request.top_logprobs is not None
            end = _token(token, drawn, i, request.top_logprobs) if is_told else None
            self._finish(row, Done("stop", end))
            return
        row.ids.append(token)
        if row.num_generated > row.num_delivered:
            row.num_delivered += 1
            row.deliver(_token(token, drawn, i, request.top_logprobs))
            self._counts["generated_tokens"] += 1
        if row.num_generated == request.max_tokens:
            self._finish(row, Done("length"))

    def _finish(self, row: Sequence, event: Done | Failed) -> None:
        self._scheduler.finish(row)
        row.deliver(event)
        now = self._clock()
        self._finish_interval, self._last_finish = (
            0.8 * self._finish_interval + 0.2 * (now - self._last_finish),
            now,
        )
        self._finished[event.finish_reason if isinstance(event, Done) else "failed"] += 1
        if row.was_alone and row.num_delivered > MIN_TIMED_TOKENS:
            self._pending_speeds.append((row.num_delivered - 1, now - row.prefill_end))
        if self.is_idle:
            self._condition.notify_all()


def _put_numbered(put: Callable[[tuple[int, Event]], None], number: int, event: Event) -> None:
    put((number, event))


def _completion(events: list[Event]) -> Completion:
    end = events[-1]
    assert isinstance(end, Done)
    tokens = tuple(event for event in events if isinstance(event, Token))
    return Completion(
        ids=tuple(token.id for token in tokens),
        finish_reason=end.finish_reason,
        tokens=tokens,
        prompt_logprobs=tuple(
            t for event in events if isinstance(event, PromptLogprobs) for t in event.tokens
        ),
    )


def _token(token: int, drawn, i: int, top_logprobs: int | None) -> Token:
    if top_logprobs is None:
        return Token(token)
    ids, values = drawn.top_ids[i, :top_logprobs], drawn.top_logprobs[i, :top_logprobs]
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(token, float(drawn.logprobs[i]), top)
