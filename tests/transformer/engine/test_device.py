"""The device thread: fair sharing with a fake clock, errors, cancellation and closing."""

import asyncio
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from tests.waiting import wait_until
from transformer.engine import Busy
from transformer.engine.device import Device, WorkQueue, WorkSource


class FakeClock:
    """A clock that a test advances by hand."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def device(clock):
    device = Device(clock)
    yield device
    device.close()


class FixedSource(WorkSource):
    """A source of `count` work items of `seconds` each, which append the source's name to `log`."""

    def __init__(self, name, count, seconds, clock, log, weight=1.0):
        self.name, self.count, self.seconds = name, count, seconds
        self.clock, self.log, self.weight, self.failed = clock, log, weight, None

    def next_item(self):
        if not self.count:
            return None
        self.count -= 1
        return self.item

    def item(self):
        self.clock.now += self.seconds
        self.log.append(self.name)

    def fail(self, error):
        self.failed, self.count = error, 0


def run(device, *sources):
    with device.condition:
        for source in sources:
            device.wake(source)
    wait_until(lambda: not device._runnable)


def test_work_sources_with_equal_items_alternate(device, clock):
    log = []
    run(device, *(FixedSource(name, 3, 1, clock, log) for name in "ab"))
    assert "".join(log) == "ababab"


def test_work_sources_with_unequal_items_share_device_time(device, clock):
    """A work item of three seconds counts as three items of one second."""
    log = []
    run(device, FixedSource("a", 2, 3, clock, log), FixedSource("b", 6, 1, clock, log))
    assert "".join(log) == "abbbabbb"


def test_work_source_with_twice_the_scheduling_weight_gets_twice_the_device_time(device, clock):
    log = []
    run(device, FixedSource("a", 6, 1, clock, log, weight=2.0), FixedSource("b", 3, 1, clock, log))
    # Virtual time advances by 1/2 for a and by 1 for b; a goes first when they are equal.
    assert "".join(log) == "abaabaaba"
    assert device.num_items == 9 and device.busy_seconds == 9


def test_work_source_after_idling_gets_no_credit_for_unused_time(device, clock):
    log = []
    early, late = FixedSource("a", 5, 1, clock, log), FixedSource("b", 2, 1, clock, log)
    run(device, early)
    early.count = 2
    run(device, early, late)
    assert "".join(log) == "aaaaa" + "abab" or "".join(log) == "aaaaa" + "baba"


def test_work_item_error_fails_its_work_source_only(device, clock, caplog):
    log = []
    good, bad = FixedSource("a", 3, 1, clock, log), FixedSource("b", 3, 1, clock, log)
    bad.item = lambda: 1 / 0
    run(device, bad, good)
    assert "".join(log) == "aaa" and isinstance(bad.failed, ZeroDivisionError)
    assert device.is_alive and good.failed is None
    (record,) = caplog.records
    assert record.exc_info and record.exc_info[0] is ZeroDivisionError


def test_next_item_error_fails_work_source(device, clock):
    source = FixedSource("a", 1, 1, clock, [])
    source.next_item = lambda: 1 / 0
    run(device, source)
    assert isinstance(source.failed, ZeroDivisionError) and device.is_alive


def test_work_queue_returns_results_and_raises_errors(device):
    work_queue = WorkQueue(device)
    assert work_queue.run_sync(lambda: 3) == 3
    assert work_queue.run_sync(threading.get_ident) == device._thread.ident
    with pytest.raises(ZeroDivisionError):
        work_queue.run_sync(lambda: 1 / 0)

    async def main():
        return await asyncio.gather(*(work_queue.run(lambda i=i: i * i) for i in range(50)))

    assert asyncio.run(main()) == [i * i for i in range(50)]


def test_work_queue_full_raises_busy(device):
    gate, work_queue = threading.Event(), WorkQueue(device, max_waiting=1)
    with ThreadPoolExecutor() as pool:
        running = pool.submit(work_queue.run_sync, gate.wait)
        wait_until(lambda: device._runnable and not len(work_queue))
        waiting = pool.submit(work_queue.run_sync, lambda: 5)
        wait_until(lambda: len(work_queue) == 1)
        with pytest.raises(Busy):
            work_queue.run_sync(lambda: 6)
        gate.set()
        assert running.result() and waiting.result() == 5


def test_work_queue_during_item_is_not_idle(device):
    """Bug: a model counted as idle during its last work item, and was unloaded."""
    gate, work_queue = threading.Event(), WorkQueue(device)

    def work():
        with work_queue.using():
            return work_queue.run_sync(gate.wait), work_queue.run_sync(lambda: work_queue.is_idle)

    with ThreadPoolExecutor() as pool:
        assert work_queue.is_idle
        working = pool.submit(work)
        wait_until(lambda: device._runnable and not len(work_queue))
        assert not work_queue.is_idle
        gate.set()
        assert working.result() == (True, False)
    assert work_queue.is_idle


def test_work_queue_cancelled_item_does_not_run(device):
    gate, work_queue, calls = threading.Event(), WorkQueue(device), []

    async def main():
        first = asyncio.create_task(work_queue.run(gate.wait))
        await asyncio.to_thread(wait_until, lambda: device._runnable and not len(work_queue))
        second = asyncio.create_task(work_queue.run(lambda: calls.append(2)))
        third = asyncio.create_task(work_queue.run(lambda: calls.append(3)))
        await asyncio.to_thread(wait_until, lambda: len(work_queue) == 2)
        second.cancel()
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, third)
        assert second.cancelled()

    asyncio.run(main())
    assert calls == [3]


def test_device_closed_fails_waiting_and_new_items(device):
    gate, work_queue = threading.Event(), WorkQueue(device)
    with ThreadPoolExecutor() as pool:
        pool.submit(work_queue.run_sync, gate.wait)
        wait_until(lambda: device._runnable and not len(work_queue))
        waiting = pool.submit(work_queue.run_sync, lambda: 5)
        wait_until(lambda: len(work_queue) == 1)
        closing = pool.submit(device.close)
        wait_until(lambda: device._is_closed)
        gate.set()
        closing.result()
        with pytest.raises((RuntimeError, CancelledError)):
            waiting.result()
    assert not device.is_alive
    with pytest.raises(RuntimeError):
        work_queue.run_sync(lambda: 6)
