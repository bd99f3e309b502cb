"""What the drivers of both sides of a migration share: feeding a state machine from many threads, one event at a time."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

from actors.llumnix.engine.loop import EngineLoop
from actors.llumnix.engine.request import TokenChunk
from actors.llumnix.migration.channel import ChannelError, PeerConnection
from actors.llumnix.migration.config import MigrationConfig
from actors.llumnix.migration.messages import AbortReason, KVLayout, Message, PeerLost, Stop, Timeout
from actors.llumnix.migration.timers import Timer, Timers
from actors.llumnix.migration.transport.base import KVTransport
from actors.llumnix.outbox import Outbox

log = logging.getLogger(__name__)

_thread = threading.local()


def on_engine_thread() -> bool:
    """Whether the caller keeps an engine from its next step."""
    return getattr(_thread, "is_engine", False)


@dataclass(frozen=True)
class Context:
    """What a migration works with."""

    instance_id: str
    loop: EngineLoop
    outbox: Outbox
    transports: dict[str, KVTransport]
    layout: KVLayout
    config: MigrationConfig
    timers: Timers
    copier: Executor
    """Copies while requests decode."""
    urgent: Executor
    """Copies for which a request stands still."""
    reclaim: Callable[[str, int], int | None]


class Driver:
    """One side of one migration. ``feed`` may be called on any thread; events are worked through in order, one at a time.

    The lock is held while a machine steps and a small message is sent, never while blocks are copied or a thread waits.
    """

    def __init__(self, context: Context, connection: PeerConnection, request_id: str, epoch: int):
        self.context = context
        self.connection = connection
        self.request_id = request_id
        self.epoch = epoch
        self._lock = threading.RLock()
        self._events: deque[Any] = deque()
        self._working = False
        self._timer: Timer | None = None
        self._phase: Any = None

    @property
    def ended(self) -> bool:
        """Whether the machine has come to its end."""
        raise NotImplementedError

    def feed(self, event: Any) -> None:
        """Something happened. Returns when it, or another thread that is at it, has been worked on."""
        self._events.append(event)
        later: list[Callable[[], None]] = []
        with self._lock:
            if self._working:  # Only ever the same thread again, from inside an action.
                return
            self._working = True
            try:
                while self._events:
                    later += self._step(self._events.popleft())
                self._watch()
            except Exception as error:
                log.exception("migration of %s under epoch %d failed", self.request_id, self.epoch)
                self._broken(error)
            finally:
                self._working = False
        for work in later:
            work()

    def stop(self, reason: AbortReason) -> None:
        """End the migration soon."""
        self.feed(Stop(reason))

    def lost(self) -> None:
        """The connection is gone."""
        self.feed(PeerLost())

    def _step(self, event: Any) -> Sequence[Callable[[], None]]:
        """Step the machine and do its actions; returns what must be done without the lock."""
        raise NotImplementedError

    def _broken(self, error: Exception) -> None:
        """A bug of ours: leave nothing behind."""
        raise NotImplementedError

    def _time_limit(self) -> tuple[Any, float | None]:
        """The present phase, and how long it may last."""
        raise NotImplementedError

    def _watch(self) -> None:
        phase, limit = self._time_limit()
        if phase == self._phase:
            return
        self._phase = phase
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if limit is not None:
            self._timer = self.context.timers.after(limit, lambda: self._timed_out(phase))

    def _timed_out(self, phase: Any) -> None:
        if self._time_limit()[0] == phase:
            self.feed(Timeout())

    def _send(self, message: Message) -> None:
        try:
            self.connection.send(message)
        except ChannelError as error:
            log.debug("migration of %s: %s", self.request_id, error)
            self._events.append(PeerLost())

    def _on_engine(self, call: Callable[[], None], failed: Callable[[BaseException], None] | None = None) -> None:
        """Run ``call`` on the engine's thread between two steps; what it raises is logged and told to ``failed``."""

        def done(future: Any) -> None:
            error = future.exception()
            if error is not None:
                log.warning("migration of %s: the engine could not follow: %s", self.request_id, error)
                if failed is not None:
                    failed(error)

        def marked() -> None:
            _thread.is_engine = True
            try:
                call()
            finally:
                _thread.is_engine = False

        self.context.loop.submit(marked).add_done_callback(done)


def retagged(chunks: Sequence[TokenChunk], epoch: int) -> list[TokenChunk]:
    """The chunks under a newer epoch."""
    return [replace(chunk, epoch=epoch) for chunk in chunks]
