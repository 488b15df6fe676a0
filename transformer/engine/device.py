"""The device thread: runs bounded work items of all models, one at a time.

Concurrent computations would slow each other down on one device. So all models share one thread,
which runs work items of well under a third of a second on two cores: a chunk of a prompt, a
decoding step, a padded batch of an encoder, an audio window, a denoising step. Work items come from
work sources (engines and queues); the source that has had the least device time goes next
("start-time fair queueing", Goyal, Vin & Cheng 1996, SIGCOMM). A long job delays other sources by
one work item, not by the whole job, and a source that was idle does not catch up on device time.

There are two interfaces:

- `WorkQueue`, a queue of functions, for work that is known in advance. The caller gets the result
  or the error of the function. Consecutive calls alternate with the work of other sources:

      work_queue = WorkQueue(default_device())
      encode_batch = lambda: np.asarray(encode(params, batch))
      vectors = await work_queue.run(encode_batch)  # in an event loop
      vectors = work_queue.run_sync(encode_batch)  # in synchronous code

  A function must wait for its arrays (`np.asarray`, `block_until_ready`) before it returns;
  otherwise the next work item would run at the same time.
- `WorkSource`, for work that is chosen when the device is free: `Engine` selects the sequences of a
  step just before the step begins.

Leaves out: more than one device, and preemption of a work item.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from transformer.engine.requests import Busy

log = logging.getLogger(__name__)

T = TypeVar("T")
WorkItem = Callable[[], None]


class WorkSource:
    """A source of work items, such as an engine or a `WorkQueue`.

    `Device.condition` guards all state that the device thread shares with callers.

    Attributes:
        weight: device time is divided among busy sources in proportion to their weights.
        virtual_time: device seconds used so far, divided by the weight; only the device changes it.
    """

    weight = 1.0
    virtual_time = 0.0

    def next_item(self) -> WorkItem | None:
        """Return the next work item, or None to sleep until `Device.wake`.

        The device thread calls it with the lock held, just before it runs the work item.
        """
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        """End all pending work of this source after a work item or `next_item` raised an error.

        The device thread calls it with the lock held.
        """
        raise NotImplementedError


class Device:
    """One thread that runs the work items of all sources.

    Args:
        clock: returns the time in seconds.

    Attributes:
        condition: guards the queues of all sources, and is notified when they change.
        num_items: the number of work items run so far.
        busy_seconds: the total duration of these work items.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.condition = threading.Condition()
        self.num_items, self.busy_seconds = 0, 0.0
        self._clock = clock
        self._runnable: list[WorkSource] = []  # sources that might have work
        self._virtual_time = 0.0  # of the source that ran last
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the device accepts work."""
        return self._thread.is_alive() and not self._is_closed

    def wake(self, source: WorkSource) -> None:
        """Mark a source as runnable; call this with the lock (`condition`) held.

        Raises:
            RuntimeError: the thread has ended.
        """
        if not self.is_alive:
            raise RuntimeError("the device thread has ended")
        if source not in self._runnable:
            # A source that was idle does not get the device time it did not use.
            source.virtual_time = max(source.virtual_time, self._virtual_time)
            self._runnable.append(source)
            self.condition.notify_all()

    def close(self) -> None:
        """Stop the thread after the current work item; further calls do nothing."""
        with self.condition:
            self._is_closed = True
            self.condition.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._run_one():
                pass
        finally:
            with self.condition:
                self._is_closed = True
                for source in self._runnable:
                    source.fail(RuntimeError("the device thread has ended"))
                self._runnable.clear()
                self.condition.notify_all()

    def _run_one(self) -> bool:
        """Wait for a source with work, and run one work item of it; return False if closed."""
        with self.condition:
            while not (self._runnable or self._is_closed):
                self.condition.wait()
            if self._is_closed:
                return False
            source = min(self._runnable, key=lambda source: source.virtual_time)
            self._virtual_time = source.virtual_time
            item = self._guarded(source, source.next_item)
            if item is None:
                self._runnable.remove(source)
                return True
        started = self._clock()
        self._guarded(source, item)
        seconds = self._clock() - started
        with self.condition:
            source.virtual_time += seconds / source.weight
            self.num_items += 1
            self.busy_seconds += seconds
        return True

    def _guarded(self, source: WorkSource, step: Callable[[], Any]) -> Any:
        """Call a function of a source; if it raises an error, end the work of this source."""
        try:
            return step()
        except Exception as error:
            log.exception("a work item failed; the pending work of its source ends")
            with self.condition:
                source.fail(error)
            return None


@functools.cache
def default_device() -> Device:
    """Return the device of this process; the first call starts its thread."""
    device = Device()
    # If the process exited while this thread is inside XLA, it would abort.
    atexit.register(device.close)
    return device


class WorkQueue(WorkSource):
    """A first-in, first-out queue of functions to run on a device.

    Args:
        device: the device that runs the functions.
        weight: device time is divided among busy sources in proportion to their weights.
        max_waiting: the maximum number of waiting functions; further calls raise `Busy`.
    """

    def __init__(self, device: Device, *, weight: float = 1.0, max_waiting: int = 256) -> None:
        self._device, self.weight, self._max_waiting = device, weight, max_waiting
        self._waiting: deque[tuple[Future, Callable[[], Any]]] = deque()
        self._users: set[object] = set()

    def __len__(self) -> int:
        """Return the number of waiting functions."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether no job uses the queue; see `using`."""
        return not self._users

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Within the block, count the queue as not idle, even between the functions of one job."""
        user = object()
        self._users.add(user)
        try:
            yield
        finally:
            self._users.remove(user)

    async def run(self, function: Callable[[], T]) -> T:
        """Run a function on the device thread and return its result.

        If the call is cancelled while the function waits, the function does not run.

        Raises:
            Busy: `max_waiting` functions are waiting.
            RuntimeError: the device thread has ended.
            Exception: any error that the function raises.
        """
        return await asyncio.wrap_future(self._submit(function))

    def run_sync(self, function: Callable[[], T]) -> T:
        """Run a function as `run` does, from synchronous code."""
        return self._submit(function).result()

    def _submit(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._device.condition:
            if len(self._waiting) >= self._max_waiting:
                raise Busy
            self._device.wake(self)
            self._waiting.append((future, function))
        return future

    def next_item(self) -> WorkItem | None:
        """Return the next function that is not cancelled, as a work item; None if there is none."""
        while self._waiting:
            future, function = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                return functools.partial(_settle, future, function)
        return None

    def fail(self, error: Exception) -> None:
        """Raise the error in every waiting call."""
        while self._waiting:
            future, _ = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


def _settle(future: Future[T], function: Callable[[], T]) -> None:
    try:
        result = function()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)
