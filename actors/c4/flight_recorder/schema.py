"""Turns one decoded dump, of any schema version from 1.x to 2.x, pickled or JSON, into a RankDump.

Known differences: the root is the list of entries (PyTorch 2.0, 2.1) or a dict; ``seq_id`` became ``collective_seq_id`` and
``p2p_seq_id`` (2.3); ``process_group`` is missing, a name, or (name, description); its ranks are a string or a list;
unset times are None (pickle) or 0 (JSON); dumps of active operations only have gaps in ``record_id`` where operations completed;
gloo never sets a completed state but retires its entries.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from actors.c4.flight_recorder.errors import UnreadableDumpError
from actors.c4.flight_recorder.model import GroupStatus, Operation, RankDump, State

_RECENT_PER_GROUP = 128
_NUMBER = re.compile(r"\d+")
_ROUTE = re.compile(r"(?:(send|recv)\s+(\d+)\s*(->|<-)\s*(\d+))")
_STATES = {"scheduled": State.SCHEDULED, "started": State.STARTED, "completed": State.COMPLETED}
_MAX_RANKS = 1 << 20
_MAX_NAME = 200


def looks_like_dump(root: Any) -> bool:
    """``root`` is a dump of one rank in any version."""
    if isinstance(root, Mapping):
        return "entries" in root or ("pg_config" in root and "version" in root) or "pg_status" in root
    return (
        isinstance(root, list)
        and bool(root)
        and all(isinstance(item, Mapping) for item in root)
        and ("profiling_name" in root[0] or "pg_id" in root[0])
    )


def members_of(root: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """(global ranks, description) by group name, of the dump's ``pg_config``."""
    ranks_by_group: dict[str, tuple[int, ...]] = {}
    descriptions: dict[str, str] = {}
    config = root.get("pg_config") if isinstance(root, Mapping) else None
    if not isinstance(config, Mapping):
        return {}, {}
    for key, value in config.items():
        name, ranks = str(key)[:_MAX_NAME], value
        if isinstance(value, Mapping):
            name = str(value.get("name", name))[:_MAX_NAME]
            ranks = value.get("ranks")
            descriptions[name] = str(value.get("desc") or "")[:_MAX_NAME]
        numbers = _ranks(ranks)
        if numbers:
            ranks_by_group[name] = numbers
    return ranks_by_group, descriptions


def normalise(root: Any, rank: int, source: str) -> RankDump:
    """The dump of ``rank`` in one schema.

    Raises:
        UnreadableDumpError: ``root`` is no dump, or an entry of it is malformed.
    """
    if not looks_like_dump(root):
        raise UnreadableDumpError("it holds no Flight Recorder dump")
    top: Mapping[str, Any] = root if isinstance(root, Mapping) else {}
    entries = root if isinstance(root, list) else root.get("entries") or []
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in entries):
        raise UnreadableDumpError("its entries are no list of records")
    ranks_by_group, descriptions = members_of(top)
    try:
        return _build(top, list(entries), ranks_by_group, descriptions, rank, source)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise UnreadableDumpError(f"a record in it is malformed ({type(error).__name__})") from error


def _build(
    top: Mapping[str, Any],
    entries: list[Mapping[str, Any]],
    ranks_by_group: dict[str, tuple[int, ...]],
    descriptions: dict[str, str],
    rank: int,
    source: str,
) -> RankDump:
    # Gloo's configuration of the default group carries an empty name.
    if "" in ranks_by_group and "0" not in ranks_by_group:
        ranks_by_group["0"] = ranks_by_group.pop("")
    reader = _Reader(descriptions)
    operations = reader.newest(entries)
    status = _status(top.get("pg_status"))
    tracks = _tracks_completion(entries)
    operations = _coalesced(operations)
    recent: dict[str, dict[int, Operation]] = defaultdict(dict)
    enqueued = reader.collectives_seen
    enqueued_p2p: dict[str, int] = {}
    for operation in operations:
        counts = enqueued_p2p if operation.is_p2p else enqueued
        counts[operation.group] = max(counts.get(operation.group, -1), operation.seq)
        if not operation.is_p2p:
            recent[operation.group][operation.seq] = operation
    return RankDump(
        rank=rank,
        source=source,
        version=str(top.get("version", ""))[:32],
        group_ranks=ranks_by_group,
        group_descriptions=descriptions,
        group_numbers=reader.numbers,
        numbered_status=status,
        incomplete=tuple(operation for operation in operations if operation.state is not State.COMPLETED),
        recent=dict(recent),
        enqueued=enqueued,
        enqueued_p2p=enqueued_p2p,
        frontier=_frontier(operations),
        first_record=int(entries[0].get("record_id", 0)) if entries else -1,
        last_record=operations[-1].record_id if operations else -1,
        entries=len(entries),
        reports_starts=any(
            entry.get("time_discovered_started_ns") and "coalesced" not in str(entry.get("profiling_name"))
            for entry in entries
        ),
        tracks_completion=tracks,
        newest_ns=max((operation.created_ns for operation in operations), default=0),
    )


class _Reader:
    """Reads entries from the newest back; of those that completed, only the newest of each group are kept."""

    def __init__(self, descriptions: dict[str, str]):
        self.descriptions = descriptions
        self.numbers: dict[int, str] = {}
        self.collectives_seen: dict[str, int] = {}
        """Collectives that a group had seen when a point-to-point operation was enqueued."""
        self._names: dict[str, tuple[str, bool, int, int]] = {}
        self._dtypes: dict[tuple[str, ...], tuple[str, ...]] = {}

    def newest(self, entries: list[Mapping[str, Any]]) -> list[Operation]:
        """In the order of their records."""
        kept: dict[Any, int] = {}
        operations = []
        for index in range(len(entries) - 1, -1, -1):
            entry = entries[index]
            if entry.get("state") == "completed":
                key = entry.get("process_group") or entry.get("pg_id")
                key = key[0] if isinstance(key, (list, tuple)) and key else key
                count = kept.get(key, 0) if isinstance(key, (str, int)) else 0
                if count >= _RECENT_PER_GROUP:
                    continue
                if isinstance(key, (str, int)):
                    kept[key] = count + 1
            operations.append(self._operation(entry, index))
        operations.sort(key=lambda operation: operation.record_id)
        return operations

    def _operation(self, entry: Mapping[str, Any], index: int) -> Operation:
        group, description = _group_of(entry)
        if description and not self.descriptions.get(group):
            self.descriptions[group] = description
        if isinstance(entry.get("pg_id"), int):
            self.numbers[entry["pg_id"]] = group
        raw = str(entry.get("profiling_name", ""))[:_MAX_NAME]
        if raw not in self._names:
            self._names[raw] = _parse_name(raw)
        name, routed, source, target = self._names[raw]
        is_p2p = bool(entry["is_p2p"]) if "is_p2p" in entry else routed
        seq = entry.get("p2p_seq_id" if is_p2p else "collective_seq_id", entry.get("seq_id", entry.get("op_id")))
        seen = entry.get("collective_seq_id")
        if is_p2p and isinstance(seen, int):
            self.collectives_seen[group] = max(self.collectives_seen.get(group, 0), seen)
        state = _STATES.get(str(entry.get("state", "")), State.SCHEDULED)
        if entry.get("time_discovered_completed_ns"):
            state = State.COMPLETED
        elif state is State.SCHEDULED and entry.get("time_discovered_started_ns"):
            state = State.STARTED
        elif entry.get("retired") and raw.startswith("gloo:"):
            state = State.COMPLETED  # gloo retires what it finished and never says more
        dtypes = tuple(
            str(dtype)[:32] for dtype in (*_list(entry.get("input_dtypes")), *_list(entry.get("output_dtypes")))
        )
        return Operation(
            record_id=int(entry.get("record_id", index)),
            group=group,
            name=name,
            seq=int(seq if seq is not None else index),
            state=state,
            is_p2p=is_p2p,
            source=source,
            target=target,
            input_numel=_numel(entry.get("input_sizes")),
            output_numel=_numel(entry.get("output_sizes")),
            dtypes=self._dtypes.setdefault(dtypes, dtypes),
            created_ns=int(entry.get("time_created_ns") or entry.get("time_created_us", 0) * 1000 or 0),
        )


def _parse_name(raw: str) -> tuple[str, bool, int, int]:
    """(type, is point-to-point, source, target) of a profiling name, e.g. ``nccl:send 0->3``."""
    name = raw.partition(":")[2] if ":" in raw else raw
    route = _ROUTE.search(name)
    if route is None:
        return name, False, -1, -1
    here, there = int(route.group(2)), int(route.group(4))
    return (route.group(1), True, here, there) if route.group(3) == "->" else (route.group(1), True, there, here)


def _group_of(entry: Mapping[str, Any]) -> tuple[str, str]:
    group = entry.get("process_group")
    if isinstance(group, (list, tuple)) and group:
        return str(group[0])[:_MAX_NAME], str(group[1] if len(group) > 1 else "")[:_MAX_NAME]
    if isinstance(group, str) and group:
        return group[:_MAX_NAME], ""
    return str(entry.get("pg_name", entry.get("pg_id", 0)))[:_MAX_NAME], ""


def _coalesced(operations: list[Operation]) -> list[Operation]:
    """Members of a coalesced call carry no state of their own: they take that of the entry ``coalesced`` that ends them.

    Where a dump of active operations lacks that entry, the call completed. The entry itself stands for no operation.
    """
    calls: dict[tuple[str, bool, int], list[int]] = defaultdict(list)
    for index, operation in enumerate(operations):
        calls[operation.group, operation.is_p2p, operation.seq].append(index)
        if operation.name.lower() == "coalesced" and not operation.is_p2p:
            # Its members may be point-to-point while it is not flagged so.
            calls[operation.group, True, operation.seq].append(index)
    result: list[Operation | None] = list(operations)
    active_only = not any(operation.state is State.COMPLETED for operation in operations)
    for members in calls.values():
        end = next((index for index in reversed(members) if operations[index].name.lower() == "coalesced"), None)
        if end is not None:
            for index in members:
                if index != end and index < end:
                    result[index] = _with_state(operations[index], operations[end].state)
            if len(members) > 1:
                result[end] = None
        elif len(members) > 1 and active_only and operations[members[0]].is_p2p:
            for index in members:
                result[index] = _with_state(operations[index], State.COMPLETED)
    return [operation for operation in result if operation is not None]


def _with_state(operation: Operation, state: State) -> Operation:
    return dataclasses.replace(operation, state=state)


def _frontier(operations: list[Operation]) -> int:
    """Highest record number known to have completed: marked so, or missing between those that are kept."""
    after: int | None = None
    for operation in reversed(operations):
        if after is not None and operation.record_id < after - 1:
            return after - 1
        if operation.state is State.COMPLETED:
            return operation.record_id
        after = operation.record_id
    return after - 1 if after is not None else -1


def _status(raw: Any) -> dict[int, GroupStatus]:
    if not isinstance(raw, Mapping):
        return {}
    return {
        int(key): GroupStatus(
            enqueued=int(value.get("last_enqueued_collective", -1)),
            completed=int(value.get("last_completed_collective", -1)),
        )
        for key, value in raw.items()
        if str(key).isdigit() and isinstance(value, Mapping)
    }


def _tracks_completion(entries: list[Mapping[str, Any]]) -> bool:
    """Gloo retires what it completed, but late and out of step, so that a missing mark says nothing there."""
    if not entries or not all(str(entry.get("profiling_name", "")).startswith("gloo:") for entry in entries):
        return True
    return any(entry.get("state") == "completed" for entry in entries)


def _numel(sizes: Any) -> int:
    total = 0
    for shape in _list(sizes):
        count = 1
        for dim in _list(shape):
            count *= int(dim)
        total += count
    return total


def _list(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else ()


def _ranks(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        return tuple(int(number) for number in _NUMBER.findall(value[: 8 * _MAX_RANKS]) if len(number) < 8)[:_MAX_RANKS]
    if isinstance(value, (list, tuple)):
        return tuple(int(item) for item in value[:_MAX_RANKS])
    return ()
