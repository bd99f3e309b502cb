"""NCCL operations: start and end from CUDA events that one thread polls, so that no stream and no device ever waits for a record.

An event's own time is on the device's clock and comes without a host time; so a poll's host time is taken when an event is first
seen done (late by one polling interval at most), and the span between the events, which the device measured, dates the start.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from time import monotonic_ns
from typing import Any, Protocol

from actors.c4.recorder.recorder import Recorder
from actors.c4.recorder.records import OpFlag
from actors.c4.recorder.ring import RingWriter

logger = logging.getLogger("sextant.c4.recorder")

POLL_S = 0.001
_IDLE_S = 0.2


class Event(Protocol):
    """The part of ``torch.cuda.Event`` that is used."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def elapsed_time(self, end: Any) -> float: ...


class EventWatcher:
    """Stamps operations between two events of a stream. The thread starts with the first and ends with ``close``."""

    def __init__(self, ring: RingWriter, new_event: Callable[[], Event], poll_s: float = POLL_S):
        self._ring, self._new_event, self._poll_s = ring, new_event, poll_s
        self._open: list[tuple[int, Event, Event]] = []
        self._spare: list[Event] = []
        self._lock = threading.Lock()
        self._something = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def run(self, op_id: int, call: Callable[[], Any]) -> Any:
        """Enqueue an operation on the current stream between two events; returns what ``call`` returns, at once.

        The closing event stands on the stream that the operation's caller would wait on: it is recorded after the work has been
        told to block that stream (``block_current_stream`` or a copy of its end event), never by waiting on the host.
        """
        before, after = self._event(), self._event()
        before.record()
        try:
            work = call()
        except BaseException:
            self._ring.end(op_id, OpFlag.FAILED)
            raise
        _record_after(work, after)
        with self._lock:
            self._open.append((op_id, before, after))
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._watch, name="c4-cuda-events", daemon=True)
                self._thread.start()
        self._something.set()
        return work

    def poll(self) -> int:
        """Stamp what has begun and ended since; returns how many operations are still open."""
        with self._lock:
            current = list(self._open)
        ended = []
        for entry in current:
            op_id, before, after = entry
            try:
                if after.query():
                    now = monotonic_ns()
                    self._ring.stamp(op_id, now - int(before.elapsed_time(after) * 1e6), now)
                    ended.append(entry)
                elif before.query():
                    self._ring.start(op_id)
            except RuntimeError as error:  # the device is lost: its owner meets the error at the next call
                logger.warning("A CUDA event cannot be read: %s", error)
                self._ring.end(op_id, OpFlag.FAILED)
                ended.append(entry)
        with self._lock:
            for entry in ended:
                self._open.remove(entry)
                self._spare += entry[1:]
            return len(self._open)

    def close(self) -> None:
        """End the thread; what is open stays open in the records."""
        self._closed = True
        self._something.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def _watch(self) -> None:
        pause = threading.Event()
        while not self._closed:
            if self.poll():
                pause.wait(self._poll_s)
            else:
                self._something.clear()
                if not self._open:
                    self._something.wait(_IDLE_S)

    def _event(self) -> Event:
        with self._lock:
            return self._spare.pop() if self._spare else self._new_event()


def nccl_group(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """NCCL for the CUDA tensors of a group."""
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return ProcessGroupNCCL(store, rank, size, options)


_watchers: weakref.WeakKeyDictionary[Recorder, EventWatcher] = weakref.WeakKeyDictionary()


def event_watcher(recorder: Recorder) -> EventWatcher:
    """One a recorder."""
    import torch

    if recorder not in _watchers:
        _watchers[recorder] = EventWatcher(recorder.ring, lambda: torch.cuda.Event(enable_timing=True))
    return _watchers[recorder]


def _record_after(work: Any, after: Event) -> None:
    """Record ``after`` behind the work, on a side stream, so that the caller's own stream does not wait for the work."""
    import torch

    if not torch.cuda.is_available() or work is None:
        after.record()
        return
    side = _side_stream(torch.cuda.current_device())
    with torch.cuda.stream(side):
        work.wait()  # enqueues a wait on the side stream; the host goes on
        after.record()


_side_streams: dict[int, Any] = {}


def _side_stream(device: int) -> Any:
    import torch

    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    return _side_streams[device]
