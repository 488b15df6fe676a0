"""The thread that computes: bounded pieces of work of all models, in turn.

A device does one thing at a time well, so everything that answers requests shares one thread, and
hands it work in pieces of well under a third of a second on two cores: a chunk of a prompt, a
decoding step, a padded batch of an encoder, a window of sound, a denoising step. Whoever has had
the least time of the device goes next ("start-time fair queueing", Goyal, Vin & Cheng 1996,
SIGCOMM): a long job of one kind makes another wait for a piece, not for the job, and saves up
nothing while it sleeps.

Two ways in:

- `Lane`, a queue of functions, for work whose next piece is known beforehand. What a piece returns
  or raises, its caller gets. Several calls that follow each other take turns with everybody else's:

      lane = Lane(default_device())
      vectors = await lane.run(lambda: np.asarray(encode(params, batch)))  # in an event loop
      vectors = lane.call(lambda: np.asarray(encode(params, batch)))  # in ordinary code

  A piece must wait for its arrays (`np.asarray`, `block_until_ready`) before it returns, or the
  next one begins beside it.
- `Source`, for those who decide at the last moment what to compute: `Engine` chooses the rows of a
  step when the step is about to begin.

Leaves out: more than one device, and pieces that can be interrupted.
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
    """Somebody with work for the device. What it shares with callers, `Device.changed` guards.

    Attributes:
        weight: its share of the device's time, relative to the others'.
    """

    weight = 1.0
    virtual_time = (
        0.0  # device seconds by weight, on the clock that all sources share; the device's own
    )

    def next_item(self) -> WorkItem | None:
        """The next piece of work; None sends the source to sleep until `Device.wake`.

        Called by the device thread with the lock held, just before the piece is to run.
        """
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        """Ends everything this source has in hand: a piece, or `next`, raised. Lock held."""
        raise NotImplementedError


class Device:
    """One thread and the sources it serves.

    Attributes:
        changed: the lock around the queues of all sources, and how they tell of changes.
        pieces: how many pieces of work were done.
        seconds: how long they took together.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.condition = threading.Condition()
        self.num_items, self.busy_seconds = 0, 0.0
        self._clock = clock
        self._runnable: list[WorkSource] = []  # those that may have work
        self._virtual_time = 0.0  # on the clock of `Source.spent`: where whoever runs stands
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether work that is handed in will be done."""
        return self._thread.is_alive() and not self._is_closed

    def wake(self, source: WorkSource) -> None:
        """Says that a source has work. To be called with the lock held; cheap, so call it freely.

        Raises:
            RuntimeError: the thread has ended.
        """
        if not self.is_alive:
            raise RuntimeError("the device thread has ended")
        if source not in self._runnable:
            source.virtual_time = max(
                source.virtual_time, self._virtual_time
            )  # no credit for time asleep
            self._runnable.append(source)
            self.condition.notify_all()

    def close(self) -> None:
        """Ends the thread after the piece in hand. May be called again."""
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
        """One piece of one source; False when closed."""
        with self.condition:
            while not (self._runnable or self._is_closed):
                self.condition.wait()
            if self._is_closed:
                return False
            source = min(self._runnable, key=lambda source: source.virtual_time)
            self._virtual_time = source.virtual_time
            piece = self._guarded(source, source.next_item)
            if piece is None:
                self._runnable.remove(source)
                return True
        started = self._clock()
        self._guarded(source, piece)
        seconds = self._clock() - started
        with self.condition:
            source.virtual_time += seconds / source.weight
            self.num_items += 1
            self.busy_seconds += seconds
        return True

    def _guarded(self, source: WorkSource, step: Callable[[], Any]) -> Any:
        """A source that raises loses what it has in hand; the others do not."""
        try:
            return step()
        except Exception as error:
            log.exception("work for the device failed")
            with self.condition:
                source.fail(error)
            return None


@functools.cache
def default_device() -> Device:
    """The device thread of this process, started when first asked for."""
    device = Device()
    # A process that ends while this thread is inside XLA would abort instead.
    atexit.register(device.close)
    return device


class WorkQueue(WorkSource):
    """A queue of pieces, first come, first served.

    Args:
        device: who computes them.
        weight: their share of its time.
        max_waiting: pieces that may wait.
    """

    def __init__(self, device: Device, *, weight: float = 1.0, max_waiting: int = 256) -> None:
        self._device, self.weight, self._max_waiting = device, weight, max_waiting
        self._waiting: deque[tuple[Future, Callable[[], Any]]] = deque()
        self._users: set[object] = set()

    def __len__(self) -> int:
        """How many pieces wait."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether nobody is `using` it."""
        return not self._users

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Holds it for work of several pieces: between two of them it is not idle."""
        user = object()
        self._users.add(user)
        try:
            yield
        finally:
            self._users.remove(user)

    async def run(self, function: Callable[[], T]) -> T:
        """Has `piece` computed; gives what it returns. A cancelled one that waits is not begun.

        Raises:
            Busy: too many pieces wait.
            Exception: what `piece` raises.
        """
        return await asyncio.wrap_future(self._submit(function))

    def run_sync(self, function: Callable[[], T]) -> T:
        """The same, for ordinary code."""
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
        while self._waiting:
            future, piece = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                return functools.partial(_settle, future, piece)
        return None

    def fail(self, error: Exception) -> None:
        while self._waiting:
            future, _ = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


def _settle(future: Future[T], piece: Callable[[], T]) -> None:
    try:
        result = piece()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)
