"""The waits-for graph: at which operation each rank stands, and for whom it waits there.

Rank r waits for m when m belongs to an operation that holds r up and m's host has not entered it, or m's device stands at an
earlier operation. A rank for which others wait and that waits for nobody is where a hang begins.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from actors.c4.flight_recorder.job import Job
from actors.c4.flight_recorder.model import Operation


@dataclass(frozen=True, slots=True)
class Wait:
    """``waiter`` is held up in ``operation`` by ``awaited``, whose host did (``entered``) or did not enter it."""

    waiter: int
    awaited: int
    operation: Operation
    entered: bool


@dataclass
class Waits:
    """Edges out of and into each rank; ``doubtful`` ones lead to ranks of which nothing is known."""

    by_waiter: dict[int, list[Wait]] = field(default_factory=lambda: defaultdict(list))
    by_awaited: dict[int, list[Wait]] = field(default_factory=lambda: defaultdict(list))
    doubtful: dict[int, list[Wait]] = field(default_factory=lambda: defaultdict(list))
    arrived: dict[tuple[str, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    """(group, number) of collectives at which all members stand, with the ranks that are held up there."""

    def add(self, wait: Wait) -> None:
        self.by_waiter[wait.waiter].append(wait)
        self.by_awaited[wait.awaited].append(wait)

    def not_entered(self, rank: int) -> list[Wait]:
        """Those who wait for ``rank``'s host to enter an operation."""
        return [wait for wait in self.by_awaited.get(rank, ()) if not wait.entered]

    def reaching(self, targets: Iterable[int]) -> set[int]:
        """All ranks from which waiting leads to one of ``targets`` (these included)."""
        seen = set(targets)
        queue = list(seen)
        while queue:
            for wait in self.by_awaited.get(queue.pop(), ()):
                if wait.waiter not in seen:
                    seen.add(wait.waiter)
                    queue.append(wait.waiter)
        return seen


def waits_for(job: Job) -> Waits:
    """The graph of all ranks that left a dump."""
    waits = Waits()
    for rank, blockers in job.blockers.items():
        for operation in blockers:
            if operation.is_p2p:
                _wait_for_partner(job, waits, rank, operation)
            else:
                _wait_for_members(job, waits, rank, operation)
    return waits


def _wait_for_members(job: Job, waits: Waits, rank: int, operation: Operation) -> None:
    behind, stuck_before, unknown = [], [], []
    for member in job.members.get(operation.group, ()):
        if member == rank:
            continue
        count = job.enqueued(member, operation.group)
        if count is None:
            unknown.append(member)
        elif count < operation.seq:
            behind.append(member)
        elif (own := job.pending(member, operation.group).get(operation.seq)) is not None:
            head = job.head(member)
            if head is not None and head.record_id < own.record_id:
                stuck_before.append(member)
    for member in behind:
        waits.add(Wait(rank, member, operation, entered=False))
    if not behind:
        for member in stuck_before:
            waits.add(Wait(rank, member, operation, entered=True))
    for member in unknown:
        waits.doubtful[rank].append(Wait(rank, member, operation, entered=False))
    if not behind and not stuck_before and not unknown:
        waits.arrived[operation.group, operation.seq].append(rank)


def _wait_for_partner(job: Job, waits: Waits, rank: int, operation: Operation) -> None:
    partner = job.partner(operation, rank)
    if partner is None:
        return
    if not job.has_progress(partner):
        waits.doubtful[rank].append(Wait(rank, partner, operation, entered=False))
        return
    route = (operation.group, operation.name, operation.source, operation.target)
    place = sum(1 for other in job.pending_p2p(rank, *route) if other.record_id <= operation.record_id)
    other_name = "send" if operation.name == "recv" else "recv"
    counterparts = job.pending_p2p(partner, operation.group, other_name, operation.source, operation.target)
    if len(counterparts) < place:
        waits.add(Wait(rank, partner, operation, entered=False))
        return
    head = job.head(partner)
    if head is not None and head.record_id < counterparts[place - 1].record_id:
        waits.add(Wait(rank, partner, operation, entered=True))
    else:
        waits.arrived[operation.group, -1 - operation.seq].append(rank)
