"""The device thread: whose turn it is, by hand-made seconds, and that nobody's work is lost."""

import asyncio
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from tests.waiting import wait_until
from transformer.engine import Busy
from transformer.engine.device import Device, WorkQueue, WorkSource


class Clock:
    """Seconds that pass only when somebody says so."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def device(clock):
    device = Device(clock)
    yield device
    device.close()


class Steady(WorkSource):
    """Has `count` pieces of `seconds` each, and writes its name down for each."""

    def __init__(self, name, count, seconds, clock, log, weight=1.0):
        self.name, self.count, self.seconds = name, count, seconds
        self.clock, self.log, self.weight, self.failed = clock, log, weight, None

    def next(self):
        if not self.count:
            return None
        self.count -= 1
        return self.piece

    def piece(self):
        self.clock.now += self.seconds
        self.log.append(self.name)

    def fail(self, error):
        self.failed, self.count = error, 0


def run(device, *sources):
    with device.changed:
        for source in sources:
            device.wake(source)
    wait_until(lambda: not device._runnable)


def test_equal_pieces_take_turns(device, clock):
    log = []
    run(device, *(Steady(name, 3, 1, clock, log) for name in "ab"))
    assert "".join(log) == "ababab"


def test_turns_are_of_time_not_of_pieces(device, clock):
    """A piece of three seconds costs three turns of one second."""
    log = []
    run(device, Steady("a", 2, 3, clock, log), Steady("b", 6, 1, clock, log))
    assert "".join(log) == "abbbabbb"


def test_twice_the_weight_is_twice_the_time(device, clock):
    log = []
    run(device, Steady("a", 6, 1, clock, log, weight=2.0), Steady("b", 3, 1, clock, log))
    # They stand at 0 and 0; then a steps by a half and b by one, and a is asked first when level.
    assert "".join(log) == "abaabaaba"
    assert device.pieces == 9 and device.seconds == 9


def test_sleep_saves_nothing_up(device, clock):
    log = []
    early, late = Steady("a", 5, 1, clock, log), Steady("b", 2, 1, clock, log)
    run(device, early)
    early.count = 2
    run(device, early, late)
    assert "".join(log) == "aaaaa" + "abab" or "".join(log) == "aaaaa" + "baba"


def test_a_source_that_raises_loses_its_own_work_only(device, clock, caplog):
    log = []
    good, bad = Steady("a", 3, 1, clock, log), Steady("b", 3, 1, clock, log)
    bad.piece = lambda: 1 / 0
    run(device, bad, good)
    assert "".join(log) == "aaa" and isinstance(bad.failed, ZeroDivisionError)
    assert device.is_alive and good.failed is None
    (record,) = caplog.records
    assert record.exc_info and record.exc_info[0] is ZeroDivisionError


def test_a_source_whose_next_raises(device, clock):
    source = Steady("a", 1, 1, clock, [])
    source.next = lambda: 1 / 0
    run(device, source)
    assert isinstance(source.failed, ZeroDivisionError) and device.is_alive


def test_a_lane_gives_back_what_its_pieces_return_and_raise(device):
    lane = WorkQueue(device)
    assert lane.run_sync(lambda: 3) == 3
    assert lane.run_sync(threading.get_ident) == device._thread.ident
    with pytest.raises(ZeroDivisionError):
        lane.run_sync(lambda: 1 / 0)

    async def main():
        return await asyncio.gather(*(lane.run(lambda i=i: i * i) for i in range(50)))

    assert asyncio.run(main()) == [i * i for i in range(50)]


def test_a_lane_is_bounded(device):
    gate, lane = threading.Event(), WorkQueue(device, max_waiting=1)
    with ThreadPoolExecutor() as pool:
        running = pool.submit(lane.run_sync, gate.wait)
        wait_until(lambda: device._runnable and not len(lane))
        waiting = pool.submit(lane.run_sync, lambda: 5)
        wait_until(lambda: len(lane) == 1)
        with pytest.raises(Busy):
            lane.run_sync(lambda: 6)
        gate.set()
        assert running.result() and waiting.result() == 5


def test_a_lane_is_idle_when_nobody_uses_it_not_when_nothing_waits(device):
    """A model whose last piece was being computed counted as idle, and was let go for another."""
    gate, lane = threading.Event(), WorkQueue(device)

    def work():
        with lane.using():
            return lane.run_sync(gate.wait), lane.run_sync(lambda: lane.is_idle)

    with ThreadPoolExecutor() as pool:
        assert lane.is_idle
        working = pool.submit(work)
        wait_until(lambda: device._runnable and not len(lane))
        assert not lane.is_idle
        gate.set()
        assert working.result() == (True, False)
    assert lane.is_idle


def test_a_cancelled_piece_is_not_begun(device):
    gate, lane, begun = threading.Event(), WorkQueue(device), []

    async def main():
        first = asyncio.create_task(lane.run(gate.wait))
        await asyncio.to_thread(wait_until, lambda: device._runnable and not len(lane))
        second = asyncio.create_task(lane.run(lambda: begun.append(2)))
        third = asyncio.create_task(lane.run(lambda: begun.append(3)))
        await asyncio.to_thread(wait_until, lambda: len(lane) == 2)
        second.cancel()
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, third)
        assert second.cancelled()

    asyncio.run(main())
    assert begun == [3]


def test_a_closed_device_ends_what_waits_and_takes_no_more(device):
    gate, lane = threading.Event(), WorkQueue(device)
    with ThreadPoolExecutor() as pool:
        pool.submit(lane.run_sync, gate.wait)
        wait_until(lambda: device._runnable and not len(lane))
        waiting = pool.submit(lane.run_sync, lambda: 5)
        wait_until(lambda: len(lane) == 1)
        closing = pool.submit(device.close)
        wait_until(lambda: device._is_closed)
        gate.set()
        closing.result()
        with pytest.raises((RuntimeError, CancelledError)):
            waiting.result()
    assert not device.is_alive
    with pytest.raises(RuntimeError):
        lane.run_sync(lambda: 6)
