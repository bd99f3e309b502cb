"""The thread that an engine lives on: steps while there is work, and between steps runs what others submit.

Nobody else touches the engine, so it needs no locks. Nothing vanishes: an exception of a submitted call goes to its
future; an exception of the engine or a callback ends the loop, fails every open future and is told to ``on_failure``.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from actors.llumnix.engine.engine import Engine
from actors.llumnix.engine.request import TokenChunk
from actors.llumnix.load import InstanceLoad

log = logging.getLogger(__name__)

T = TypeVar("T")

BLOCKED_WAIT_S = 0.005
"""Pause when requests wait for blocks that only a submitted call (the end of a migration) can free."""


class EngineStopped(RuntimeError):
    """The engine loop has ended; ``__cause__`` says why if it failed."""


class EngineLoop:
    """A supervised thread around one engine.

    ``on_chunks`` and ``on_load`` are called on the loop's thread and must not block; ``on_failure`` is called once, on the
    loop's thread, if the loop ends by an exception.
    """

    def __init__(
        self,
        engine: Engine,
        on_chunks: Callable[[list[TokenChunk]], None],
        on_load: Callable[[InstanceLoad], None] | None = None,
        on_failure: Callable[[BaseException], None] | None = None,
    ):
        self.engine = engine
        self.failure: BaseException | None = None
        self._on_chunks = on_chunks
        self._on_load = on_load
        self._on_failure = on_failure
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._ended = False
        self._blocked = False
        self._thread = threading.Thread(target=self._run, name=f"engine-{engine.instance_id}", daemon=True)

    def start(self) -> EngineLoop:
        """Start the thread; returns self."""
        self._thread.start()
        return self

    def submit(self, fn: Callable[[], T]) -> Future[T]:
        """Run ``fn`` on the loop's thread, at once when idle, after the present step when busy.

        The future gets its result or exception, or EngineStopped if the loop ended before.
        """
        future: Future[T] = Future()
        with self._wake:
            if not self._ended:
                self._calls.append((fn, future))
                self._wake.notify()
                return future
        future.set_exception(self._stopped())
        return future

    def stop(self, timeout_s: float | None = 30.0) -> None:
        """End the thread after its present step and wait for it; open futures fail. Raises TimeoutError if it hangs."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is None:
            self._end()
            return
        if threading.current_thread() is self._thread:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the loop of engine {self.engine.instance_id} did not end within {timeout_s} s")

    @property
    def alive(self) -> bool:
        """Whether submitted calls will still be run."""
        return self._thread.is_alive() and not self._ended

    @property
    def step_ms(self) -> float:
        """Moving median of the engine's decode step."""
        return self.engine.step_ms

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:  # Supervised: whatever it is, nobody else would hear of it.
            self.failure = error
            log.exception("the loop of engine %s failed", self.engine.instance_id)
        self._end()
        if self.failure is not None and self._on_failure is not None:
            self._on_failure(self.failure)

    def _turn(self) -> bool:
        """Calls, then a step; False when the loop is to stop."""
        engine = self.engine
        with self._wake:
            if not self._calls and not self._stopping:
                if not engine.has_work():
                    self._wake.wait()
                elif self._blocked:
                    self._wake.wait(BLOCKED_WAIT_S)
            if self._stopping:
                return False
            calls = list(self._calls)
            self._calls.clear()
        for i, (fn, future) in enumerate(calls):
            try:
                self._call(fn, future)
            except BaseException:
                with self._wake:
                    self._calls.extendleft(reversed(calls[i + 1 :]))
                raise
        if calls:
            self._deliver(engine.take_chunks())
        if engine.has_work():
            output = engine.step()
            self._blocked = output.num_tokens == 0
            self._deliver(output.chunks)
            if output.failure is not None:
                raise output.failure
            if self._blocked and not calls:
                return True
        elif not calls:
            return True
        if self._on_load is not None:
            self._on_load(engine.load())
        return True

    @staticmethod
    def _call(fn: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = fn()
        except Exception as error:
            future.set_exception(error)
        except BaseException as error:
            future.set_exception(error)
            raise
        else:
            future.set_result(result)

    def _deliver(self, chunks: list[TokenChunk]) -> None:
        if chunks:
            self._on_chunks(chunks)

    def _end(self) -> None:
        with self._wake:
            self._ended = True
            calls = list(self._calls)
            self._calls.clear()
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(self._stopped())

    def _stopped(self) -> EngineStopped:
        stopped = EngineStopped(f"engine {self.engine.instance_id} has stopped")
        if self.failure is not None:
            stopped = EngineStopped(f"engine {self.engine.instance_id} has failed: {self.failure}")
            stopped.__cause__ = self.failure
        return stopped
