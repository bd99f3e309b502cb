"""The source's side of one migration: drives ``protocol.step_source`` over an engine loop, a peer connection and a transport."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Literal

from actors.llumnix.engine.request import TokenChunk
from actors.llumnix.migration import messages as m
from actors.llumnix.migration.channel import PeerAddress, PeerConnection
from actors.llumnix.migration.config import MigrationReport
from actors.llumnix.migration.driver import Context, Driver, retagged
from actors.llumnix.migration.protocol import SourcePhase, SourceState, step_source
from actors.llumnix.migration.transport.base import KVTransport, Offer
from actors.llumnix.migration.transport.shared_memory import boot_id

log = logging.getLogger(__name__)


class Outgoing(Driver):
    """See the module. ``result`` gets the MigrationReport when everything that was reserved here has been given back."""

    def __init__(
        self,
        context: Context,
        connection: PeerConnection,
        request_id: str,
        epoch: int,
        peer: PeerAddress,
        transport: KVTransport,
        mode: Literal["live", "recompute"] | None = None,
    ):
        super().__init__(context, connection, request_id, epoch)
        self.result: Future[MigrationReport] = Future()
        self._state = SourceState(request_id, epoch, context.layout, context.config.limits(mode))
        self.peer = peer
        self.transport = transport
        self._endpoint = dict(peer.endpoints).get(transport.name)
        self._offers: list[Offer] = []
        self._old_epoch = -1
        self._unacked: tuple[TokenChunk, ...] = ()
        self._preemptions: int | None = None
        self._blocks = self._last_stage_blocks = 0
        self._copy_seconds = 0.0
        self._started_at = time.monotonic()
        self._detached_at: float | None = None
        self._commit_sent_at: float | None = None
        self._committed_at: float | None = None
        self._committed: m.Committed | None = None
        self._given_up = threading.Event()

    @property
    def ended(self) -> bool:
        """See Driver."""
        return self._state.ended

    def start(self) -> None:
        """Begin."""
        self.feed(m.Start())

    def _step(self, event: Any) -> Sequence[Callable[[], None]]:
        match event:
            case m.StageDone(seconds=seconds):
                self._copy_seconds += seconds
            case m.Committed() if self._state.phase is SourcePhase.COMMITTING:
                self._committed, self._committed_at = event, time.monotonic()
        self._state, actions = step_source(self._state, event)
        on_engine: list[m.SourceAction] = []
        for action in actions:
            match action:
                case m.Send(message):
                    self._send(self._with_offer(message))
                case m.Advance():
                    self._ask_engine(action)
                case m.Reclaim(failed_epoch):
                    threading.Thread(
                        target=self._reclaim, args=(failed_epoch,), name=f"reclaim-{self.request_id}", daemon=True
                    ).start()
                case _:
                    if isinstance(action, m.Unhold):
                        self._revoke()
                    on_engine.append(action)
        if on_engine:
            self._on_engine(lambda: self._settle(on_engine), lambda error: self._finish_anyway(on_engine, error))
        return ()

    def _with_offer(self, message: m.Message) -> m.Message:
        if isinstance(message, m.CopyStage | m.Commit) and message.block_ids:
            offer = self.transport.offer(message.block_ids, self._endpoint)
            self._offers.append(offer)
            self._blocks += len(message.block_ids)
            message = replace(message, offer=offer)
        if isinstance(message, m.Commit):
            self._last_stage_blocks = len(message.block_ids)
            self._commit_sent_at = time.monotonic()
        return message

    def _revoke(self) -> None:
        for offer in self._offers:
            self.transport.revoke(offer)
        self._offers.clear()

    # ---- on the engine's thread

    def _ask_engine(self, action: m.Advance) -> None:
        def failed(error: BaseException) -> None:
            self.feed(m.Gone(m.AbortReason.SHUTDOWN))

        self._on_engine(lambda: self.feed(self._look(action)), failed)

    def _look(self, action: m.Advance) -> m.SourceEvent:
        """Between two steps: how far the request is; detached if it is time."""
        now = time.monotonic()
        engine, request_id = self.context.loop.engine, self.request_id
        status = engine.status(request_id)
        if status is None or status.state == "detached" or status.epoch >= self.epoch:
            return m.Gone(m.AbortReason.FINISHED if status is None else m.AbortReason.STALE)
        if self._preemptions is None:
            self._preemptions = status.num_preemptions
        elif status.num_preemptions != self._preemptions:
            return m.Gone(m.AbortReason.PREEMPTED)
        engine.hold(request_id)
        waiting = status.state == "waiting"
        if action.at_most >= 0 and (waiting or status.num_blocks - action.first <= action.at_most):
            block_ids = engine.computed_blocks(request_id, action.first)
            snapshot = engine.detach(request_id)
            self._old_epoch = snapshot.request.epoch
            self._unacked = self.context.outbox.take_unacked(request_id)
            # The chunk of the last step says exactly when that step ended.
            self._detached_at = max((chunk.time for chunk in self._unacked if chunk.time <= now), default=now)
            return m.Detached(action.first, tuple(block_ids), replace(snapshot, unacked=self._unacked))
        if waiting:
            return m.Grew(action.first, (), (), 0)
        block_ids, hashes = engine.full_blocks(request_id, action.first)
        return m.Grew(action.first, tuple(block_ids), tuple(hashes), status.num_blocks)

    def _settle(self, actions: Sequence[m.SourceAction]) -> None:
        engine, request_id = self.context.loop.engine, self.request_id
        for action in actions:
            match action:
                case m.Unhold():
                    engine.unhold(request_id)
                case m.Release():
                    if engine.status(request_id) is not None:
                        engine.release(request_id)
                case m.Reattach(epoch):
                    now = self._old_epoch if epoch is None else epoch
                    if engine.reattach(request_id, now):
                        self.context.outbox.put(retagged(self._unacked, now))
                case m.Finish():
                    self._finish(action)

    # ---- the end

    def _finish(self, action: m.Finish) -> None:
        state, committed = self._state, self._committed
        downtime_ms = 0.0
        if committed is not None and self._detached_at is not None and self._committed_at is not None:
            shared_clock = self.peer.boot_id == boot_id()
            until = committed.attached_at if shared_clock else self._committed_at
            downtime_ms = (until - self._detached_at) * 1e3
        report = MigrationReport(
            request_id=self.request_id,
            epoch=self.epoch,
            source=self.context.instance_id,
            destination=self.peer.instance_id,
            outcome=action.outcome,
            reason=None if action.reason is None else action.reason.value,
            detail=action.detail,
            mode=state.limits.mode,
            transport=self.transport.name if self._blocks else "",
            stages=state.stage + (state.phase is SourcePhase.COMMITTED),
            blocks=self._blocks,
            cached_blocks=state.cached,
            last_stage_blocks=self._last_stage_blocks,
            bytes=self._blocks * self.context.layout.block_bytes,
            copy_seconds=self._copy_seconds,
            total_ms=(time.monotonic() - self._started_at) * 1e3,
            downtime_ms=downtime_ms,
            started_at=self._started_at,
            detached_at=self._detached_at,
            commit_sent_at=self._commit_sent_at,
            received_at=None if committed is None else committed.received_at,
            copied_at=None if committed is None else committed.copied_at,
            attached_at=None if committed is None else committed.attached_at,
            committed_at=self._committed_at,
        )
        self._given_up.set()
        if not self.result.done():
            self.result.set_result(report)

    def _finish_anyway(self, actions: Sequence[m.SourceAction], error: BaseException) -> None:
        """The engine is gone, or contradicts the protocol: report the end all the same."""
        for action in actions:
            if isinstance(action, m.Finish) and not self.result.done():
                self._finish(replace(action, detail=f"{action.detail} {error}".strip()))

    def _broken(self, error: Exception) -> None:
        self._revoke()
        self._state = replace(self._state, phase=SourcePhase.DROPPED)
        self._given_up.set()

        def clean() -> None:
            engine = self.context.loop.engine
            engine.unhold(self.request_id)
            status = engine.status(self.request_id)
            if status is not None and status.state == "detached":
                engine.release(self.request_id)

        self._on_engine(clean)
        if not self.result.done():
            self.result.set_exception(error)

    def _reclaim(self, failed_epoch: int) -> None:
        """Ask the authority until it answers, the client leaves, or it has taken too long."""
        deadline = time.monotonic() + self.context.config.reclaim_give_up_s
        pause = self.context.config.reclaim_retry_s
        while not self._given_up.is_set():
            try:
                epoch = self.context.reclaim(self.request_id, failed_epoch)
            except Exception as error:  # Whatever the authority's transport raises.
                log.warning("no new epoch for %s yet: %s", self.request_id, error)
            else:
                if epoch is not None and epoch <= failed_epoch:
                    log.error("the authority gave epoch %d after %d: dropped", epoch, failed_epoch)
                    epoch = None
                self.feed(m.Reclaimed(epoch))
                return
            if time.monotonic() + pause > deadline:
                log.error("request %s is dropped: no new epoch could be had", self.request_id)
                self.feed(m.ReclaimFailed())
                return
            self._given_up.wait(pause)
            pause = min(2 * pause, 5.0)

    def _time_limit(self) -> tuple[Any, float | None]:
        config, state = self.context.config, self._state
        limits = {
            SourcePhase.PREPARING: config.prepare_timeout_s,
            SourcePhase.COPYING: config.copy_timeout_s,
            SourcePhase.COMMITTING: config.commit_timeout_s,
        }
        return (state.phase, state.stage), limits.get(state.phase)
