"""The engine: joins requests, scheduler and model.

Callers submit requests and receive events, from an event loop (`stream`) or from synchronous code
(`generate`, `generate_batch`). Closing the iterator early cancels the request before the engine's
next work item. Only the device thread (`device.py`) uses the arrays of a model, one bounded work
item at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
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
    GrammarError,
    PrefillDone,
    PromptLogprobs,
    SequenceRequest,
    Token,
)
from transformer.engine.scheduler import Decode, Prefill, Scheduler, Sequence
from transformer.sampling import SampleOutput

log = logging.getLogger(__name__)

FAILURE_MESSAGE = "a computation of the model failed"
NAN_MESSAGE = "the logits of the model are NaN: its weights are damaged, or overflow in this dtype"
UNREAD_MESSAGE = "the client did not read the response as it came, so the request was cancelled"
MAX_UNREAD_EVENTS = 4096  # per request; most clients read each event before the next
MIN_TIMED_TOKENS = 32  # fewer tokens of a sequence give no reliable speed for `on_speed`
MAX_RETRY_AFTER = 60.0  # seconds; upper bound of `Busy.retry_after`


class ModelRunner(Protocol):
    """The interface between the engine and a model; `Runner` implements it."""

    @property
    def max_batch_size(self) -> int:
        """Return the current maximum number of sequences in a decoding step."""
        ...

    def prefill(
        self, sequence: Sequence, block_copy: tuple[int, int] | None
    ) -> SampleOutput | None:
        """Compute the next chunk of a prompt; after the last chunk, sample the first token."""
        ...

    def decode(self, sequences: list[Sequence]) -> SampleOutput:
        """Run the model on the last token of each sequence, and sample its next token."""
        ...

    def recover(self) -> bool:
        """Restore a valid state after an error; return whether the KV cache was lost."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counters of an engine since its start, and its current state.

    Attributes:
        prompt_tokens: number of tokens of all prefilled prompts.
        cached_tokens: number of these prompt tokens that were taken from the prefix cache.
        generated_tokens: number of tokens sampled and delivered.
        prefill_chunks: number of computed prompt chunks.
        decode_steps: number of computed decoding steps.
        decoded_rows: the sum of the batch sizes of all decoding steps.
        finished: number of ended sequences by reason: "stop", "length", "cancelled", "timeout",
            "failed".
        preemptions: how often a sequence was preempted because no block was free.
        waiting: current number of sequences in the queue.
        running: current number of sequences in a slot.
        slots: the maximum number of running sequences.
        blocks: the number of blocks of the KV cache.
        blocks_held: current number of blocks that running sequences use.
        blocks_cached: current number of other blocks that stay in the prefix cache.
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
    """Generates many sequences at a time with one model.

    Args:
        runner: the model; only the device thread calls it.
        scheduler: decides what to compute next.
        context: the maximum number of positions of a sequence.
        device: the device thread; None for `default_device()`.
        clock: returns the time in seconds that `SequenceRequest.deadline` refers to.
        on_speed: called with (tokens, seconds) of decoding when a sequence ends during which no
            other sequence ran.
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
        self._counts: Counter[str] = Counter()  # by name of a field of `Stats`
        self._finished: Counter[str] = Counter()  # number of ended sequences by reason
        self._pending_speeds: list[tuple[int, float]] = []  # not yet passed to `on_speed`
        self._last_finish = self._clock()  # time at which the last sequence ended
        self._finish_interval = 1.0  # average seconds between the ends of two sequences

    # -- for callers ---------------------------------------------------------------------------

    async def stream(self, request: SequenceRequest) -> AsyncGenerator[Event, None]:
        """Yield the events of a request; the last event is Done or Failed.

        If `MAX_UNREAD_EVENTS` events are unread, the request is cancelled, to limit memory use.

        Raises:
            Busy: too many requests are waiting.
            ValueError: the request has no tokens to compute, or exceeds the context of the model.
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
            with contextlib.suppress(RuntimeError):  # the event loop is closed
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
        """Yield the events of a request as `stream` does, from synchronous code.

        Raises:
            Busy: too many requests are waiting.
            ValueError: the request has no tokens to compute, or exceeds the context of the model.
        """
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
        """Return the completions of many requests, in the order of the requests.

        Requests are taken from the iterable as slots become free, so there can be any number.

        Raises:
            Busy: too many requests of other callers are waiting.
            RuntimeError: a sequence failed.
            ValueError: a request has no tokens to compute, or exceeds the context of the model.
        """
        max_pending = 2 * self._scheduler.num_slots  # running, and enough waiting to replace them
        numbered: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        submitted: list[Sequence] = []
        events: list[list[Event]] = []  # per request
        num_done = 0
        remaining = iter(sequences)
        try:
            while True:
                num_free = max_pending + num_done - len(submitted)
                for request in itertools.islice(remaining, num_free):
                    # Queue limits apply only if no earlier request of this call is pending.
                    is_accepted = request.is_accepted or len(submitted) > num_done
                    deliver = partial(_put_numbered, numbered.put, len(submitted))
                    events.append([])
                    submitted.append(
                        self._submit(replace(request, is_accepted=is_accepted), deliver)
                    )
                if num_done == len(submitted):
                    return [_completion(sequence_events) for sequence_events in events]
                number, event = numbered.get()
                events[number].append(event)
                if isinstance(event, Failed):
                    raise RuntimeError(event.message)
                num_done += isinstance(event, Done)
        finally:
            for sequence in submitted:
                self._cancel(sequence)

    def close(self, *, drain: bool = True, timeout: float = 30.0) -> None:
        """Stop accepting requests, and finish or cancel those that were accepted.

        Further calls do nothing.

        Args:
            drain: whether to wait for accepted requests to finish. Requests that are unfinished
                after the timeout, or all if false, end with Done("cancelled").
            timeout: seconds to wait.
        """
        with self._condition:
            self._is_closing = True
            if not drain:
                self._cancel_all()
            if not self._condition.wait_for(lambda: self.is_idle, timeout):
                self._cancel_all()
                self._condition.wait_for(lambda: self.is_idle, 5.0)  # for the current work item

    @property
    def is_alive(self) -> bool:
        """Whether the engine accepts requests."""
        return self._device.is_alive and not self._is_closing

    @property
    def is_idle(self) -> bool:
        """Whether no sequence waits or runs."""
        return self._scheduler.is_idle

    def stats(self) -> Stats:
        """Return the counters since the start and the current state."""
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
        min_tokens = 1 if request.prompt_logprobs is None else 0
        if not request.prompt or request.max_tokens < min_tokens:
            raise ValueError(
                "a request must have a prompt and at least one token to generate or score, got "
                f"{len(request.prompt)} prompt tokens and max_tokens {request.max_tokens}"
            )
        if len(request.prompt) + request.max_tokens > self._context:
            raise ValueError(
                f"{len(request.prompt)} prompt tokens and max_tokens {request.max_tokens} exceed "
                f"the context of {self._context} tokens: shorten the prompt or lower max_tokens"
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
        sequence.is_cancelled = True  # read before this engine's next work item

    def _cancel_all(self) -> None:
        for sequence in [*self._scheduler.waiting, *self._scheduler.running]:
            sequence.is_cancelled = True

    # -- on the device thread ------------------------------------------------------------------

    def next_item(self) -> WorkItem | None:
        """Return the prefill chunk or decoding step that the scheduler chooses, or None.

        Before that, cancelled sequences and sequences past their deadline are ended.
        """
        scheduler, now = self._scheduler, self._clock()
        for sequence in [*scheduler.waiting, *scheduler.running]:
            if sequence.is_cancelled:
                self._finish(sequence, Done("cancelled"))
            elif (deadline := sequence.request.deadline) is not None and now >= deadline:
                self._finish(sequence, Done("timeout"))
        step = scheduler.schedule(self._runner.max_batch_size)
        if step is None:
            return None
        if len(scheduler.running) > 1:
            for sequence in scheduler.running:
                sequence.was_alone = False
        return partial(self._compute, step)

    def fail(self, error: Exception) -> None:
        """End every sequence with Failed, after an error outside the work on single sequences."""
        for sequence in [*self._scheduler.waiting, *self._scheduler.running]:
            self._finish(sequence, Failed(FAILURE_MESSAGE))

    def _compute(self, step: Prefill | Decode) -> None:
        sequences = [step.sequence] if isinstance(step, Prefill) else list(step.sequences)
        sequences = [s for s in sequences if self._update_bitmask(s)]
        if not sequences:
            return
        try:
            if isinstance(step, Prefill):
                output = self._runner.prefill(step.sequence, step.block_copy)
            else:
                output = self._runner.decode(sequences)
        except Exception:
            log.exception("a prefill or decoding step failed; its sequences end")
            is_lost = self._runner.recover()
            with self._condition:
                for sequence in sequences:
                    self._finish(sequence, Failed(FAILURE_MESSAGE))
                if is_lost:  # the KV cache was lost: recompute the other sequences
                    for sequence in self._scheduler.running[::-1]:
                        self._scheduler.preempt(sequence)
                    self._scheduler.block_pool.reset_prefix_cache()
            return
        with self._condition:
            if isinstance(step, Prefill):
                self._scheduler.register(step.sequence)
                self._report_prefill(step.sequence)
                self._counts["prefill_chunks"] += 1
            else:
                self._counts["decode_steps"] += 1
                self._counts["decoded_rows"] += len(sequences)
            if output is not None:
                for i, sequence in enumerate(sequences):
                    self._append_token(sequence, output, i)
            speeds, self._pending_speeds = self._pending_speeds, []
        for speed in speeds:  # outside the lock, because the callback can be slow
            self._on_speed(*speed)

    def _update_bitmask(self, sequence: Sequence) -> bool:
        """Compute which tokens the grammar allows next.

        Returns:
            Whether the sequence goes on. If its grammar fails, the sequence ends with `Failed`; the
            other sequences of the batch have their own matchers and go on.
        """
        if sequence.request.grammar is None:
            return True
        try:
            if sequence.matcher is None:  # new, or preempted and recomputed
                sequence.matcher = sequence.request.grammar.matcher()
            sequence.token_bitmask = sequence.matcher.token_bitmask()
        except GrammarError as error:
            with self._condition:
                self._finish(sequence, Failed(str(error), is_grammar_error=True))
            return False
        return True

    def _report_prefill(self, sequence: Sequence) -> None:
        """Deliver the log-probabilities of a prompt chunk, and PrefillDone after the last chunk."""
        if sequence.chunk_scores is not None:
            self._report_prompt_logprobs(sequence, sequence.chunk_scores)
            sequence.chunk_scores = None
        if not sequence.is_prefilling and not sequence.is_prefill_reported:
            sequence.is_prefill_reported, sequence.prefill_end = True, self._clock()
            sequence.deliver(PrefillDone(sequence.num_cached_tokens))
            self._counts["prompt_tokens"] += len(sequence.request.prompt)
            self._counts["cached_tokens"] += sequence.num_cached_tokens

    def _report_prompt_logprobs(self, sequence: Sequence, scores: SampleOutput) -> None:
        if sequence.num_scored == 0:
            sequence.num_scored = 1
            sequence.deliver(PromptLogprobs((Token(sequence.ids[0]),)))
        # The last token of a chunk predicts the first token of the next chunk.
        end = min(sequence.num_computed_tokens + 1, len(sequence.request.prompt))
        first = sequence.num_computed_tokens - len(scores.ids) + 1  # the position of scores.ids[0]
        tokens = tuple(
            _token(sequence.ids[p], scores, p - first, sequence.request.prompt_logprobs)
            for p in range(max(sequence.num_scored, first), end)
        )
        if tokens:
            sequence.num_scored = end
            sequence.deliver(PromptLogprobs(tokens))

    def _append_token(self, sequence: Sequence, output: SampleOutput, i: int) -> None:
        """Append the token in row `i` of the output to a sequence and deliver it, or end it."""
        token, request = int(output.ids[i]), sequence.request
        if request.max_tokens == 0:  # only prompt log-probabilities were requested
            self._finish(sequence, Done("length"))
            return
        if math.isnan(output.logprobs[i]):
            self._finish(sequence, Failed(NAN_MESSAGE))
            return
        if sequence.num_generated < len(sequence.preempted_ids):  # recomputed: keep the old token
            token = sequence.preempted_ids[sequence.num_generated]
        if token in request.stop_ids:
            has_logprobs = request.top_logprobs is not None
            stop_token = _token(token, output, i, request.top_logprobs) if has_logprobs else None
            self._finish(sequence, Done("stop", stop_token))
            return
        sequence.ids.append(token)
        if sequence.num_generated > sequence.num_delivered:
            sequence.num_delivered += 1
            sequence.deliver(_token(token, output, i, request.top_logprobs))
            self._counts["generated_tokens"] += 1
        if sequence.matcher is not None:
            try:
                sequence.matcher.accept(token)
            except GrammarError as error:
                self._finish(sequence, Failed(str(error), is_grammar_error=True))
                return
            if sequence.matcher.is_finished:
                self._finish(sequence, Done("stop"))
                return
        if sequence.num_generated == request.max_tokens:
            self._finish(sequence, Done("length"))

    def _finish(self, sequence: Sequence, event: Done | Failed) -> None:
        self._scheduler.finish(sequence)
        sequence.deliver(event)
        now = self._clock()
        interval = now - self._last_finish
        self._finish_interval, self._last_finish = 0.8 * self._finish_interval + 0.2 * interval, now
        self._finished[event.finish_reason if isinstance(event, Done) else "failed"] += 1
        if sequence.was_alone and sequence.num_delivered > MIN_TIMED_TOKENS:
            self._pending_speeds.append((sequence.num_delivered - 1, now - sequence.prefill_end))
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
            token for event in events if isinstance(event, PromptLogprobs) for token in event.tokens
        ),
    )


def _token(id: int, output: SampleOutput, i: int, top_logprobs: int | None) -> Token:
    if top_logprobs is None:
        return Token(id)
    ids, values = output.top_ids[i, :top_logprobs], output.top_logprobs[i, :top_logprobs]
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(id, float(output.logprobs[i]), top)
