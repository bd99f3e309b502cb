"""Live migration as two pure state machines, one a side: ``step_source`` and ``step_destination``. No clock, no I/O, no threads.

A driver (``migrator.Migrator``; in tests a model checker) feeds events and does the actions. States are frozen and
hashable. Every event is defined in every state: what is late, doubled or out of order changes nothing.

Who owns a request? Up to COMMIT the source, under the epoch it always had. From Attached on the destination, under the
migration's epoch. Once COMMIT is out the source never goes on under the old epoch: anything but COMMITTED (a time-out,
a lost peer, even a refusal) makes it ask the epoch authority for a newer one, under which whatever the destination has or
will have is void. So at most one side ever holds the newest epoch.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Literal

from actors.llumnix.migration.messages import (
    INFINITE,
    Abort,
    AbortReason,
    Advance,
    Attach,
    Attached,
    AttachFailed,
    CancelReservation,
    Commit,
    Committed,
    CopyStage,
    DestinationAction,
    DestinationEvent,
    Detached,
    Drop,
    Fetch,
    Fetched,
    FetchFailed,
    Finish,
    Gone,
    Grew,
    KVLayout,
    PeerLost,
    PreAlloc,
    PreAllocAck,
    Reattach,
    Reclaim,
    Reclaimed,
    ReclaimFailed,
    Release,
    Reserve,
    Reserved,
    ReserveFailed,
    Send,
    SourceAction,
    SourceEvent,
    StageDone,
    Start,
    Stop,
    StopFetch,
    Timeout,
    Unhold,
)

Mode = Literal["live", "recompute"]


@dataclass(frozen=True)
class Limits:
    """When the last stage comes. With short copies it is the third look at the request: stage 0, then the rest."""

    mode: Mode = "live"
    """``recompute`` stops the request, sends its tokens alone and prefills them again elsewhere: the paper's baseline."""
    last_stage_max_blocks: int = 2
    """The request is stopped once at most so many blocks remain, a partly filled one included."""
    max_stages: int = 4
    """A request that outruns the copying is stopped after so many stages, whatever remains."""


# ---- source ----------------------------------------------------------------------------------------------------------


class SourcePhase(enum.Enum):
    NEW = "new"
    ADVANCING = "advancing"
    """Waiting for the engine's next step boundary."""
    PREPARING = "preparing"
    """PRE-ALLOC sent."""
    COPYING = "copying"
    COMMITTING = "committing"
    """COMMIT sent: the request stands still."""
    RECLAIMING = "reclaiming"
    COMMITTED = "committed"
    ABORTED = "aborted"
    DROPPED = "dropped"


@dataclass(frozen=True)
class SourceState:
    request_id: str
    epoch: int
    layout: KVLayout
    limits: Limits = Limits()
    phase: SourcePhase = SourcePhase.NEW
    stage: int = 0
    copied: int = 0
    """Leading blocks that the destination has."""
    block_ids: tuple[int, ...] = ()
    """Full blocks of the present stage."""
    cached: int = 0
    """Blocks that the destination found in its prefix cache."""
    stop: AbortReason | None = None
    """To be ended as soon as what is under way has answered."""
    reason: AbortReason | None = None
    detail: str = ""
    spoken: bool = False
    """The destination may know of this migration."""

    @property
    def ended(self) -> bool:
        return self.phase in (SourcePhase.COMMITTED, SourcePhase.ABORTED, SourcePhase.DROPPED)


SourceStep = tuple[SourceState, list[SourceAction]]


def step_source(s: SourceState, event: SourceEvent) -> SourceStep:
    """One transition of the source: the next state and what is to be done, in order."""
    phase = s.phase
    if s.ended:
        return s, _remind(s, event)
    match phase, event:
        case SourcePhase.NEW, Start():
            return replace(s, phase=SourcePhase.ADVANCING), [Advance(0, -1)]
        case SourcePhase.NEW, Stop(reason):
            return _source_abort(s, reason)

        case SourcePhase.ADVANCING, Grew():
            return _grew(s, event)
        case SourcePhase.ADVANCING, Detached():
            return _detached(s, event)
        case SourcePhase.ADVANCING, Gone(reason):
            return _source_abort(s, s.stop or reason)
        case SourcePhase.ADVANCING, (Stop() | PeerLost() | Abort()):
            reason = _reason(event)
            if s.stop and reason is not AbortReason.CANCELLED:
                return s, []
            return replace(s, stop=reason, detail=_detail(event)), []

        case SourcePhase.PREPARING, PreAllocAck(stage=stage, num_cached=num_cached) if stage == s.stage:
            return _prepared(s, num_cached)
        case SourcePhase.COPYING, StageDone(stage=stage) if stage == s.stage:
            return _advance(s)
        case ((SourcePhase.PREPARING | SourcePhase.COPYING), (Stop() | PeerLost() | Timeout() | Abort())):
            return _source_abort(s, _reason(event), _detail(event))

        case SourcePhase.COMMITTING, Committed():
            return replace(s, phase=SourcePhase.COMMITTED), [Unhold(), Release(), Finish("committed")]
        case SourcePhase.COMMITTING, (PeerLost() | Timeout() | Abort()):
            state = replace(s, phase=SourcePhase.RECLAIMING, reason=_reason(event), detail=_detail(event))
            return state, [Reclaim(s.epoch)]
        case ((SourcePhase.COMMITTING | SourcePhase.RECLAIMING), Stop(AbortReason.CANCELLED as reason)):
            return _source_drop(s, reason, tell=True)
        case SourcePhase.COMMITTING, Stop(reason):
            # The order cannot be taken back any more without a new epoch.
            return replace(s, phase=SourcePhase.RECLAIMING, reason=reason), [Reclaim(s.epoch)]

        case SourcePhase.RECLAIMING, Reclaimed(None):
            return _source_drop(s, s.reason or AbortReason.RECLAIMED, tell=True)
        case SourcePhase.RECLAIMING, Reclaimed(epoch):
            actions: list[SourceAction] = [Unhold(), Reattach(epoch), _tell(s, AbortReason.RECLAIMED)]
            return replace(s, phase=SourcePhase.ABORTED), [*actions, Finish("aborted", s.reason, s.detail)]
        case SourcePhase.RECLAIMING, ReclaimFailed():
            # Silently: the destination may be the rightful owner.
            return _source_drop(s, s.reason or AbortReason.RECLAIMED, tell=False)
    return s, []


def _reason(event: Stop | PeerLost | Timeout | Abort) -> AbortReason:
    match event:
        case Stop(reason) | Abort(reason=reason):
            return reason
        case PeerLost():
            return AbortReason.PEER_LOST
    return AbortReason.TIMEOUT


def _detail(event: object) -> str:
    return event.detail if isinstance(event, Abort) else ""


def _tell(s: SourceState | DestinationState, reason: AbortReason, detail: str = "") -> Send:
    return Send(Abort(s.request_id, s.epoch, reason, detail))


def _grew(s: SourceState, event: Grew) -> SourceStep:
    if s.stop:
        return _source_abort(s, s.stop, s.detail)
    if s.limits.mode == "recompute":
        event = Grew(0, (), (), 0)
        needed = 0
    else:
        # Room for the last stage as well, so that nothing has to be asked for while the request stands still.
        needed = max(event.num_blocks, s.copied + len(event.block_ids)) + s.limits.last_stage_max_blocks
    message = PreAlloc(s.request_id, s.epoch, s.stage, needed, event.hashes if s.stage == 0 else (), s.layout)
    return replace(s, phase=SourcePhase.PREPARING, block_ids=event.block_ids, spoken=True), [Send(message)]


def _prepared(s: SourceState, num_cached: int) -> SourceStep:
    if s.stage == 0:
        s = replace(s, cached=min(num_cached, len(s.block_ids)))
    skip = s.cached if s.stage == 0 else 0
    if skip == len(s.block_ids):
        return _advance(s)
    message = CopyStage(s.request_id, s.epoch, s.stage, s.copied + skip, s.block_ids[skip:])
    return replace(s, phase=SourcePhase.COPYING), [Send(message)]


def _advance(s: SourceState) -> SourceStep:
    """The present stage is complete: what grew meanwhile is the next, or the last."""
    copied, stage = s.copied + len(s.block_ids), s.stage + 1
    forced = s.limits.mode == "recompute" or stage >= s.limits.max_stages
    action = Advance(copied, INFINITE if forced else s.limits.last_stage_max_blocks)
    return replace(s, phase=SourcePhase.ADVANCING, stage=stage, copied=copied, block_ids=()), [action]


def _detached(s: SourceState, event: Detached) -> SourceStep:
    if s.stop is AbortReason.CANCELLED:
        return _source_drop(s, s.stop, tell=s.spoken)
    if s.stop:
        state, actions = _source_abort(s, s.stop, s.detail)
        return state, [Reattach(None), *actions]
    block_ids, snapshot = event.block_ids, event.snapshot
    if s.limits.mode == "recompute":
        block_ids, snapshot = (), replace(snapshot, num_computed_tokens=0, block_hashes=())
    message = Commit(s.request_id, s.epoch, s.stage, s.copied, block_ids, snapshot)
    return replace(s, phase=SourcePhase.COMMITTING, block_ids=block_ids), [Send(message)]


def _source_abort(s: SourceState, reason: AbortReason, detail: str = "") -> SourceStep:
    """End before COMMIT: the request was never offered to anyone, and goes on as it is."""
    actions: list[SourceAction] = [Unhold()]
    if s.spoken:
        actions.append(_tell(s, reason, detail))
    state = replace(s, phase=SourcePhase.ABORTED, reason=reason, detail=detail)
    return state, [*actions, Finish("aborted", reason, detail)]


def _source_drop(s: SourceState, reason: AbortReason, tell: bool) -> SourceStep:
    actions: list[SourceAction] = [Unhold(), Release()]
    if tell:
        actions.append(_tell(s, reason))
    state = replace(s, phase=SourcePhase.DROPPED, reason=reason)
    return state, [*actions, Finish("dropped", reason, s.detail)]


def _remind(s: SourceState, event: SourceEvent) -> list[SourceAction]:
    """A destination that still speaks of an ended migration has missed its end."""
    if s.phase is SourcePhase.ABORTED and isinstance(event, PreAllocAck | StageDone | Committed):
        return [_tell(s, s.reason or AbortReason.STALE)]
    return []


# ---- destination -----------------------------------------------------------------------------------------------------


class DestinationPhase(enum.Enum):
    NEW = "new"
    RESERVING = "reserving"
    READY = "ready"
    """Blocks reserved; waiting for the source."""
    FETCHING = "fetching"
    EXTENDING = "extending"
    """COMMIT came with more blocks than were reserved."""
    COMPLETING = "completing"
    """COMMIT came; its blocks are being copied."""
    ATTACHING = "attaching"
    STOPPING = "stopping"
    """To be aborted when the reserving or copying under way has answered."""
    COMMITTED = "committed"
    ABORTED = "aborted"


@dataclass(frozen=True)
class DestinationState:
    request_id: str
    epoch: int
    layout: KVLayout
    phase: DestinationPhase = DestinationPhase.NEW
    stage: int = -1
    fetched: int = -1
    """Newest stage whose blocks have arrived."""
    num_reserved: int = 0
    num_cached: int = 0
    commit: Commit | None = None
    dropped: bool = False
    """The source took the request back while the engine was taking it in."""
    times: Attached | None = None
    reason: AbortReason | None = None

    @property
    def ended(self) -> bool:
        return self.phase in (DestinationPhase.COMMITTED, DestinationPhase.ABORTED)


DestinationStep = tuple[DestinationState, list[DestinationAction]]


def step_destination(d: DestinationState, event: DestinationEvent) -> DestinationStep:
    """One transition of the destination: the next state and what is to be done, in order."""
    match d.phase, event:
        case DestinationPhase.NEW, PreAlloc(layout=layout) if layout != d.layout:
            return _refuse(d, AbortReason.NUMERICS, _difference(d.layout, layout))
        case ((DestinationPhase.NEW | DestinationPhase.READY), PreAlloc(stage=stage)) if stage > d.stage:
            state = replace(d, phase=DestinationPhase.RESERVING, stage=stage)
            return state, [Reserve(stage, event.num_blocks, event.hashes)]
        case DestinationPhase.NEW, Abort():
            return replace(d, phase=DestinationPhase.ABORTED, reason=event.reason), [Finish("aborted", event.reason)]
        case DestinationPhase.NEW, (CopyStage() | Commit()):
            # Its PRE-ALLOC was forgotten or overtaken: no blocks are reserved, and none will be.
            return _refuse(d, AbortReason.STALE)

        case DestinationPhase.RESERVING, Reserved(stage, num_blocks, num_cached) if stage == d.stage:
            state = replace(d, phase=DestinationPhase.READY, num_reserved=num_blocks, num_cached=num_cached)
            return state, [Send(PreAllocAck(d.request_id, d.epoch, stage, num_cached))]
        case ((DestinationPhase.RESERVING | DestinationPhase.EXTENDING), ReserveFailed(stage)) if stage == d.stage:
            return _give_back(d, AbortReason.NO_MEMORY, tell=True)

        case DestinationPhase.READY, CopyStage(stage=stage) if stage <= d.fetched:
            # A duplicate: its blocks may be offered no more, so it must not be copied again.
            return d, []
        case DestinationPhase.READY, CopyStage(stage=stage) if stage == d.stage:
            if event.first_block + len(event.block_ids) > d.num_reserved:
                return _give_back(d, AbortReason.NO_MEMORY, tell=True)
            state = replace(d, phase=DestinationPhase.FETCHING)
            return state, [Fetch(stage, event.first_block, len(event.block_ids), event.offer, urgent=False)]
        case DestinationPhase.FETCHING, Fetched(stage, seconds) if stage == d.stage:
            done = StageDone(d.request_id, d.epoch, stage, seconds)
            return replace(d, phase=DestinationPhase.READY, fetched=stage), [Send(done)]
        case ((DestinationPhase.FETCHING | DestinationPhase.COMPLETING), FetchFailed(stage, detail)) if (
            stage == d.stage
        ):
            return _give_back(d, AbortReason.COPY_FAILED, tell=True, detail=detail)

        case DestinationPhase.READY, Commit(stage=stage) if stage > d.stage:
            d = replace(d, stage=stage, commit=event)
            needed = event.first_block + len(event.block_ids)
            if needed > d.num_reserved:
                return replace(d, phase=DestinationPhase.EXTENDING), [Reserve(stage, needed, ())]
            return _complete(d)
        case DestinationPhase.EXTENDING, Reserved(stage, num_blocks, _) if stage == d.stage:
            return _complete(replace(d, num_reserved=num_blocks))
        case DestinationPhase.COMPLETING, Fetched(stage) if stage == d.stage and d.commit is not None:
            return replace(d, phase=DestinationPhase.ATTACHING), [Attach(d.commit)]
        case DestinationPhase.ATTACHING, Attached():
            d = replace(d, phase=DestinationPhase.COMMITTED, commit=None, times=event)
            if d.dropped:
                return _drop(d)
            return d, [_committed(d), Finish("committed")]
        case DestinationPhase.ATTACHING, AttachFailed(detail):
            return _give_back(d, AbortReason.REFUSED, tell=not d.dropped, detail=detail)

        case DestinationPhase.ATTACHING, (Abort() | Stop(AbortReason.CANCELLED)):
            return replace(d, dropped=True, reason=event.reason), []
        case DestinationPhase.COMMITTED, (Abort() | Stop(AbortReason.CANCELLED)):
            return _drop(replace(d, reason=event.reason))
        case DestinationPhase.COMMITTED, Commit():
            return d, [_committed(d)]

        case DestinationPhase.READY, (Abort() | Timeout() | PeerLost() | Stop()):
            return _give_back(d, _reason(event), tell=not isinstance(event, Abort | PeerLost))
        case ((DestinationPhase.COMPLETING | DestinationPhase.EXTENDING), PeerLost()):
            # All of the request is here or can be had: taking it in may save it from the source's death.
            return d, []
        case (
            (
                DestinationPhase.RESERVING
                | DestinationPhase.EXTENDING
                | DestinationPhase.FETCHING
                | DestinationPhase.COMPLETING
            ),
            (Abort() | PeerLost() | Stop() | Timeout()),
        ):
            # Blocks must not be given back while something is being written into them.
            return replace(d, phase=DestinationPhase.STOPPING, reason=_reason(event), commit=None), [StopFetch()]
        case DestinationPhase.STOPPING, (Reserved() | ReserveFailed() | Fetched() | FetchFailed()):
            return _give_back(d, d.reason or AbortReason.STALE, tell=True)

        case DestinationPhase.ABORTED, (PreAlloc() | CopyStage() | Commit()):
            return d, [_tell(d, d.reason or AbortReason.STALE)]
        case DestinationPhase.ABORTED, (Reserved() | Attached()):  # Never happens with a driver that answers once.
            return d, [CancelReservation()]
    return d, []


def _committed(d: DestinationState) -> Send:
    times = d.times or Attached()
    return Send(Committed(d.request_id, d.epoch, times.received_at, times.copied_at, times.attached_at))


def _complete(d: DestinationState) -> DestinationStep:
    commit = d.commit
    if commit is None or not commit.block_ids:
        return replace(d, phase=DestinationPhase.ATTACHING), [Attach(commit)] if commit else []
    fetch = Fetch(d.stage, commit.first_block, len(commit.block_ids), commit.offer, urgent=True)
    return replace(d, phase=DestinationPhase.COMPLETING), [fetch]


def _refuse(d: DestinationState, reason: AbortReason, detail: str = "") -> DestinationStep:
    state = replace(d, phase=DestinationPhase.ABORTED, reason=reason)
    return state, [_tell(d, reason, detail), Finish("aborted", reason, detail)]


def _give_back(d: DestinationState, reason: AbortReason, tell: bool, detail: str = "") -> DestinationStep:
    state = replace(d, phase=DestinationPhase.ABORTED, reason=reason, commit=None, num_reserved=0)
    actions: list[DestinationAction] = [CancelReservation()]
    if tell:
        actions.append(_tell(d, reason, detail))
    return state, [*actions, Finish("aborted", reason, detail)]


def _drop(d: DestinationState) -> DestinationStep:
    reason = d.reason or AbortReason.RECLAIMED
    return replace(d, phase=DestinationPhase.ABORTED, reason=reason), [Drop(d.epoch), Finish("aborted", reason)]


def _difference(ours: KVLayout, theirs: KVLayout) -> str:
    names = [n for n in ("numerics", "block_size", "block_bytes") if getattr(ours, n) != getattr(theirs, n)]
    return ", ".join(f"{n}: {getattr(theirs, n)} at the source, {getattr(ours, n)} here" for n in names)
