"""NCCL operations: one thread polls whether they have begun and ended, so that no stream, device or caller waits for a record.

The begin is an event on the stream that the operation was called on, the end is the work's own (``is_completed`` queries NCCL's
end event; waiting for a work, even on another stream, would release the tensors that it holds). Both are late by one poll
at most; where NCCL times its works (``TORCH_NCCL_ENABLE_TIMING``, set here), the device's own duration dates the start.
"""

from __future__ import annotations

import logging
import os
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


class EventWatcher:
    """Stamps operations of a device. The thread starts with the first operation and ends with ``close``."""

    def __init__(self, ring: RingWriter, new_event: Callable[[], Event], poll_s: float = POLL_S):
        self._ring, self._new_event, self._poll_s = ring, new_event, poll_s
        self._open: list[tuple[int, Event, Any]] = []
        self._spare: list[Event] = []
        self._lock = threading.Lock()
        self._something = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def run(self, op_id: int, call: Callable[[], Any]) -> Any:
        """Enqueue an operation on the current stream; returns its work, at once. Raises what ``call`` raises."""
        with self._lock:
            begin = self._spare.pop() if self._spare else self._new_event()
        begin.record()
        try:
            work = call()
        except BaseException:
            self._ring.end(op_id, OpFlag.FAILED)
            raise
        with self._lock:
            self._open.append((op_id, begin, work))
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
            op_id, begin, work = entry
            try:
                if begin.query():
                    self._ring.start(op_id)
                if work.is_completed():
                    now = monotonic_ns()
                    duration_ns = _duration_ns(work)
                    if duration_ns:
                        self._ring.stamp(op_id, now - duration_ns, now)
                    else:
                        self._ring.start(op_id)
                        self._ring.end(op_id)
                    ended.append(entry)
            except RuntimeError as error:  # the device or the communicator is lost: its owner meets the error itself
                logger.warning("A CUDA operation cannot be watched any longer: %s", error)
                self._ring.end(op_id, OpFlag.FAILED)
                ended.append(entry)
        with self._lock:
            for entry in ended:
                self._open.remove(entry)
                self._spare.append(entry[1])
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


def nccl_group(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """NCCL for the CUDA tensors of a group."""
    from torch.distributed import ProcessGroupNCCL

    os.environ.setdefault("TORCH_NCCL_ENABLE_TIMING", "1")
    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return ProcessGroupNCCL(store, rank, size, options)


_watchers: weakref.WeakKeyDictionary[Recorder, EventWatcher] = weakref.WeakKeyDictionary()


def event_watcher(recorder: Recorder) -> EventWatcher:
    """One a recorder."""
    import torch

    if recorder not in _watchers:
        _watchers[recorder] = EventWatcher(recorder.ring, torch.cuda.Event)
    return _watchers[recorder]


def _duration_ns(work: Any) -> int:
    """What the device measured; 0 where it was not asked to."""
    try:
        return int(work._get_duration() * 1e6)
    except (AttributeError, RuntimeError):
        return 0
