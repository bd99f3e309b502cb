"""The destination's side of one migration: drives ``protocol.step_destination``."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from actors.llumnix.engine.migration_hooks import EngineError
from actors.llumnix.engine.request import RequestError
from actors.llumnix.migration import messages as m
from actors.llumnix.migration.channel import PeerConnection
from actors.llumnix.migration.driver import Context, Driver, on_engine_thread, retagged
from actors.llumnix.migration.protocol import DestinationPhase, DestinationState, step_destination
from actors.llumnix.migration.transport.base import UNPACED, Pace, TransportError

log = logging.getLogger(__name__)


class Incoming(Driver):
    """See the module. ``on_end`` is called once, when the machine has ended and nothing is reserved any more."""

    def __init__(
        self,
        context: Context,
        connection: PeerConnection,
        request_id: str,
        epoch: int,
        on_end: Callable[[Incoming, m.Finish], None],
    ):
        super().__init__(context, connection, request_id, epoch)
        self._state = DestinationState(request_id, epoch, context.layout)
        self._block_ids: tuple[int, ...] = ()
        self._stopped = threading.Event()
        self._received_at = self._copied_at = 0.0
        self._on_end = on_end

    @property
    def ended(self) -> bool:
        """See Driver."""
        return self._state.ended

    def _step(self, event: Any) -> Sequence[Callable[[], None]]:
        if isinstance(event, m.Commit):
            self._received_at = self._copied_at = time.monotonic()
        self._state, actions = step_destination(self._state, event)
        later: list[Callable[[], None]] = []
        for action in actions:
            match action:
                case m.Send(message):
                    self._send(message)
                case m.Reserve():
                    self._reserve(action)
                case m.Fetch():
                    later.append(self._fetcher(action))
                case m.Attach(commit):
                    self._on_engine(partial(self._attach, commit), self._attach_failed)
                case m.CancelReservation():
                    self._on_engine(self._cancel)
                case m.StopFetch():
                    self._stopped.set()
                case m.Drop(epoch):
                    self._on_engine(partial(self._drop, epoch))
                case m.Finish():
                    later.append(partial(self._on_end, self, action))
        return later

    def _reserve(self, action: m.Reserve) -> None:
        def reserve() -> None:
            reservation = self.context.loop.engine.reserve(self.request_id, action.num_blocks, action.hashes)
            if reservation is None:
                self.feed(m.ReserveFailed(action.stage))
                return
            self._block_ids = tuple(reservation.block_ids)
            self.feed(m.Reserved(action.stage, len(reservation.block_ids), reservation.num_cached))

        self._on_engine(reserve, lambda error: self.feed(m.ReserveFailed(action.stage)))

    def _fetcher(self, action: m.Fetch) -> Callable[[], None]:
        """The copy, to be run without the lock: at once, on the reader's thread, when the request stands still and the copy
        is one-sided; else on the copier's."""

        def fetch() -> None:
            start = time.monotonic()
            try:
                transport = self.context.transports.get(action.offer.transport)
                if transport is None:
                    raise TransportError(f"transport {action.offer.transport} is not in use here")
                target = self._block_ids[action.first_block : action.first_block + action.num_blocks]
                pace = UNPACED if action.urgent else Pace(self.context.config.copy_duty, self._stopped.is_set)
                transport.fetch(action.offer, target, pace)
            except Exception as error:
                if not isinstance(error, TransportError):
                    log.exception("copying blocks of %s failed", self.request_id)
                self.feed(m.FetchFailed(action.stage, str(error)))
                return
            self._copied_at = time.monotonic()
            self.feed(m.Fetched(action.stage, self._copied_at - start))

        def hand_over() -> None:
            try:
                (self.context.urgent if action.urgent else self.context.copier).submit(fetch)
            except RuntimeError as error:  # The migrator is closing.
                self.feed(m.FetchFailed(action.stage, str(error)))

        inline = action.urgent and action.offer.transport == "shared_memory"
        return fetch if inline and not on_engine_thread() else hand_over

    # ---- on the engine's thread

    def _attach(self, commit: m.Commit) -> None:
        snapshot = commit.snapshot
        try:
            self.context.loop.engine.attach(replace(snapshot, unacked=()), self.epoch)
        except (EngineError, RequestError) as error:
            self.feed(m.AttachFailed(str(error)))
            return
        self.context.outbox.put(retagged(snapshot.unacked, self.epoch))
        self.feed(m.Attached(self._received_at, self._copied_at, time.monotonic()))

    def _attach_failed(self, error: BaseException) -> None:
        self.feed(m.AttachFailed(str(error)))

    def _cancel(self) -> None:
        self.context.loop.engine.cancel_reservation(self.request_id)

    def _drop(self, epoch: int) -> None:
        # Its chunks may stay in the outbox: the ingress drops what is tagged with a void epoch.
        self.context.loop.engine.abort(self.request_id, epoch)

    # ---- the end

    def _broken(self, error: Exception) -> None:
        self._stopped.set()
        self._state = replace(self._state, phase=DestinationPhase.ABORTED, reason=m.AbortReason.REFUSED)
        self._on_engine(self._cancel)
        self._send(m.Abort(self.request_id, self.epoch, m.AbortReason.REFUSED, str(error)))

    def _time_limit(self) -> tuple[Any, float | None]:
        config, state = self.context.config, self._state
        limits = {
            DestinationPhase.READY: config.reservation_timeout_s,
            DestinationPhase.FETCHING: config.copy_timeout_s,
            DestinationPhase.COMPLETING: config.copy_timeout_s,
        }
        return (state.phase, state.stage), limits.get(state.phase)
