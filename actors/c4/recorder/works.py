"""Handles of operations under way, as torch wants them: they close the record however the operation ends. No Ray."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import Work

from actors.c4.recorder.errors import CollectiveTimeoutError
from actors.c4.recorder.records import OpFlag
from actors.c4.recorder.ring import RingWriter


class RecordedWork(Work):
    """An operation that gloo runs."""

    def __init__(self, inner: Any, ring: RingWriter, op_id: int):
        super().__init__()
        self._work, self._ring, self._op_id = inner, ring, op_id
        self._future: Any = None
        self._waited = False

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self._waited = True
        try:
            done = self._work.wait(timeout) if timeout else self._work.wait()
        except BaseException:
            self._ring.end(self._op_id, OpFlag.FAILED)
            raise
        self._ring.end(self._op_id)
        return bool(done)

    def poll(self) -> bool:
        """Whether it has ended; stamps the end when it has.

        Never waits where another thread waited: a second ``wait`` on gloo's send and receive (which complete only inside a
        wait) waits for a second message, and would stop the heartbeat that polls here.
        """
        if not self._work.is_completed():
            return False
        if self._waited:  # read after is_completed: whoever completed it inside a wait stamps the end
            return True
        try:
            self._work.wait()  # of a complete collective: at once, and raises when it failed
            self._ring.end(self._op_id)
        except RuntimeError:
            self._ring.end(self._op_id, OpFlag.FAILED)
        return True

    def is_completed(self) -> bool:
        return self.poll()

    def is_success(self) -> bool:
        return bool(self._work.is_success())

    def exception(self) -> Any:
        return self._work.exception()

    def get_future(self) -> Any:
        if self._future is None:
            self._future = self._work.get_future()
            self._future.add_done_callback(lambda _: self._ring.end(self._op_id))
        return self._future

    def result(self) -> Any:
        return self._work.result()

    def source_rank(self) -> int:
        return int(self._work._source_rank())

    _source_rank = source_rank

    def synchronize(self) -> None:
        self._work.synchronize()


class RingWork(Work):
    """An operation that the ring runs: in the caller's thread when nobody asked for it to be asynchronous."""

    def __init__(self, outputs: list[torch.Tensor], default_timeout: timedelta):
        super().__init__()
        self._outputs = outputs
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._base: Any = None
        self._future: Any = None
        self._default = default_timeout

    def finish(self, error: BaseException | None = None) -> None:
        """Called once, by whoever ran it."""
        with self._lock:
            self._error = error
            self._done.set()
            base = self._base
        if base is not None:
            base.set_result(self._outputs)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        # The operation has the group's timeout itself; this one is the caller's.
        limit = timeout.total_seconds() if timeout and timeout.total_seconds() > 0 else None
        if not self._done.wait(limit):
            raise CollectiveTimeoutError(f"The operation did not end within the {limit:.1f} s that wait() was given.")
        self._check()
        return True

    def is_completed(self) -> bool:
        return self._done.is_set()

    def is_success(self) -> bool:
        return self._done.is_set() and self._error is None

    def exception(self) -> Any:
        return self._error

    def get_future(self) -> Any:
        """Its value is the list of outputs; a failure is raised inside a child of a future that only says "done", because C++
        takes what ``set_exception`` sets for a value."""
        with self._lock:
            if self._future is not None:
                return self._future
            base: Any = torch.futures.Future()

            def checked(done: Any) -> list[torch.Tensor]:
                self._check()
                value: list[torch.Tensor] = done.value()
                return value

            self._future = base.then(checked)
            ready = self._done.is_set()
            if not ready:
                self._base = base
        if ready:
            base.set_result(self._outputs)
        return self._future

    def result(self) -> list[torch.Tensor]:
        self.wait()
        return self._outputs

    def synchronize(self) -> None:
        self.wait()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


class JoinedWork(Work):
    """Several operations that were asked for at once."""

    def __init__(self, works: list[Any]):
        super().__init__()
        self._works = works

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        for work in self._works:
            work.wait(timeout)
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        return all(work.is_success() for work in self._works)

    def get_future(self) -> Any:
        def values(done: Any) -> list[torch.Tensor]:
            return [tensor for future in done.value() for tensor in future.value()]

        return torch.futures.collect_all([work.get_future() for work in self._works]).then(values)

    def synchronize(self) -> None:
        self.wait()
