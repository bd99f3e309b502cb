"""One thread that calls functions at given times: the time-outs of all migrations of an instance."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class Timer:
    """A call to come; ``cancel`` is idempotent and may come late."""

    def __init__(self, call: Callable[[], None]):
        self._call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self._call = None

    def fire(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()


class Timers:
    """Sleeps until the next time-out; an exception of a call is logged and stops no other."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._count = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="migration-timers", daemon=True)
        self._thread.start()

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Call ``call`` on the timer thread in ``seconds``."""
        timer = Timer(call)
        with self._changed:
            heapq.heappush(self._heap, (time.monotonic() + seconds, next(self._count), timer))
            self._changed.notify()
        return timer

    def close(self) -> None:
        """End the thread; calls to come are forgotten."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed:
                    left = self._heap[0][0] - time.monotonic() if self._heap else None
                    if left is not None and left <= 0:
                        break
                    self._changed.wait(left)
                if self._closed:
                    return
                _, _, timer = heapq.heappop(self._heap)
            try:
                timer.fire()
            except Exception:
                log.exception("a time-out of a migration failed")
