"""Operations on CUDA: stamped by polling, with events and works that a test moves by hand."""

from __future__ import annotations

import time

import numpy as np
import pytest

from actors.c4.recorder.cuda import EventWatcher
from actors.c4.recorder.records import OP_RECORD, OpFlag, OpType
from actors.c4.recorder.ring import RingWriter


class FakeEvent:
    """A CUDA event: done when the test says so."""

    def __init__(self, done: bool = False):
        self.recorded, self.done = 0, done

    def record(self) -> None:
        self.recorded += 1

    def query(self) -> bool:
        return self.done


class FakeWork:
    """A work of NCCL."""

    def __init__(self, duration_ms: float | None = None, error: str = ""):
        self.done, self.duration_ms, self.error = False, duration_ms, error

    def is_completed(self) -> bool:
        if self.error:
            raise RuntimeError(self.error)
        return self.done

    def _get_duration(self) -> float:
        if self.duration_ms is None:
            raise RuntimeError("timing is off")
        return self.duration_ms

    def wait(self) -> None:
        raise AssertionError("a work that is watched must not be waited for")


class Bench:
    """A watcher whose thread never runs: the test polls."""

    def __init__(self) -> None:
        self.ring = RingWriter(None, run="r", generation=0, rank=0, world_size=1)
        self.events: list[FakeEvent] = []
        self.watcher = EventWatcher(self.ring, self.new)
        self.watcher._closed = True
        self._records = np.frombuffer(self.ring.map, dtype=OP_RECORD, count=16, offset=self.ring.sizes.operations)

    def new(self) -> FakeEvent:
        self.events.append(FakeEvent())
        return self.events[-1]

    def run(self, work: FakeWork) -> int:
        op = self.ring.enter(0, 1, OpType.ALL_REDUCE, 1, 8)
        assert self.watcher.run(op, lambda: work) is work
        return op

    def record(self, op: int):
        return self._records[op]


def test_start_and_end_follow_the_stream() -> None:
    bench, work = Bench(), FakeWork()
    op = bench.run(work)
    assert bench.events[0].recorded == 1
    assert bench.watcher.poll() == 1
    assert bench.record(op)["start_ns"] == 0
    bench.events[0].done = True
    assert bench.watcher.poll() == 1
    begun = bench.record(op)["start_ns"]
    assert begun > 0
    assert bench.record(op)["end_ns"] == 0
    work.done = True
    assert bench.watcher.poll() == 0
    assert bench.record(op)["end_ns"] >= bench.record(op)["start_ns"] == begun


def test_the_duration_is_the_devices_where_it_measured_one() -> None:
    bench, work = Bench(), FakeWork(duration_ms=2.5)
    op = bench.run(work)
    work.done = bench.events[0].done = True
    assert bench.watcher.poll() == 0
    assert bench.record(op)["end_ns"] - bench.record(op)["start_ns"] == 2_500_000


def test_operations_may_end_out_of_order_and_events_are_used_again() -> None:
    bench, first, second = Bench(), FakeWork(), FakeWork()
    ops = [bench.run(first), bench.run(second)]
    second.done = True
    assert bench.watcher.poll() == 1
    assert bench.record(ops[1])["end_ns"] > 0
    assert bench.record(ops[0])["end_ns"] == 0
    bench.run(FakeWork())
    assert len(bench.events) == 2


def test_a_call_that_raises_is_recorded_as_failed() -> None:
    bench = Bench()
    op = bench.ring.enter(0, 1, OpType.ALL_REDUCE, 1, 8)

    def call() -> None:
        raise RuntimeError("invalid usage")

    with pytest.raises(RuntimeError, match="invalid usage"):
        bench.watcher.run(op, call)
    assert bench.record(op)["flags"] & OpFlag.FAILED
    assert bench.watcher.poll() == 0


def test_a_lost_device_ends_the_record_and_not_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    op = bench.run(FakeWork(error="CUDA error: device-side assert triggered"))
    assert bench.watcher.poll() == 0
    assert bench.record(op)["flags"] & OpFlag.FAILED
    assert "device-side assert" in caplog.text


def test_the_thread_stamps_by_itself_and_ends() -> None:
    ring = RingWriter(None, run="r", generation=0, rank=0, world_size=1)
    watcher = EventWatcher(ring, lambda: FakeEvent(done=True))
    work = FakeWork()
    op = ring.enter(0, 1, OpType.BARRIER, 0, 0)
    watcher.run(op, lambda: work)
    work.done = True
    records = np.frombuffer(ring.map, dtype=OP_RECORD, count=4, offset=ring.sizes.operations)
    deadline = time.monotonic() + 30
    while not records["end_ns"][op] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert records["end_ns"][op] > 0
    watcher.close()
    assert watcher._thread is not None
    assert not watcher._thread.is_alive()
