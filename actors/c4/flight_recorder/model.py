"""What crosses the boundaries of this room: operations, one rank's dump, a set of dumps, a diagnosis."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

GroupKey = str
"""Name of a process group; unique in a job, the same on all its members."""


class State(enum.IntEnum):
    """How far the recorder saw an operation get. SCHEDULED: enqueued by the host; STARTED: the device began it."""

    SCHEDULED = 0
    STARTED = 1
    COMPLETED = 2


@dataclass(frozen=True, slots=True)
class Operation:
    """One entry of a dump. ``seq`` counts the group's collectives, or this rank's point-to-point operations in the group."""

    record_id: int
    group: GroupKey
    name: str
    """Type without the backend's prefix, e.g. ``all_reduce``; ``send`` and ``recv`` for point-to-point."""
    seq: int
    state: State
    is_p2p: bool = False
    source: int = -1
    """Sender of a point-to-point operation, as a rank in the group."""
    target: int = -1
    input_numel: int = 0
    output_numel: int = 0
    dtypes: tuple[str, ...] = ()
    created_ns: int = 0

    def describe(self) -> str:
        """For people: ``all_reduce #17``."""
        route = f" {self.source}->{self.target}" if self.is_p2p else ""
        return f"{self.name}{route} #{self.seq}"


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """``pg_status`` of a dump: last sequence numbers that host and watchdog saw; -1 where none."""

    enqueued: int
    completed: int


@dataclass(frozen=True)
class RankDump:
    """One rank's dump in one schema, whatever version wrote it."""

    rank: int
    source: str
    """Name of the file."""
    version: str = ""
    group_ranks: Mapping[GroupKey, tuple[int, ...]] = field(default_factory=dict)
    """Global ranks of the groups that this rank belongs to, in the group's order, where the dump says so."""
    group_descriptions: Mapping[GroupKey, str] = field(default_factory=dict)
    group_numbers: Mapping[int, GroupKey] = field(default_factory=dict)
    """The process's own numbers of its groups, as far as entries tell (``pg_id``)."""
    numbered_status: Mapping[int, GroupStatus] = field(default_factory=dict)
    """``pg_status`` as dumped, by the process's own number of the group."""
    status: Mapping[GroupKey, GroupStatus] = field(default_factory=dict)
    """``pg_status`` by group, where the number could be tied to a name."""
    incomplete: tuple[Operation, ...] = ()
    """Operations that never completed, in the order of their enqueueing."""
    recent: Mapping[GroupKey, Mapping[int, Operation]] = field(default_factory=dict)
    """Collectives that the dump still holds, by group and sequence number (the newest of each group)."""
    enqueued: Mapping[GroupKey, int] = field(default_factory=dict)
    """Highest collective sequence number in the entries of each group."""
    enqueued_p2p: Mapping[GroupKey, int] = field(default_factory=dict)
    frontier: int = -1
    """Highest record number of an operation that completed; all before it that is still incomplete blocks nothing."""
    first_record: int = -1
    last_record: int = -1
    entries: int = 0
    reports_starts: bool = False
    """The recorder saw when operations start on the device (it does so only with TORCH_NCCL_ENABLE_TIMING)."""
    tracks_completion: bool = True
    """False for recorders that never learn that an operation completed (gloo in older versions)."""
    newest_ns: int = 0

    @property
    def is_silent(self) -> bool:
        """It holds nothing that tells where the rank is: no entries, and no status either."""
        return self.entries == 0 and not self.numbered_status


@dataclass(frozen=True)
class DumpSet:
    """The dumps of one run. ``world`` are all ranks that the dumps name, ``silent`` those of them that left no usable dump."""

    dumps: Mapping[int, RankDump]
    world: tuple[int, ...]
    silent: frozenset[int] = frozenset()
    empty: frozenset[int] = frozenset()
    """Those of ``silent`` that did begin a dump: there is a file, but nothing in it."""
    warnings: tuple[str, ...] = ()


class FaultClass(enum.StrEnum):
    """The classes of C4 that a dump can show, and none. Slowness cannot be read off a dump."""

    COMMUNICATION_HANG = "communication_hang"
    NON_COMMUNICATION_HANG = "non_communication_hang"
    HEALTHY = "healthy"


class Cause(enum.StrEnum):
    """Why a rank is a culprit."""

    DEVICE_FROZEN = "device_frozen"
    """Its record stopped at an operation that its peers completed, which they could not have done without it."""
    HOST_STOPPED = "host_stopped"
    """It enqueued nothing more although nothing that it enqueued holds it up."""
    DEVICE_NOT_STARTED = "device_not_started"
    """Its device never started an operation that the devices of all peers started."""
    DEVICE_STUCK = "device_stuck"
    """Its device alone stands at an operation that the other side entered and went past."""
    MISMATCH = "mismatch"
    """It called another operation, size or dtype than the other members."""
    SILENT = "silent"
    """It left no usable dump, and others wait for it and for nobody else."""


@dataclass(frozen=True)
class Finding:
    """One culprit, where it shows, and the sentence that says why."""

    rank: int
    cause: Cause
    group: GroupKey | None
    operation: Operation | None
    sentence: str


@dataclass(frozen=True)
class Diagnosis:
    """The verdict on a set of dumps. ``suspects``: the dumps only narrow it down to these (no culprit is named among them)."""

    fault_class: FaultClass
    findings: tuple[Finding, ...] = ()
    process_group: str | None = None
    collective: str | None = None
    sequence: int | None = None
    suspects: tuple[int, ...] = ()
    evidence: tuple[str, ...] = ()
    confidence: str = "high"
    warnings: tuple[str, ...] = ()
    world_size: int = 0
    ranks_read: int = 0
    silent: tuple[int, ...] = ()

    @property
    def culprit_ranks(self) -> tuple[int, ...]:
        """Ascending."""
        return tuple(sorted({finding.rank for finding in self.findings}))
