"""Settings of migration, and what a migration reports when it has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from actors.llumnix.migration.protocol import Limits


@dataclass(frozen=True)
class MigrationConfig:
    """How requests move; a nested part of ``apps.llumnix``'s configuration (pydantic validates it there)."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    mode: Literal["live", "recompute"] = "live"
    """``recompute`` stops the request and prefills it again at the destination: the paper's baseline."""
    last_stage_max_blocks: int = 2
    """A request is stopped for the last stage once at most so many blocks remain to be copied."""
    max_stages: int = 4
    """A request that outruns the copying is stopped after so many stages."""
    max_outgoing: int = 4
    max_incoming: int = 4
    copy_duty: float = 0.25
    """Fraction of the time that copying takes while the request still decodes; the rest belongs to the engines. The last
    stage is never slowed."""
    transports: tuple[Literal["shared_memory", "gloo", "object_store"], ...] = (
        "shared_memory",
        "gloo",
        "object_store",
    )
    """KV transports in order of preference."""
    measure: Literal["off", "chosen", "all"] = "chosen"
    """At the first contact with a peer measure no transport, the preferred one, or all (and use the fastest)."""
    connect_timeout_s: float = 3.0
    prepare_timeout_s: float = 10.0
    """How long a PRE-ALLOC may go unanswered."""
    copy_timeout_s: float = 60.0
    commit_timeout_s: float = 10.0
    """After so long without COMMITTED the source asks for a new epoch and goes on."""
    reservation_timeout_s: float = 30.0
    """A destination frees blocks that the source has not spoken of for so long."""
    reclaim_retry_s: float = 0.2
    """First pause between two calls of the epoch authority; doubles up to 5 s."""
    reclaim_give_up_s: float = 120.0
    """A request whose epoch could not be renewed for so long is dropped (its ingress recovers it from the journal)."""

    def limits(self, mode: Literal["live", "recompute"] | None = None) -> Limits:
        """The part that the protocol knows."""
        return Limits(mode or self.mode, self.last_stage_max_blocks, self.max_stages)


@dataclass(frozen=True)
class MigrationReport:
    """How one migration ended, as its source saw it. Times: ``time.monotonic()`` seconds, shared by a host's processes."""

    request_id: str
    epoch: int
    source: str
    destination: str
    outcome: str
    """``committed``: the destination has it. ``aborted``: it goes on at the source, or had ended before. ``dropped``: the source
    let go of it (its client left, a newer owner exists, or no new epoch could be had)."""
    reason: str | None = None
    """``AbortReason`` value unless committed."""
    detail: str = ""
    mode: str = "live"
    transport: str = ""
    stages: int = 0
    """The last one included; the paper's minimum is 2."""
    blocks: int = 0
    """Blocks copied."""
    cached_blocks: int = 0
    """Blocks that the destination had in its prefix cache."""
    last_stage_blocks: int = 0
    """Blocks copied while the request stood still."""
    bytes: int = 0
    copy_seconds: float = 0.0
    """Of the stages during which decoding went on, as the destination saw it."""
    total_ms: float = 0.0
    downtime_ms: float = 0.0
    """From the end of the source's last step with the request until the destination had it in its running set. Between hosts
    (clocks are not comparable): until COMMITTED came back. 0 unless committed."""
    started_at: float = 0.0
    detached_at: float | None = None
    """End of the source's last step with the request."""
    commit_sent_at: float | None = None
    received_at: float | None = None
    """COMMIT at the destination (its clock)."""
    copied_at: float | None = None
    attached_at: float | None = None
    """In the destination's running set (its clock)."""
    committed_at: float | None = None
    """COMMITTED at the source."""

    @property
    def committed(self) -> bool:
        return self.outcome == "committed"
