"""What is known of all ranks at one moment, in columns: agents make it for a node, the master merges them, diagnosis reads it.

Columns are numpy arrays of equal length, so that 10,000 ranks are a few array operations. Everything is an age or a
duration measured by one process, never a difference of two hosts' clocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_OPS = 4
"""Operations of one communicator that make a block: block b holds the sequence numbers b*BLOCK_OPS+1 ... (b+1)*BLOCK_OPS.
Ranks of a group agree on it without talking, so blocks can be compared rank by rank."""


class ProcessState(IntEnum):
    """What the operating system says of a worker's process."""

    UNKNOWN = 0
    RUNNING = 1
    SLEEPING = 2
    """Interruptible or uninterruptible sleep."""
    STOPPED = 3
    """State T: SIGSTOP or a debugger."""
    GONE = 4
    """No such process, a zombie, or another process under its number."""


@dataclass(frozen=True)
class Group:
    """A communicator."""

    name: str
    """Unique in the run, equal on all its ranks."""
    role: str
    """What it is for ("dp", "tp", "pp", "ep", or "" when unknown): groups are compared with groups of their role only."""
    ranks: tuple[int, ...]
    """Global ranks in the order of the group, which is the ring's."""


@dataclass(frozen=True)
class RankRows:
    """A row a worker process. R rows."""

    rank: NDArray[np.int32]
    """Global rank."""
    node: NDArray[np.int32]
    """Index into ``Observation.nodes``."""
    process_state: NDArray[np.uint8]
    """A ``ProcessState``."""
    heartbeat_age_s: NDArray[np.float32]
    """Since the heartbeat thread last ran; nan when the worker has not begun to record."""
    report_age_s: NDArray[np.float32]
    """Since the agent read these rows; the master raises it while an agent is silent."""
    cpu_share: NDArray[np.float32]
    """CPU seconds per second of the process since the previous report; nan when unknown."""
    step_s: NDArray[np.float32] = None  # type: ignore[assignment]  # filled with nan where it is not given
    """Typical duration of a training step as the rank's records show it (``period.step_period``); nan when unknown."""
    wake_delay_s: NDArray[np.float32] = None  # type: ignore[assignment]  # likewise
    """How long the heartbeat thread lately waited for a processor each time it had to run: the host's load; nan when unknown."""

    def __post_init__(self) -> None:
        for name in ("step_s", "wake_delay_s"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, np.full(len(self.rank), np.nan, np.float32))


@dataclass(frozen=True)
class ProgressRows:
    """A row a (group, rank): how far the rank has come in the group's sequence of operations. P rows."""

    group: NDArray[np.int32]
    """Index into ``Observation.groups``."""
    rank: NDArray[np.int32]
    entered: NDArray[np.int64]
    """Sequence number of the newest operation entered; 0 for none."""
    completed: NDArray[np.int64]
    """All operations up to this sequence number have ended."""
    open_type: NDArray[np.uint8]
    """Of the oldest operation that is entered and not ended: its ``OpType``, 0 when none is open."""
    open_dtype: NDArray[np.uint8]
    open_bytes: NDArray[np.int64]
    open_age_s: NDArray[np.float32]
    """Since that operation was entered; nan when none is open."""
    idle_s: NDArray[np.float32]
    """Since the newest operation ended, while none is open; else nan."""


@dataclass(frozen=True)
class LinkRows:
    """A row a connection of an open operation and end of it: how far its bytes have come. L rows.

    Each end fills what it sees: the sender ``sent_messages`` (``received_messages`` is -1), the receiver the other; joined on
    (group, source, destination, sequence).
    """

    group: NDArray[np.int32]
    source: NDArray[np.int32]
    destination: NDArray[np.int32]
    sequence: NDArray[np.int64]
    """Of the open operation."""
    sent_messages: NDArray[np.int32]
    """Messages that the sender has begun to send in it."""
    received_messages: NDArray[np.int32]
    """Messages that the receiver has received whole in it."""
    progress_age_s: NDArray[np.float32]
    """Since this end last moved a byte on the connection in it (or since it began the operation)."""


@dataclass(frozen=True)
class BlockRows:
    """A row a (group, rank, finished block of ``BLOCK_OPS`` operations): how the rank spent it. B rows."""

    group: NDArray[np.int32]
    rank: NDArray[np.int32]
    block: NDArray[np.int64]
    work_s: NDArray[np.float32]
    """Own time, mean per operation: from the end of the rank's previous operation (of any group) to entering this one."""
    wait_s: NDArray[np.float32]
    """In the operation, mean per operation: from entering it to its end."""
    lateness_s: NDArray[np.float32]
    """How much later than this rank its predecessor in the ring entered, mean per operation (receiver's stamp, no clock needed);
    nan where the transport does not tell."""


@dataclass(frozen=True)
class LinkBlockRows:
    """A row a (group, source, destination, finished block): speed of a connection as the receiver saw it. K rows."""

    group: NDArray[np.int32]
    source: NDArray[np.int32]
    destination: NDArray[np.int32]
    block: NDArray[np.int64]
    bytes: NDArray[np.int64]
    """Received in the block."""
    transfer_s: NDArray[np.float32]
    """Sum over the block's messages of first byte to last byte."""


Rows = RankRows | ProgressRows | LinkRows | BlockRows | LinkBlockRows


@dataclass(frozen=True)
class Observation:
    """All tables together; of one node (an agent's report) or of the whole job (the master's)."""

    at_s: float
    """When it was made, on the clock of the process that made it."""
    generation: int
    """Number of the worker group's (re)start; rows of others never mix."""
    nodes: tuple[str, ...]
    groups: tuple[Group, ...]
    ranks: RankRows
    progress: ProgressRows
    links: LinkRows
    blocks: BlockRows
    link_blocks: LinkBlockRows


def merge(observations: Sequence[Observation], at_s: float) -> Observation:
    """One observation of the job from those of its nodes.

    Raises:
        ValueError: none were given, the generations differ, or one group name stands for different ranks.
    """
    if not observations:
        raise ValueError("There is no observation to merge.")
    generations = {one.generation for one in observations}
    if len(generations) > 1:
        raise ValueError(f"Observations of the generations {sorted(generations)} cannot be merged.")
    nodes: dict[str, int] = {}
    groups: dict[str, Group] = {}
    for one in observations:
        for name in one.nodes:
            nodes.setdefault(name, len(nodes))
        for group in one.groups:
            if groups.setdefault(group.name, group).ranks != group.ranks:
                raise ValueError(
                    f"The group {group.name!r} has the ranks {groups[group.name].ranks} on one node and {group.ranks} on another."
                )
    place = {name: index for index, name in enumerate(groups)}
    moved: dict[str, list[Rows]] = {"ranks": [], "progress": [], "links": [], "blocks": [], "link_blocks": []}
    for one in observations:
        node_map = np.array([nodes[name] for name in one.nodes], dtype=np.int32)
        group_map = np.array([place[group.name] for group in one.groups], dtype=np.int32)
        for table, parts in moved.items():
            rows = getattr(one, table)
            column, mapping = ("node", node_map) if table == "ranks" else ("group", group_map)
            parts.append(_with_column(rows, column, mapping))
    tables: dict[str, Any] = {name: concat(parts) for name, parts in moved.items()}
    return Observation(at_s, generations.pop(), tuple(nodes), tuple(groups.values()), **tables)


def concat(parts: Sequence[Rows]) -> Rows:
    """Tables of one kind, one below the other."""
    kind = type(parts[0])
    return kind(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(kind)))


def empty(kind: type[Rows]) -> Rows:
    """A table of this kind without rows."""
    return kind(*(np.empty(0, dtype=_dtype(kind, field.name)) for field in fields(kind)))


def _with_column(rows: Rows, column: str, mapping: NDArray[np.int32]) -> Rows:
    values = {field.name: getattr(rows, field.name) for field in fields(type(rows))}
    old = values[column]
    values[column] = mapping[old] if len(old) else old.astype(np.int32)
    return type(rows)(**values)


_DTYPES = {
    "rank": np.int32, "node": np.int32, "group": np.int32, "source": np.int32, "destination": np.int32,
    "process_state": np.uint8, "open_type": np.uint8, "open_dtype": np.uint8,
    "entered": np.int64, "completed": np.int64, "open_bytes": np.int64, "sequence": np.int64, "block": np.int64,
    "bytes": np.int64, "sent_messages": np.int32, "received_messages": np.int32,
}  # fmt: skip


def _dtype(kind: type[Rows], name: str) -> type:
    return _DTYPES.get(name, np.float32)
