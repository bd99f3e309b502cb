"""Inject a fault into a running worker of this host: by signal and limit from outside, by link control, or through its hook.

target = Target(rank=2, pid=4711, started_ticks=..., ring=Path("/dev/shm/.../run.g0.r2.p4711.ring"))
injected = inject(Fault(FaultName.SLOW_LINK, rank=2, peer=3, rate_bytes_per_s=2e7), target, folder)
...
injected.stop()
"""

from __future__ import annotations

import resource
import signal
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from actors.c4 import processes
from actors.c4.injection.faults import (
    KINDS,
    Fault,
    FaultName,
    InjectionError,
    answer_file,
    control_file,
    read_applied,
    read_faults,
    write_faults,
)
from actors.c4.recorder.errors import RingFormatError
from actors.c4.recorder.files import side_file
from actors.c4.recorder.links import LinkControls
from actors.c4.recorder.reader import RingReader

ANSWER_WAIT_S = 10.0
LINKS = (FaultName.SLOW_LINK, FaultName.STALLED_LINK)


@dataclass(frozen=True)
class Target:
    """A worker of this host."""

    rank: int
    pid: int
    started_ticks: int
    ring: Path | None = None
    node_pids: tuple[tuple[int, int], ...] = ()
    """For NODE_LOSS: (pid, start ticks) of what makes up the node beside this worker; killed in this order."""


@dataclass(frozen=True)
class Injected:
    """A fault that acts."""

    fault: Fault
    target: Target
    at_ns: int
    """CLOCK_MONOTONIC when it took effect."""
    folder: Path
    former_limit: tuple[int, int] | None = None

    def stop(self) -> None:
        """Take the fault back, where that is possible (a dead process stays dead)."""
        fault, target = self.fault, self.target
        if fault.name is FaultName.SIGSTOP:
            processes.kill(target.pid, target.started_ticks, signal.SIGCONT)
        elif fault.name in LINKS:
            _with_links(target, lambda links: links.free(_peer(fault)))
        elif fault.name is FaultName.DISK_FULL and self.former_limit is not None:
            if processes.state_of(target.pid, target.started_ticks) is not processes.ProcessState.GONE:
                resource.prlimit(target.pid, resource.RLIMIT_FSIZE, self.former_limit)
        elif KINDS[fault.name].inside:
            path = control_file(self.folder, target.pid)
            write_faults(path, [one for one in read_faults(path) if one.id != fault.id])


def inject(fault: Fault, target: Target, folder: Path, wait_s: float = ANSWER_WAIT_S) -> Injected:
    """Apply a fault and tell when it took effect. ``duration_s`` of faults from outside is the caller's to keep (``stop``).

    Args:
        fault: of ``target``'s rank.
        target: the worker.
        folder: of the control files (what ``SEXTANT_C4_INJECTION`` names in the worker).
        wait_s: for the hook's answer; the faults of one operation take effect at the next one.

    Raises:
        InjectionError: the process is gone, listens to nothing, or did not answer in time.
    """
    if processes.state_of(target.pid, target.started_ticks) is processes.ProcessState.GONE:
        raise InjectionError(f"The process {target.pid} of rank {target.rank} has ended.")
    fault = replace(fault, id=fault.id or uuid.uuid4().hex)
    if KINDS[fault.name].inside:
        return _inside(fault, target, folder, wait_s)
    former = None
    if fault.name in (FaultName.SIGSTOP, FaultName.SIGKILL):
        number = signal.SIGSTOP if fault.name is FaultName.SIGSTOP else signal.SIGKILL
        processes.kill(target.pid, target.started_ticks, number)
    elif fault.name is FaultName.NODE_LOSS:
        for pid, ticks in ((target.pid, target.started_ticks), *target.node_pids):
            processes.kill(pid, ticks)
    elif fault.name is FaultName.DISK_FULL:
        former = resource.prlimit(target.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(target.pid, resource.RLIMIT_FSIZE, (fault.limit_bytes, former[1]))
    elif fault.name is FaultName.STALLED_LINK:
        _with_links(target, lambda links: links.stall(_peer(fault)))
    elif fault.name is FaultName.SLOW_LINK:
        rate = fault.rate_bytes_per_s or pacing_rate(target, fault.factor)
        _with_links(target, lambda links: links.pace(_peer(fault), max(1, int(rate))))
    return Injected(fault, target, time.monotonic_ns(), folder, former)


def pacing_rate(target: Target, factor: float) -> float:
    """Bytes per second to which a link must be held so that the job takes about ``factor`` times as long.

    Every connection of a ring carries the same bytes, so what this worker receives in a second is what it sends; held to
    1/(factor - 1) of that, the link adds factor - 1 seconds to every second of training (less where transfers overlap work).

    Raises:
        InjectionError: the ring tells of no traffic.
    """
    with _ring(target) as reader:
        snapshot = reader.read()
    done = snapshot.operations[snapshot.operations["end_ns"] > 0][-64:]
    edges = snapshot.edges[np.isin(snapshot.edges["op_id"], done["op_id"])]
    received = int(edges["bytes"][edges["destination"] == target.rank].sum())
    if received < 1 or len(done) < 2:
        raise InjectionError(
            f"Rank {target.rank} has received nothing yet by which a link's load is known: give a rate."
        )
    spans_s = (int(done["end_ns"].max()) - int(done["enter_ns"].min())) / 1e9
    return received / spans_s / max(factor - 1, 0.01)


def successor(target: Target) -> int:
    """The next rank in the ring of the largest group: where the worker's outgoing connection ends."""
    with _ring(target) as reader:
        groups = [one for one in reader.read().communicators if len(one.ranks) > 1 and target.rank in one.ranks]
    if not groups:
        raise InjectionError(f"Rank {target.rank} is in no group yet.")
    ranks = max((one.ranks for one in groups), key=len)
    return ranks[(ranks.index(target.rank) + 1) % len(ranks)]


def with_peer(fault: Fault, target: Target) -> Fault:
    """The fault with the receiver of its link filled in."""
    return replace(fault, peer=successor(target)) if fault.name in LINKS and fault.peer is None else fault


def _inside(fault: Fault, target: Target, folder: Path, wait_s: float) -> Injected:
    path = control_file(folder, target.pid)
    if not folder.is_dir():
        raise InjectionError(
            f"There is no control folder {folder}: the run was not started with fault injection enabled."
        )
    before: Sequence[Fault] = read_faults(path)
    write_faults(path, [*before, fault])
    deadline = time.monotonic() + wait_s
    while (applied := read_applied(answer_file(folder, target.pid)).get(fault.id)) is None:
        if time.monotonic() > deadline:
            write_faults(path, before)
            raise InjectionError(
                f"Rank {target.rank} did not take {fault.name} within {wait_s:g} s: "
                "injection is not enabled in it, or it is in no operation."
            )
        time.sleep(0.01)
    if applied.problem:
        raise InjectionError(f"{fault.name} at rank {target.rank}: {applied.problem}")
    return Injected(fault, target, applied.at_ns, folder)


def _peer(fault: Fault) -> int:
    if fault.peer is None:
        raise InjectionError(f"{fault.name} needs a peer: the rank at the other end of the link.")
    return fault.peer


def _ring(target: Target) -> RingReader:
    if target.ring is None:
        raise InjectionError(f"The ring of rank {target.rank} is not known.")
    try:
        return RingReader(target.ring)
    except (OSError, RingFormatError) as error:
        raise InjectionError(f"The ring of rank {target.rank} cannot be read: {error}.") from error


def _with_links(target: Target, act) -> None:  # type: ignore[no-untyped-def]
    if target.ring is None:
        raise InjectionError(f"The ring of rank {target.rank} is not known, so neither are its links.")
    try:
        links = LinkControls.open(side_file(target.ring, ".links"))
    except (OSError, RingFormatError) as error:
        raise InjectionError(f"The links of rank {target.rank} cannot be controlled: {error}.") from error
    try:
        act(links)
    except ValueError as error:
        raise InjectionError(str(error)) from error
    finally:
        links.close()
