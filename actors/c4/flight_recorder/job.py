"""The dumps of all ranks seen as one job: who belongs to which group, how far each member's host and device got in it.

NCCL runs the collectives of a group in order, so that one number says what a member completed of it. Point-to-point operations of
a group run per pair of ranks, are numbered per rank, and complete in any order.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Mapping

from actors.c4.flight_recorder.model import DumpSet, GroupKey, Operation, RankDump, State
from actors.c4.flight_recorder.status import with_named_status

_PIPELINE = re.compile(r"pipeline|(?:^|[_\W])pp(?:[_\W]|$)", re.IGNORECASE)


class Job:
    """Read-only view; built once for an analysis."""

    def __init__(self, dump_set: DumpSet):
        self.dumps: Mapping[int, RankDump] = with_named_status(_told_apart(dump_set.dumps))
        self.world = dump_set.world
        self.silent = set(dump_set.silent)
        self.members: dict[GroupKey, tuple[int, ...]] = {}
        self.description: dict[GroupKey, str] = {}
        self.groups_of: dict[int, set[GroupKey]] = defaultdict(set)
        self._collect_groups()
        self.p2p_groups = self._find_p2p_groups()
        self._pending: dict[int, dict[GroupKey, dict[int, Operation]]] = {}
        self._p2p: dict[int, dict[tuple[GroupKey, str, int, int], list[Operation]]] = {}
        self._counters: dict[tuple[int, GroupKey], int | None] = {}
        for rank, dump in self.dumps.items():
            if dump.entries == 0 and not dump.status:  # nothing in it can be tied to a group
                self.silent.add(rank)
        self.incomplete: dict[int, tuple[Operation, ...]] = {
            rank: self._really_incomplete(dump) for rank, dump in self.dumps.items()
        }
        for rank, operations in self.incomplete.items():
            pending: dict[GroupKey, dict[int, Operation]] = defaultdict(dict)
            p2p: dict[tuple[GroupKey, str, int, int], list[Operation]] = defaultdict(list)
            for operation in operations:
                if operation.is_p2p:
                    p2p[operation.group, operation.name, operation.source, operation.target].append(operation)
                else:
                    pending[operation.group][operation.seq] = operation
            self._pending[rank], self._p2p[rank] = pending, p2p
        self.blockers: dict[int, tuple[Operation, ...]] = {rank: self._blockers(rank) for rank in self.dumps}

    def label(self, group: GroupKey) -> str:
        """For people: ``41:TENSOR_MODEL_PARALLEL_GROUP``."""
        description = self.description.get(group, "")
        return f"{group}:{description}" if description and description != "undefined" else group

    def enqueued(self, rank: int, group: GroupKey) -> int | None:
        """Number of the last collective that the host of ``rank`` enqueued in ``group``; None where its dump does not tell."""
        key = (rank, group)
        if key not in self._counters:
            self._counters[key] = self._count(rank, group)
        return self._counters[key]

    def pending(self, rank: int, group: GroupKey) -> Mapping[int, Operation]:
        """Collectives of ``group`` that ``rank`` enqueued and did not complete, by number."""
        return self._pending.get(rank, {}).get(group, {})

    def pending_p2p(self, rank: int, group: GroupKey, name: str, source: int, target: int) -> list[Operation]:
        """Incomplete sends or receives of one route, oldest first."""
        return self._p2p.get(rank, {}).get((group, name, source, target), [])

    def completed(self, rank: int, group: GroupKey, seq: int) -> bool:
        """``rank`` is known to have completed collective ``seq`` of ``group``."""
        dump = self.dumps.get(rank)
        last = self.enqueued(rank, group)
        if dump is None or not dump.tracks_completion or last is None or last < seq:
            return False
        pending = self.pending(rank, group)
        if pending:
            return seq < min(pending)
        # Nothing outstanding in the list of entries is no proof (the list may be empty): count what is marked as completed.
        status = dump.status.get(group)
        known = status.completed if status is not None and group not in self.p2p_groups else -1
        entries = dump.recent.get(group)
        return seq <= max(known, max(entries) if entries else -1)

    def has_progress(self, rank: int) -> bool:
        """There is a dump that tells where the rank is."""
        return rank in self.dumps and rank not in self.silent

    def head(self, rank: int) -> Operation | None:
        """The operation at which the device of ``rank`` stands, as far as the order of records tells."""
        blockers = self.blockers.get(rank, ())
        return blockers[-1] if blockers else None

    def partner(self, operation: Operation, rank: int) -> int | None:
        """Global rank of the other side of a point-to-point operation."""
        ranks = self.members.get(operation.group, ())
        index = operation.source if operation.name == "recv" else operation.target
        if 0 <= index < len(ranks) and ranks[index] != rank:
            return ranks[index]
        return None

    def position(self, rank: int) -> tuple[tuple[str, int], ...]:
        """The rank's place in its pipeline groups: ranks of different places run different programs."""
        places = {
            (self.description.get(group, ""), self.members[group].index(rank))
            for group in self.groups_of[rank]
            if group in self.p2p_groups and rank in self.members[group]
        }
        return tuple(sorted(places))

    def _collect_groups(self) -> None:
        seen: dict[GroupKey, set[int]] = defaultdict(set)
        for rank, dump in self.dumps.items():
            for group, ranks in dump.group_ranks.items():
                if rank in ranks:
                    self.members[group] = ranks
            for group, description in dump.group_descriptions.items():
                if description:
                    self.description[group] = description
            for group in {*dump.enqueued, *dump.enqueued_p2p, *dump.status}:
                seen[group].add(rank)
        for group, ranks_seen in seen.items():
            self.members.setdefault(group, tuple(sorted(ranks_seen)))
        for group, ranks in self.members.items():
            for rank in ranks:
                self.groups_of[rank].add(group)

    def _find_p2p_groups(self) -> set[GroupKey]:
        found = {group for dump in self.dumps.values() for group in dump.enqueued_p2p}
        kinds = {self.description.get(group, "") for group in found} - {"", "undefined"}
        for group in self.members:
            description = self.description.get(group, "")
            if description in kinds or (description and _is_pipeline(description)):
                found.add(group)
        return found

    def _count(self, rank: int, group: GroupKey) -> int | None:
        dump = self.dumps.get(rank)
        if dump is None or rank in self.silent:
            return None
        counts = []
        if group in dump.enqueued:
            counts.append(dump.enqueued[group])
        status = dump.status.get(group)
        # The status counts whatever came last, so in a group with point-to-point traffic it is another counter.
        if status is not None and group not in self.p2p_groups:
            counts.append(max(0, status.enqueued))
        if counts:
            return max(counts)
        if group in self.p2p_groups:
            return None
        everything_kept = dump.entries > 0 and dump.first_record == 0
        return 0 if everything_kept else None

    def _really_incomplete(self, dump: RankDump) -> tuple[Operation, ...]:
        """Where a recorder never learns of completions, only an operation that some member has not entered is incomplete."""
        if dump.tracks_completion:
            return dump.incomplete
        kept = []
        for operation in dump.incomplete:
            if operation.is_p2p:
                continue
            others = [self.enqueued(rank, operation.group) for rank in self.members.get(operation.group, ())]
            unheard = any(rank in self.silent for rank in self.members.get(operation.group, ()))
            behind = any(count is not None and count < operation.seq for count in others)
            if behind or (unheard and operation.seq == dump.enqueued.get(operation.group)):
                kept.append(operation)
        return tuple(kept)

    def _blockers(self, rank: int) -> tuple[Operation, ...]:
        """Incomplete operations up to the first behind all completed ones; what follows only queues up behind that one.

        A send is posted and not waited for, so it is passed over (unless there is nothing else).
        """
        dump, operations = self.dumps[rank], self.incomplete[rank]
        for index, operation in enumerate(operations):
            if operation.name != "send" and (operation.record_id > dump.frontier or not dump.tracks_completion):
                return operations[: index + 1]
        return operations


def _is_pipeline(description: str) -> bool:
    """A group of pipeline stages alone: names of groups that span stages and more (tensor and pipeline) do not count."""
    mixed = re.search(r"tensor|expert|data|model_and|default", description, re.IGNORECASE)
    return _PIPELINE.search(description) is not None and mixed is None


def _told_apart(dumps: Mapping[int, RankDump]) -> Mapping[int, RankDump]:
    """Group names are unique in a job unless groups were made without synchronisation: then the ranks tell them apart."""
    variants: dict[GroupKey, Counter[tuple[int, ...]]] = defaultdict(Counter)
    for rank, dump in dumps.items():
        for group, ranks in dump.group_ranks.items():
            if rank in ranks:
                variants[group][ranks] += 1
    shared = {group for group, counts in variants.items() if len(counts) > 1}
    if not shared:
        return dumps
    result = {}
    for rank, dump in dumps.items():
        names = {
            group: f"{group}@{'-'.join(str(member) for member in ranks[:4])}"
            for group, ranks in dump.group_ranks.items()
            if group in shared
        }
        result[rank] = _renamed(dump, names) if names else dump
    return result


def _renamed(dump: RankDump, names: Mapping[GroupKey, GroupKey]) -> RankDump:
    def keys(mapping: Mapping) -> dict:
        return {names.get(group, group): value for group, value in mapping.items()}

    def operation(one: Operation) -> Operation:
        return dataclasses.replace(one, group=names[one.group]) if one.group in names else one

    return dataclasses.replace(
        dump,
        group_ranks=keys(dump.group_ranks),
        group_descriptions=keys(dump.group_descriptions),
        group_numbers={number: names.get(group, group) for number, group in dump.group_numbers.items()},
        enqueued=keys(dump.enqueued),
        enqueued_p2p=keys(dump.enqueued_p2p),
        incomplete=tuple(operation(one) for one in dump.incomplete),
        recent=keys({g: {seq: operation(one) for seq, one in ops.items()} for g, ops in dump.recent.items()}),
    )


def started_anywhere(job: Job) -> bool:
    """The job recorded starts (TORCH_NCCL_ENABLE_TIMING); else the state ``scheduled`` says nothing about the device."""
    return any(dump.reports_starts for dump in job.dumps.values()) or any(
        operation.state is State.STARTED for operations in job.incomplete.values() for operation in operations
    )
