"""What travels between agents, the master and those who ask it: reports, orders, verdicts, the status. Imports no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from actors.c4.diagnosis.verdict import Verdict
from actors.c4.generation import Worker


@dataclass(frozen=True)
class Fence:
    """A process that must end: a worker of a generation that is over."""

    generation: int
    pid: int
    started_ticks: int
    """Its start (field 22 of /proc/PID/stat), so that a later process under the same number is left alone; -1: never learnt."""


@dataclass(frozen=True)
class Stack:
    """Stacks of all threads of a worker, as a tool printed them."""

    rank: int
    pid: int
    text: str


@dataclass(frozen=True)
class Report:
    """What an agent pushes."""

    node_id: str
    incarnation: float
    """When this agent's process began (seconds since the epoch); a new one has forgotten what the last one knew."""
    packed: bytes
    """An observation (see ``wire``); empty when the node has no worker of the generation."""
    started: tuple[tuple[int, int], ...] = ()
    """(pid, start ticks) of the watched workers."""
    gone: tuple[Fence, ...] = ()
    """Fences that are done: the process has ended, or another one bears its number."""
    stacks: tuple[Stack, ...] = ()
    cost_ms_per_s: float = 0.0
    """Processor time of this agent's process per second."""
    errors: int = 0
    """Exceptions of its loop, logged and survived."""


@dataclass(frozen=True)
class Orders:
    """The master's answer to a report."""

    generation: int
    """The one that counts; 0: none."""
    workers: tuple[Worker, ...] = ()
    """Of this node in it: whose rings to read."""
    kill: tuple[Fence, ...] = ()
    stacks: tuple[int, ...] = ()
    """Ranks on this node whose stacks are wanted."""
    full: bool = False
    """Send group tables, start times and whole windows with the next report."""
    accepted: bool = True
    """The report's observation was of this generation and has been taken in."""


CLEARED = "cleared"
"""The action of an entry that tells that a named fault is no longer seen."""


@dataclass(frozen=True)
class NumberedVerdict:
    """A verdict with what was decided about it. Numbers grow from 1 over the whole run."""

    number: int
    generation: int
    verdict: Verdict
    action: str
    """``ignore``, ``rebalance``, ``evict`` or ``cleared``."""
    reason: str
    named_at: float
    """Seconds since the epoch."""
    repeats: int = 0
    """Number of the first verdict on this fault, when this one only tells that the decision changed; else 0."""
    nodes: tuple[str, ...] = ()
    """Node ids that hold the culprit."""
    stacks: tuple[Stack, ...] = ()


@dataclass(frozen=True)
class OpenOperation:
    """What a rank is in."""

    group: str
    operation: str
    sequence: int
    age_s: float


@dataclass(frozen=True)
class RankStatus:
    """A row of ``watch``."""

    rank: int
    node_id: str
    node_name: str
    pid: int
    process: str
    """A ``ProcessState`` in lower case; ``unknown`` before the first report."""
    heartbeat_age_s: float
    report_age_s: float
    entered: int
    """Operations entered, summed over its groups."""
    completed: int
    open: OpenOperation | None
    cpu_share: float


@dataclass(frozen=True)
class NodeStatus:
    """A node with an agent."""

    node_id: str
    node_name: str
    report_age_s: float
    """nan: never."""
    agent_restarts: int
    agent_errors: int
    agent_cost_ms_per_s: float
    agent_bytes_per_s: float
    quarantined: str
    """Why; empty when it is not."""


@dataclass(frozen=True, eq=False)
class DelayMatrix:
    """Of one group: the time that a MiB takes from row to column, as receivers saw it."""

    group: str
    ranks: tuple[int, ...]
    ms_per_mib: NDArray[np.float64]
    """Shape (ranks, ranks); nan where nothing was sent."""


@dataclass(frozen=True)
class Wait:
    """A rank stands in an operation that another has not entered."""

    rank: int
    on: int
    group: str
    sequence: int
    age_s: float


@dataclass(frozen=True, eq=False)
class MasterStatus:
    """All that ``watch`` and the report show."""

    run: str
    generation: int
    world_size: int
    running_s: float
    state: str
    """``none``, ``watching``, ``condemned`` (its workers are being killed) or ``ended``."""
    ranks: tuple[RankStatus, ...] = ()
    nodes: tuple[NodeStatus, ...] = ()
    verdicts: tuple[NumberedVerdict, ...] = ()
    quarantine: Mapping[str, str] = field(default_factory=dict)
    delays: tuple[DelayMatrix, ...] = ()
    waiting: tuple[Wait, ...] = ()
    operation_s: float = float("nan")
    bytes_per_s: float = 0.0
    """Observations received, all agents together."""
    cost_ms_per_s: float = 0.0
    """Processor time of the master's judging per second."""
    injection: bool = False
