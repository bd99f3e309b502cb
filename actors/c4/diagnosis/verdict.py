"""What a diagnosis says: class, kind, culprit, evidence, confidence and time of a fault. No Ray, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FaultClass(StrEnum):
    """The paper's four classes (C4, section on C4D)."""

    COMMUNICATION_HANG = "communication_hang"
    NON_COMMUNICATION_HANG = "non_communication_hang"
    COMMUNICATION_SLOW = "communication_slow"
    NON_COMMUNICATION_SLOW = "non_communication_slow"


class FaultKind(StrEnum):
    """What exactly was seen; each belongs to one class."""

    PROCESS_DEAD = "process_dead"
    """The worker's process is gone."""
    PROCESS_STOPPED = "process_stopped"
    """The process is stopped (state T)."""
    HEARTBEAT_LOST = "heartbeat_lost"
    """The process runs but its heartbeat thread does not: something holds the GIL."""
    NEVER_ENTERED = "never_entered"
    """Peers wait in an operation that this rank has not entered: stuck outside, or it skipped one."""
    NODE_LOST = "node_lost"
    """The node's agent and all its workers are silent."""
    MISMATCHED_COLLECTIVE = "mismatched_collective"
    """All entered, but not the same operation (type, dtype or bytes differ)."""
    LINK_STALLED = "link_stalled"
    """All entered the same operation; bytes do not arrive over a connection."""
    GROUP_STALLED = "group_stalled"
    """All entered the same operation and it does not end; no connection could be told apart."""
    LINK_SLOW = "link_slow"
    """One hot cell of the delay matrix."""
    SENDER_SLOW = "sender_slow"
    """A hot row: everything that this rank (or node) sends is slow."""
    RECEIVER_SLOW = "receiver_slow"
    """A hot column: everything that this rank (or node) receives is slow."""
    WORK_SLOW = "work_slow"
    """The rank that others wait for: slow between operations (compute, data, host)."""

    @property
    def fault_class(self) -> FaultClass:
        return _CLASS_OF[self]


_CLASS_OF = {
    FaultKind.PROCESS_DEAD: FaultClass.NON_COMMUNICATION_HANG,
    FaultKind.PROCESS_STOPPED: FaultClass.NON_COMMUNICATION_HANG,
    FaultKind.HEARTBEAT_LOST: FaultClass.NON_COMMUNICATION_HANG,
    FaultKind.NEVER_ENTERED: FaultClass.NON_COMMUNICATION_HANG,
    FaultKind.NODE_LOST: FaultClass.NON_COMMUNICATION_HANG,
    FaultKind.MISMATCHED_COLLECTIVE: FaultClass.COMMUNICATION_HANG,
    FaultKind.LINK_STALLED: FaultClass.COMMUNICATION_HANG,
    FaultKind.GROUP_STALLED: FaultClass.COMMUNICATION_HANG,
    FaultKind.LINK_SLOW: FaultClass.COMMUNICATION_SLOW,
    FaultKind.SENDER_SLOW: FaultClass.COMMUNICATION_SLOW,
    FaultKind.RECEIVER_SLOW: FaultClass.COMMUNICATION_SLOW,
    FaultKind.WORK_SLOW: FaultClass.NON_COMMUNICATION_SLOW,
}


@dataclass(frozen=True)
class Culprit:
    """The faulty part. A link is named by both ends, a node by its name and the ranks on it."""

    ranks: tuple[int, ...] = ()
    """Global ranks, ascending; empty for a link."""
    link: tuple[int, int] | None = None
    """(source rank, destination rank) of a connection."""
    nodes: tuple[str, ...] = ()
    """The nodes that hold it: of the ranks, or of the link's two ends (source first)."""

    def __str__(self) -> str:
        if self.link is not None:
            return f"link {self.link[0]}->{self.link[1]}"
        return f"rank{'s' if len(self.ranks) != 1 else ''} {', '.join(map(str, self.ranks))}"


@dataclass(frozen=True)
class Verdict:
    """One named fault. Times are seconds on the clock of whoever diagnoses (monotonic)."""

    kind: FaultKind
    culprit: Culprit
    evidence: tuple[str, ...]
    """Sentences with the numbers that speak for it, strongest first."""
    confidence: float
    """0 to 1."""
    onset_s: float
    """When the fault began, as far as the records tell."""
    found_s: float
    group: str = ""
    """Name of the communicator in which it was seen; empty when it needed none."""
    sequence: int = 0
    """Sequence number of the operation in which it was seen; 0 when it needed none."""
    slowdown: float = 1.0
    """For slow kinds: duration of what is slow over that of its like, at least 1."""

    @property
    def fault_class(self) -> FaultClass:
        return self.kind.fault_class

    @property
    def detection_s(self) -> float:
        """Seconds from onset to naming."""
        return self.found_s - self.onset_s
