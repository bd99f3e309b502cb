"""The faults that can be injected, and the file through which a worker is told of those that act inside it. No Ray, no torch.

Off by default: a worker listens only when ``SEXTANT_C4_INJECTION`` names a folder (see ``hook``).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from actors.c4.diagnosis.verdict import FaultClass, FaultKind

ENVIRONMENT = "SEXTANT_C4_INJECTION"
"""Names the control folder; unset: no injection."""


class InjectionError(RuntimeError):
    """A fault could not be injected; the text is a sentence."""


class FaultName(StrEnum):
    """What can be injected."""

    SIGSTOP = "sigstop"
    SIGKILL = "sigkill"
    GIL_LOCK = "gil_lock"
    SLOW_COMPUTE = "slow_compute"
    SLOW_LINK = "slow_link"
    STALLED_LINK = "stalled_link"
    SKIPPED_COLLECTIVE = "skipped_collective"
    MISMATCHED_COLLECTIVE = "mismatched_collective"
    RAISE_ERROR = "raise_error"
    NODE_LOSS = "node_loss"
    DISK_FULL = "disk_full"
    PAUSE = "pause"
    GC_PAUSE = "gc_pause"


@dataclass(frozen=True)
class Kind:
    """What a fault is and what a diagnosis should make of it."""

    meaning: str
    inside: bool
    """Acts inside the worker, through the hook."""
    expected: tuple[FaultKind, ...] = ()
    """Kinds that name it rightly; empty: nothing must be named."""

    @property
    def expected_class(self) -> FaultClass | None:
        return self.expected[0].fault_class if self.expected else None


KINDS: dict[FaultName, Kind] = {
    FaultName.SIGSTOP: Kind("stop the process (SIGSTOP)", False, (FaultKind.PROCESS_STOPPED,)),
    FaultName.SIGKILL: Kind("kill the process (SIGKILL)", False, (FaultKind.PROCESS_DEAD,)),
    FaultName.GIL_LOCK: Kind("hold the interpreter's lock in native code", True, (FaultKind.HEARTBEAT_LOST,)),
    FaultName.SLOW_COMPUTE: Kind("stretch work between operations by FACTOR", True, (FaultKind.WORK_SLOW,)),
    FaultName.SLOW_LINK: Kind("pace the connection to PEER to RATE bytes/s", False, (FaultKind.LINK_SLOW,)),
    FaultName.STALLED_LINK: Kind("send nothing more over the connection to PEER", False, (FaultKind.LINK_STALLED,)),
    FaultName.SKIPPED_COLLECTIVE: Kind(
        "leave the next collective out", True, (FaultKind.MISMATCHED_COLLECTIVE, FaultKind.NEVER_ENTERED)
    ),
    FaultName.MISMATCHED_COLLECTIVE: Kind(
        "call a broadcast in place of the next collective", True, (FaultKind.MISMATCHED_COLLECTIVE,)
    ),
    FaultName.RAISE_ERROR: Kind("raise RuntimeError from the next operation", True),
    FaultName.NODE_LOSS: Kind("kill the node: its workers, its agent, its raylet", False, (FaultKind.NODE_LOST,)),
    FaultName.DISK_FULL: Kind("let files grow to LIMIT bytes at most (RLIMIT_FSIZE)", False),
    FaultName.PAUSE: Kind("sleep once for DURATION before the next operation: no fault", True),
    FaultName.GC_PAUSE: Kind("hold the interpreter's lock once for DURATION, as a collection does: no fault", True),
}


@dataclass(frozen=True)
class Fault:
    """One fault to inject."""

    name: FaultName
    rank: int
    peer: int | None = None
    """Receiver of a link; None: the next rank of the ring."""
    factor: float = 3.0
    """Of SLOW_COMPUTE: work takes this many times as long; of SLOW_LINK without a rate: a step does."""
    rate_bytes_per_s: float | None = None
    duration_s: float | None = None
    """None: until it is stopped."""
    limit_bytes: int = 65536
    """Of DISK_FULL."""
    id: str = ""
    """Set by ``inject``."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise InjectionError(f"The factor of {self.name} must be at least 1, not {self.factor:g}.")
        if self.duration_s is not None and self.duration_s <= 0:
            raise InjectionError(f"The duration of {self.name} must be greater than 0 s, not {self.duration_s:g}.")
        if self.rate_bytes_per_s is not None and self.rate_bytes_per_s < 1:
            raise InjectionError(f"The rate of {self.name} must be at least 1 byte/s, not {self.rate_bytes_per_s:g}.")
        if self.name in (FaultName.PAUSE, FaultName.GC_PAUSE) and self.duration_s is None:
            raise InjectionError(f"{self.name} needs a duration.")
        if self.peer == self.rank:
            raise InjectionError(f"Rank {self.rank} has no connection to itself.")


@dataclass(frozen=True)
class Applied:
    """What the hook answers about a fault."""

    id: str
    at_ns: int
    """CLOCK_MONOTONIC of the worker when it took effect."""
    problem: str = ""
    """Why it did not; empty: it did."""


def control_file(folder: Path | str, pid: int) -> Path:
    """What a worker's hook reads: the faults that shall act now."""
    return Path(folder) / f"faults-{pid}.json"


def answer_file(folder: Path | str, pid: int) -> Path:
    """What it writes: those that it has applied."""
    return Path(folder) / f"applied-{pid}.json"


def write_faults(path: Path, faults: Sequence[Fault]) -> None:
    """Replaces the file whole."""
    _write_whole(path, json.dumps([asdict(fault) for fault in faults]))


def read_faults(path: Path) -> tuple[Fault, ...]:
    """The faults; none when there is no file yet."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return ()
    return tuple(Fault(**entry | {"name": FaultName(entry["name"])}) for entry in data)


def write_applied(path: Path, applied: Sequence[Applied]) -> None:
    """Replaces the file whole."""
    _write_whole(path, json.dumps([asdict(one) for one in applied]))


def read_applied(path: Path) -> dict[str, Applied]:
    """By the fault's id."""
    try:
        return {entry["id"]: Applied(**entry) for entry in json.loads(path.read_text())}
    except FileNotFoundError:
        return {}


def _write_whole(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as file:
        file.write(text)
    Path(temporary).replace(path)
