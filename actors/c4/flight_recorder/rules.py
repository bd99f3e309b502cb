"""The rules by which one rank is told to be faulty, each from what its dump and its peers' dumps say about the same operations.

None of them reads clocks of different hosts against one another.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from actors.c4.flight_recorder.job import Job, started_anywhere
from actors.c4.flight_recorder.model import Cause, Finding, GroupKey, Operation, State
from actors.c4.flight_recorder.waits import Wait, Waits

# No member can complete these before every member has taken part.
_NEEDS_ALL = ("all_reduce", "allreduce", "all_gather", "allgather", "reduce_scatter", "barrier")
_SAME_SIZE = ("all_reduce", "allreduce", "_all_gather_base", "_reduce_scatter_base", "broadcast", "reduce", "barrier")
_UNEVEN = ("_v", "all_to_all", "alltoall", "coalesced")
_REFERENCES = 3
_DEEP_QUEUE = 64


def frozen(job: Job) -> dict[int, Finding]:
    """Ranks whose record stopped: peers completed a collective that needs everyone, and the rank itself never did.

    So the rank took part and stopped observing: its device context is dead (a GPU error), or its device died within it.
    """
    found: dict[int, Finding] = {}
    for rank, operations in job.incomplete.items():
        if not job.dumps[rank].tracks_completion:
            continue
        first: dict[GroupKey, Operation] = {}
        for operation in operations:
            if not operation.is_p2p:
                first.setdefault(operation.group, operation)
        best: tuple[int, Finding] | None = None
        for group, operation in first.items():
            others = [member for member in job.members.get(group, ()) if member != rank and job.has_progress(member)]
            done = [member for member in others if job.completed(member, group, operation.seq)]
            if not done or not _proves(job, operation, done, others):
                continue
            ahead = max(_completed_through(job, member, group) for member in done) - operation.seq + 1
            sentence = (
                f"Rank {rank} never completed {operation.describe()} of group {job.label(group)}, which "
                f"{ranks_text(done)} completed (and went on for {ahead} more): its device or its observer died there."
            )
            if best is None or ahead > best[0]:
                best = (ahead, Finding(rank, Cause.DEVICE_FROZEN, group, operation, sentence))
        if best is not None:
            found[rank] = best[1]
    return found


def _proves(job: Job, operation: Operation, done: list[int], others: list[int]) -> bool:
    if any(part in operation.name for part in _NEEDS_ALL):
        # A communicator that was aborted looks as if all had completed: a minority must itself still be waiting in the group.
        return 2 * len(done) >= len(others) or any(job.pending(member, operation.group) for member in done)
    # Ranks that exchange nothing in an all-to-all do not wait for one another, so all others must have completed it.
    return ("all_to_all" in operation.name or "alltoall" in operation.name) and len(done) == len(others)


def _completed_through(job: Job, rank: int, group: GroupKey) -> int:
    pending = job.pending(rank, group)
    return min(pending) - 1 if pending else job.enqueued(rank, group) or 0


def mismatched(job: Job) -> tuple[dict[int, Finding], dict[int, str]]:
    """(culprits, suspects with a sentence): members whose operation of a number differs from that of most others.

    Where two halves stand against each other, groups of the same kind tell which is the rule; else both are suspects.
    """
    found: dict[int, Finding] = {}
    suspects: dict[int, str] = {}
    for group, members in job.members.items():
        numbers = sorted({seq for member in members for seq in job.pending(member, group)})
        for seq in numbers[:8]:
            calls = {
                member: operation
                for member in members
                if member in job.dumps and (operation := job.dumps[member].recent.get(group, {}).get(seq)) is not None
            }
            kinds: dict[tuple, list[int]] = defaultdict(list)
            for member, operation in calls.items():
                kinds[_signature(operation)].append(member)
            if len(kinds) < 2:
                continue
            rule = _usual(job, group, seq, kinds)
            for signature, ranks in kinds.items():
                if signature == rule:
                    continue
                for rank in ranks:
                    usual = "" if rule is None else f", where the others call {_signature_text(rule)}"
                    sentence = (
                        f"Rank {rank} calls {_signature_text(signature)} as #{seq} of group {job.label(group)}{usual}."
                    )
                    if rule is None:
                        suspects.setdefault(rank, sentence)
                    else:
                        found.setdefault(rank, Finding(rank, Cause.MISMATCH, group, calls[rank], sentence))
            break  # what follows a mismatch is shifted by it
    return found, suspects


def _signature(operation: Operation) -> tuple:
    name = operation.name
    if any(part in name for part in _UNEVEN):
        return (name,)
    if name in _SAME_SIZE or any(name.startswith(part) for part in ("all_reduce", "allreduce")):
        rooted = name in ("reduce", "broadcast")
        return (name, operation.dtypes[:1], operation.input_numel or (operation.output_numel if rooted else 0))
    return (name, operation.dtypes[:1])


def _signature_text(signature: tuple) -> str:
    parts = [str(signature[0])]
    if len(signature) > 1 and signature[1]:
        parts.append(str(signature[1][0]))
    if len(signature) > 2:
        parts.append(f"{signature[2]} elements")
    return " of ".join(parts[:1]) + (f" ({', '.join(parts[1:])})" if parts[1:] else "")


def _usual(job: Job, group: GroupKey, seq: int, kinds: dict[tuple, list[int]]) -> tuple | None:
    counts = sorted((len(ranks) for ranks in kinds.values()), reverse=True)
    if counts[0] > counts[1]:
        return max(kinds, key=lambda signature: len(kinds[signature]))
    description, size = job.description.get(group, ""), len(job.members[group])
    votes: Counter[tuple] = Counter()
    for other, members in job.members.items():
        if other == group or job.description.get(other, "") != description or len(members) != size:
            continue
        for member in members:
            operation = job.dumps[member].recent.get(other, {}).get(seq) if member in job.dumps else None
            if operation is not None and _signature(operation) in kinds:
                votes[_signature(operation)] += 1
    ranking = votes.most_common(2)
    if ranking and (len(ranking) == 1 or ranking[0][1] > ranking[1][1]):
        return ranking[0][0]
    return None


def idle_but_awaited(job: Job, waits: Waits) -> dict[int, Finding]:
    """Ranks with nothing outstanding that did not enter what others entered: the host stopped by itself.

    An exception, a locked GIL, a stopped process or a data loader does that; no operation of the recorder's holds the rank up.
    """
    ahead: dict[GroupKey, int] = {}
    for operations in job.incomplete.values():
        for operation in operations:
            if not operation.is_p2p and operation.group not in job.p2p_groups:
                ahead[operation.group] = max(ahead.get(operation.group, 0), operation.seq)
    found = {}
    for rank in job.dumps:
        if rank in job.silent or job.incomplete[rank]:
            continue
        waiting = waits.not_entered(rank)
        if waiting:
            wait = first_wait(job, waiting)
            group = wait.operation.group
            told: Operation | None = wait.operation
            name = wait.operation.describe()
            waiters = sorted({one.waiter for one in waiting})
            reason = f"{ranks_text(waiters)} {verb(len(waiters))} for it in {name} of group {job.label(group)}"
        else:
            behind = [
                group
                for group in job.groups_of[rank]
                if group in ahead and (count := job.enqueued(rank, group)) is not None and count < ahead[group]
            ]
            if not behind:
                continue
            group = min(behind, key=lambda group: (len(job.members[group]), group))
            last = job.enqueued(rank, group)
            told = None
            reason = f"in group {job.label(group)} it stopped at #{last} while others went on to #{ahead[group]}"
        sentence = f"Rank {rank} completed all that it enqueued and then enqueued nothing more; {reason}."
        found[rank] = Finding(rank, Cause.HOST_STOPPED, group, told, sentence)
    return found


def host_lag(job: Job, waits: Waits, frozen_ranks: set[int]) -> dict[int, Finding]:
    """Ranks whose host stopped short of where a peer with the same program, held up by the same operations, still went.

    A host is only held up when it waits for an operation. If a peer passed the point with the same operations outstanding, the
    point is none where one waits, so this host stopped by itself. Peers: other members of a collective group in the same place
    of their pipelines.
    """
    found: dict[int, Finding] = {}
    positions: dict[int, tuple] = {}
    for group, members in job.members.items():
        if group in job.p2p_groups or len(members) < 2:
            continue
        counts = {
            member: count
            for member in members
            if member not in frozen_ranks
            and job.has_progress(member)
            and (count := job.enqueued(member, group)) is not None
        }
        if len(set(counts.values())) < 2:
            continue
        leaders = sorted(counts, key=lambda member: (-counts[member], member))
        for rank in counts:
            if rank in found or not job.incomplete[rank]:
                continue
            references = (
                peer for peer in leaders if counts[peer] > counts[rank] and _alike(job, positions, rank, peer)
            )
            for peer, _ in zip(references, range(_REFERENCES), strict=False):
                if not _excused(job, rank, peer, counts[peer] - counts[rank]):
                    missing = counts[rank] + 1
                    operation = job.pending(peer, group).get(missing)
                    found[rank] = Finding(
                        rank,
                        Cause.HOST_STOPPED,
                        group,
                        operation,
                        f"Rank {rank} enqueued no more than #{counts[rank]} in group {job.label(group)} although "
                        f"rank {peer}, held up by the same operations, went on to #{counts[peer]}.",
                    )
                    break
    return found


def _alike(job: Job, positions: dict[int, tuple], rank: int, peer: int) -> bool:
    for one in (rank, peer):
        if one not in positions:
            positions[one] = job.position(one)
    if positions[rank] != positions[peer]:
        return False
    shared_pipeline = any(peer in job.members[group] for group in job.groups_of[rank] if group in job.p2p_groups)
    return not shared_pipeline


def _excused(job: Job, rank: int, peer: int, lag: int) -> bool:
    """An operation holds ``rank`` up whose counterpart ``peer`` completed; or both hosts merely stopped at a full queue."""
    outstanding = len(job.incomplete[rank])
    if outstanding >= _DEEP_QUEUE and lag * 20 <= outstanding:
        return True
    return any(_peer_is_past(job, operation, rank, peer) for operation in job.incomplete[rank])


def _peer_is_past(job: Job, operation: Operation, rank: int, peer: int) -> bool:
    group = _counterpart_group(job, operation.group, rank, peer)
    if group is None:
        return True  # nothing to compare with
    if not operation.is_p2p:
        last = job.enqueued(peer, group)
        return last is None or last < operation.seq or operation.seq not in job.pending(peer, group)
    same = job.pending_p2p(peer, group, operation.name, operation.source, operation.target)
    return not any(other.seq == operation.seq for other in same)


def _counterpart_group(job: Job, group: GroupKey, rank: int, peer: int) -> GroupKey | None:
    """The group that is to ``peer`` what ``group`` is to ``rank``: the same, or the one of the same kind."""
    if peer in job.members[group]:
        return group
    description = job.description.get(group, "")
    same = [other for other in job.groups_of[peer] if job.description.get(other, "") == description and description]
    return same[0] if len(same) == 1 else None


def not_started(job: Job, waits: Waits) -> dict[int, Finding]:
    """Ranks whose device, with nothing ahead of it, did not start a collective that the devices of peers did start."""
    if not started_anywhere(job):
        return {}
    found = {}
    for rank in job.dumps:
        head = job.head(rank)
        if head is None or head.state is not State.SCHEDULED or waits.by_waiter.get(rank):
            continue
        began = [member for member, other in counterparts(job, rank, head) if other.state is State.STARTED]
        if began:
            sentence = (
                f"The device of rank {rank} never started {head.describe()} of group {job.label(head.group)}, which "
                f"{ranks_text(began)} started: it is stuck in what it computes before."
            )
            found[rank] = Finding(rank, Cause.DEVICE_NOT_STARTED, head.group, head, sentence)
    return found


def counterparts(job: Job, rank: int, operation: Operation) -> list[tuple[int, Operation]]:
    """The same operation, as far as it is outstanding, on the other ranks that take part in it."""
    if not operation.is_p2p:
        members = (member for member in job.members.get(operation.group, ()) if member != rank)
        return [(member, own) for member in members if (own := job.pending(member, operation.group).get(operation.seq))]
    partner = job.partner(operation, rank)
    if partner is None:
        return []
    route = (operation.group, operation.source, operation.target)
    place = sum(1 for own in _route(job, rank, operation.name, route) if own.record_id <= operation.record_id)
    others = _route(job, partner, "send" if operation.name == "recv" else "recv", route)
    return [(partner, others[place - 1])] if len(others) >= place else []


def _route(job: Job, rank: int, name: str, route: tuple[GroupKey, int, int]) -> list[Operation]:
    return job.pending_p2p(rank, route[0], name, route[1], route[2])


def first_wait(job: Job, waiting: list[Wait]) -> Wait:
    """The most telling of several waits: in the smallest group, at the lowest number."""
    return min(
        waiting,
        key=lambda wait: (
            wait.operation.is_p2p,
            len(job.members[wait.operation.group]),
            wait.operation.seq,
            wait.waiter,
        ),
    )


def verb(count: int) -> str:
    """``wait`` in the number of its subject."""
    return "waits" if count == 1 else "wait"


def ranks_text(ranks: list[int]) -> str:
    """``rank 3``, ``ranks 3, 4``; long lists are cut."""
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def waiting_text(job: Job, waits: Iterator[Wait]) -> list[str]:
    """One sentence for each operation in which ranks wait."""
    by_operation: dict[tuple[GroupKey, str], set[int]] = defaultdict(set)
    for wait in waits:
        by_operation[wait.operation.group, wait.operation.describe()].add(wait.waiter)
    return [
        f"{ranks_text(sorted(ranks)).capitalize()} {verb(len(ranks))} in {operation} of group {job.label(group)}."
        for (group, operation), ranks in by_operation.items()
    ]
