"""What the diagnosis demands before it names a fault. All thresholds in one place; times adapt to the job's own step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DiagnosisSettings:
    """Defaults hold for steps from 50 ms to minutes: what is a duration here is a floor under a multiple of the job's step."""

    hang_steps: float = 5.5
    """Peers must have waited this many median steps: pauses of up to 5 (evaluation, checkpoint, GC) are healthy."""
    hang_floor_s: float = 1.0
    """Never less than this, so that a busy host is not a hang."""
    hang_unknown_s: float = 30.0
    """While the step is not known yet: imports, compilation and the first steps differ between ranks by many seconds."""
    survived_factor: float = 1.2
    """A wait that ended well raises the threshold to this multiple of it (a job with longer pauses teaches them) ..."""
    survived_cap: float = 1.5
    """... but to no more than this multiple of what the step alone gives."""
    survived_half_life_s: float = 120.0
    stop_confirm_s: float = 0.15
    """A process must still be stopped after this: debuggers and stack samplers stop it for an instant."""
    mismatch_floor_s: float = 0.3
    """Different operations under one number cannot both be right; only the readers' skew is waited out."""
    node_lost_s: float = 1.5
    """Silence of a node's agent while the ranks' peers wait (or nobody moves)."""
    node_silent_s: float = 15.0
    """Silence alone, even if nobody is seen waiting: longer than an agent's restart."""
    stale_report_s: float = 0.8
    """Rows older than this say nothing about the present: their ranks are not judged by them."""

    history_blocks: int = 64
    """Blocks kept for each rank of a group and each connection."""
    recent_blocks: int = 3
    """A slowness must last at least so many blocks ..."""
    recent_steps: float = 2.0
    """... and so many steps; two blocks do when a block alone holds two steps or more."""
    recent_s: float = 1.0
    """... and so long: a host's own work holds a rank up for some tenths of a second, which are several of the shortest steps."""
    recent_share: float = 0.75
    """Share of the recent blocks that must be elevated, each by itself: one-off pauses fill one block."""
    warmup_blocks: int = 2
    """First blocks of a group, which never become part of the healthy past."""
    past_blocks: int = 6
    """Blocks of a healthy past that calibrate a rank or a connection."""
    deviations: float = 5.0
    """Present (a median over blocks) above the past by this many of its standard deviations (from 1.4826 MAD) ..."""
    own_ratio: float = 1.25
    """... and by this factor; both relative to its like in the same blocks (what slows all is no rank's fault)."""
    disagreement: float = 3.0
    """... and by this many standard deviations of the others among themselves at present: noise that comes over all."""
    uncalibrated_ratio: float = 1.6
    """Above its like, for what was slow from the beginning and has no healthy past ..."""
    uncalibrated_blocks: int = 8
    """... and over so many blocks."""
    share_floor: float = 0.005
    """The excess of a connection must be this share of the time between two operations: trifles slow nobody ..."""
    quick_share: float = 0.04
    """... and this share to be named soon; what costs less must last four times as long. A busy host delays a connection by one
    or two percent of a step for a few steps: measured in healthy training of four workers on two cores."""
    work_share_floor: float = 0.03
    """The same for a rank's own work."""
    waiting_share: float = 0.25
    """Mates must wait at least this part of a slow rank's excess, else it holds nobody up."""
    defer_s: float = 2.0
    """At least so long a verdict waits for neighbours (same node, same row or column) that are on the edge of joining it."""
    busy_wake_s: float = 0.003
    """A rank whose heartbeat thread waits so long for a processor whenever it has to run is on a busy host: there a process is
    held up for a second or two without being at fault ..."""
    busy_hold_s: float = 10.0
    """... so its slowness must be seen for this long without a break, but no longer than a quarter of the history ..."""
    busy_hang_hold_s: float = 2.5
    """... and what looks like a hang for this long: the job stands still meanwhile."""
    forget_s: float = 30.0
    """A fault that was not seen for this long may be announced again."""
