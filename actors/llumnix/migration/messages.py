"""What source and destination of a live migration say to one another, and what else can happen to them. Frozen, hashable data.

A migration is known by (request_id, epoch); the epoch is the scheduler's, fresh for every order. The handshake is the
paper's (Llumnix, OSDI 2024, section 4.2): PRE-ALLOC and ACK before each stage, ABORT from either side, COMMIT at the end.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from actors.llumnix.engine.request import SequenceSnapshot


class AbortReason(enum.Enum):
    """Why a migration did not happen. The request goes on where it was, or has ended."""

    FINISHED = "finished"
    """The request ended (or was aborted by its client) before the last stage."""
    PREEMPTED = "preempted"
    """The source had to take the request's blocks away."""
    CANCELLED = "cancelled"
    """The client is gone: the request is dropped on both sides."""
    WITHDRAWN = "withdrawn"
    """The order was taken back; the request goes on at the source."""
    NO_MEMORY = "no_memory"
    """The destination has no room (blocks, places in the batch), or is draining."""
    NUMERICS = "numerics"
    """The two instances would compute different bits, or lay blocks out differently."""
    STALE = "stale"
    """The destination knows this migration, or a later one of the request, as ended."""
    TIMEOUT = "timeout"
    PEER_LOST = "peer_lost"
    COPY_FAILED = "copy_failed"
    REFUSED = "refused"
    """The destination's engine would not take the request in."""
    RECLAIMED = "reclaimed"
    """COMMIT had no known end: the source goes on under a newer epoch."""
    BUSY = "busy"
    """As many migrations are under way there as may be."""
    SHUTDOWN = "shutdown"


@dataclass(frozen=True)
class KVLayout:
    """Two instances with equal layouts produce and store the same bits."""

    numerics: str
    block_size: int
    block_bytes: int


# ---- messages


@dataclass(frozen=True)
class Message:
    request_id: str
    epoch: int


@dataclass(frozen=True)
class PreAlloc(Message):
    """Source -> destination, before each stage: make the reservation ``num_blocks`` long."""

    stage: int
    num_blocks: int
    hashes: tuple[bytes, ...]
    """Of the leading full blocks (stage 0), so that blocks in the destination's prefix cache need no copy."""
    layout: KVLayout


@dataclass(frozen=True)
class PreAllocAck(Message):
    """Destination -> source: reserved; the first ``num_cached`` blocks are already there."""

    stage: int
    num_cached: int


@dataclass(frozen=True)
class CopyStage(Message):
    """Source -> destination: blocks ``first_block`` and on are offered; decoding goes on meanwhile."""

    stage: int
    first_block: int
    block_ids: tuple[int, ...]
    """In the source's pool."""
    offer: Any = None
    """``transport.Offer`` of these blocks; put in by the driver."""


@dataclass(frozen=True)
class StageDone(Message):
    """Destination -> source: every offered block of the stage has arrived."""

    stage: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Commit(Message):
    """Source -> destination: the request has left the batch; the rest of its blocks, and everything else of it."""

    stage: int
    first_block: int
    block_ids: tuple[int, ...]
    snapshot: SequenceSnapshot
    offer: Any = None


@dataclass(frozen=True)
class Committed(Message):
    """Destination -> source: the request is mine, under the migration's epoch.

    Times are the destination's ``time.monotonic()``, comparable with the source's on one host.
    """

    received_at: float = 0.0
    copied_at: float = 0.0
    attached_at: float = 0.0


@dataclass(frozen=True)
class Abort(Message):
    """Either way. From the destination: nothing came of it and nothing will. From the source: everything of the request up to
    this epoch is void, drop it, even if it was committed."""

    reason: AbortReason
    detail: str = ""


# ---- what else happens to the source


@dataclass(frozen=True)
class Start:
    """Begin."""


@dataclass(frozen=True)
class Grew:
    """Answer to Advance: the request goes on here. Its full blocks from ``first`` on are held."""

    first: int
    block_ids: tuple[int, ...]
    hashes: tuple[bytes, ...]
    num_blocks: int
    """All blocks with computed tokens, a partly filled one included."""


@dataclass(frozen=True)
class Detached:
    """Answer to Advance: the request left the batch; the blocks from ``first`` on remain to be copied (and are held)."""

    first: int
    block_ids: tuple[int, ...]
    snapshot: SequenceSnapshot


@dataclass(frozen=True)
class Gone:
    """Answer to Advance: the request is not here any more, or was preempted."""

    reason: AbortReason


@dataclass(frozen=True)
class Reclaimed:
    """Answer to Reclaim: go on under ``epoch``. None: the request was aborted, or has a newer owner."""

    epoch: int | None


@dataclass(frozen=True)
class ReclaimFailed:
    """The authority could not be reached for so long that the request was given up (a journal recovers it)."""


# ---- what else happens to the destination


@dataclass(frozen=True)
class Reserved:
    stage: int
    num_blocks: int
    num_cached: int


@dataclass(frozen=True)
class ReserveFailed:
    stage: int


@dataclass(frozen=True)
class Fetched:
    stage: int
    seconds: float = 0.0


@dataclass(frozen=True)
class FetchFailed:
    stage: int
    detail: str = ""


@dataclass(frozen=True)
class Attached:
    """Answer to Attach: the engine owns the request. Times as in ``Committed``."""

    received_at: float = 0.0
    copied_at: float = 0.0
    attached_at: float = 0.0


@dataclass(frozen=True)
class AttachFailed:
    detail: str = ""


# ---- what happens to either


@dataclass(frozen=True)
class Timeout:
    """The phase that the machine is in has lasted too long."""


@dataclass(frozen=True)
class PeerLost:
    """The connection to the other side is gone."""


@dataclass(frozen=True)
class Stop:
    """Someone on this side wants the migration to end: CANCELLED (drop the request), WITHDRAWN or SHUTDOWN (keep it)."""

    reason: AbortReason


# ---- actions: what a machine wants done


@dataclass(frozen=True)
class Send:
    message: Message


@dataclass(frozen=True)
class Advance:
    """Source, at the next step boundary: if at most ``at_most`` blocks remain from ``first`` on (or the request has none and
    only waits), detach it and answer Detached; else hold its blocks and answer Grew. Gone if it cannot migrate any more."""

    first: int
    at_most: int
    """-1: never detach; INFINITE: always."""


@dataclass(frozen=True)
class Reattach:
    """Source: the request goes on here, under ``epoch`` (None: its own, which no one else was ever offered a successor of)."""

    epoch: int | None


@dataclass(frozen=True)
class Release:
    """Source: forget the detached request and free its blocks."""


@dataclass(frozen=True)
class Unhold:
    """Source: revoke every offer, then let go of the blocks held for the peer."""


@dataclass(frozen=True)
class Reclaim:
    """Source: ask the epoch authority for a new epoch; answer Reclaimed or ReclaimFailed."""

    failed_epoch: int


@dataclass(frozen=True)
class Reserve:
    """Destination: answer Reserved or ReserveFailed."""

    stage: int
    num_blocks: int
    hashes: tuple[bytes, ...]


@dataclass(frozen=True)
class Fetch:
    """Destination: copy the offered blocks into the reservation, from block index ``first_block`` on; Fetched or FetchFailed."""

    stage: int
    first_block: int
    num_blocks: int
    offer: Any
    urgent: bool
    """The request stands still meanwhile."""


@dataclass(frozen=True)
class Attach:
    """Destination: own the request now; answer Attached or AttachFailed."""

    commit: Commit


@dataclass(frozen=True)
class CancelReservation:
    """Destination: give the reserved blocks back."""


@dataclass(frozen=True)
class StopFetch:
    """Destination: end a running fetch soon; its Fetched or FetchFailed is still waited for."""


@dataclass(frozen=True)
class Drop:
    """Destination: end the request if it is here under ``epoch`` or an older one."""

    epoch: int


@dataclass(frozen=True)
class Finish:
    """The machine has come to its end; everything it reserved was given back by the actions before this one."""

    outcome: str
    """``committed``; ``aborted`` (goes on at the source, or had ended); ``dropped`` (the source let go of it)."""
    reason: AbortReason | None = None
    detail: str = ""


INFINITE = 1 << 62

SourceEvent = (
    Start | PreAllocAck | StageDone | Committed | Abort | Grew | Detached | Gone | Reclaimed | ReclaimFailed | Timeout
    | PeerLost | Stop
)  # fmt: skip
DestinationEvent = (
    PreAlloc | CopyStage | Commit | Abort | Reserved | ReserveFailed | Fetched | FetchFailed | Attached | AttachFailed
    | Timeout | PeerLost | Stop
)  # fmt: skip
SourceAction = Send | Advance | Reattach | Release | Unhold | Reclaim | Finish
DestinationAction = Send | Reserve | Fetch | Attach | CancelReservation | StopFetch | Drop | Finish
