"""Rings and /proc of one node -> an ``Observation``: what an agent reports. Pure, no Ray.

Reading needs nothing of the workers: their rings are shared memory. Everything is counted from the rings alone, so a reader
that begins in the middle (an agent that was restarted) tells the same, with the blocks that the ring still holds.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.c4 import processes
from actors.c4.diagnosis.observation import (
    BlockRows,
    Group,
    LinkBlockRows,
    LinkRows,
    Observation,
    ProcessState,
    ProgressRows,
    RankRows,
)
from actors.c4.diagnosis.period import step_period
from actors.c4.generation import Worker
from actors.c4.monitors.block_sums import BlockSums
from actors.c4.monitors.wire import DTYPES
from actors.c4.recorder.errors import RingFormatError
from actors.c4.recorder.layout import Communicator, ring_path
from actors.c4.recorder.reader import RingReader, RingSnapshot
from actors.c4.recorder.recorder import HEARTBEAT_THREAD
from actors.c4.recorder.records import OP_RECORD, OpFlag

logger = logging.getLogger("sextant.c4.agent")

PERIOD_OPERATIONS = 512
"""Newest operations in which the step is looked for ..."""
PERIOD_EVERY_NS = 500_000_000
"""... this often."""


class NodeReader:
    """Of one node, one generation at a time."""

    def __init__(self, node_name: str, directory: Path, run: str):
        """``directory``: of the rings. ``node_name`` stands in every observation's ``nodes``."""
        self._node = node_name
        self._directory = directory
        self._run = run
        self._generation = 0
        self._groups: dict[str, Group] = {}
        self._workers: dict[tuple[int, int], WorkerReader] = {}

    @property
    def generation(self) -> int:
        return self._generation

    def watch(self, generation: int, workers: Iterable[Worker]) -> None:
        """Read these workers' rings from now on (each may begin to record later)."""
        wanted = {(worker.rank, worker.pid) for worker in workers}
        if generation == self._generation and wanted == set(self._workers):
            return
        if generation != self._generation:
            self.close()
            self._generation, self._groups = generation, {}
        for key in set(self._workers) - wanted:
            self._workers.pop(key).close()
        for rank, pid in sorted(wanted - set(self._workers)):
            path = ring_path(self._directory, self._run, generation, rank, pid)
            self._workers[(rank, pid)] = WorkerReader(rank, pid, path)

    def started(self) -> tuple[tuple[int, int], ...]:
        """(pid, start ticks) of the watched workers that are known."""
        return tuple((one.pid, one.started_ticks) for one in self._workers.values() if one.started_ticks >= 0)

    def worker(self, rank: int) -> WorkerReader | None:
        """The reader of a rank's ring."""
        return next((one for one in self._workers.values() if one.rank == rank), None)

    def read(self) -> Observation | None:
        """How everything stands now, without blocks (``with_blocks`` adds them); None while no worker is watched."""
        if not self._workers:
            return None
        tables = _Tables()
        for worker in self._workers.values():
            worker.read()
            tables.add(worker, self._index)
        return tables.observation(self._generation, self._node, tuple(self._groups.values()))

    def glance(self, heartbeat_s: float) -> bool:
        """Whether a process is gone, stopped, or its heartbeat older than this: a hundredth of the cost of ``read``."""
        ill = [worker.glance(heartbeat_s) for worker in self._workers.values()]  # a look at each
        return any(ill)

    def with_blocks(self, observation: Observation) -> Observation:
        """The observation of the last ``read`` with the blocks that finished since the last call of this."""
        tables = _Tables()
        for worker in self._workers.values():
            tables.add_blocks(worker, self._index)
        blocks = tables.observation(self._generation, self._node, tuple(self._groups.values()))
        return replace(observation, groups=blocks.groups, blocks=blocks.blocks, link_blocks=blocks.link_blocks)

    def whole_window(self) -> None:
        """Have the next ``read`` bring the blocks again that the rings still hold."""
        for worker in self._workers.values():
            worker.rewind()

    def close(self) -> None:
        """Let go of all rings; the files stay."""
        for worker in self._workers.values():
            worker.close()
        self._workers = {}

    def _index(self, communicator: Communicator) -> int:
        name = communicator.name
        if name not in self._groups:
            self._groups[name] = Group(name, communicator.role, communicator.ranks)
        return list(self._groups).index(name)


class WorkerReader:
    """Of one worker's process and ring."""

    def __init__(self, rank: int, pid: int, path: Path):
        self.rank, self.pid, self.path = rank, pid, path
        facts = processes.look(pid)
        self.started_ticks = facts.started_ticks if facts is not None else -1
        self._heart = processes.ThreadDelay(pid, HEARTBEAT_THREAD)
        self.state = ProcessState.UNKNOWN
        self.snapshot: RingSnapshot | None = None
        self.cpu_share = math.nan
        self.wake_delay_s = math.nan
        self.step_s = math.nan
        self.entered: dict[int, int] = {}
        """By communicator: newest sequence number."""
        self.ended_ns: dict[int, int] = {}
        self.sums = BlockSums(rank)
        self.ring: RingReader | None = None
        self._after = 0
        self._failed = False
        self.mismatched = np.empty(0, dtype=OP_RECORD)
        """Operations that ended because a peer was in another one; the ring is broken then, nothing follows."""
        self._recent: deque[tuple[int, int]] = deque(maxlen=PERIOD_OPERATIONS)
        self._step_at_ns = 0
        self._cpu: tuple[float, float] | None = None
        self._complained = False

    def glance(self, heartbeat_s: float) -> bool:
        """See ``NodeReader.glance``; what has been seen to end by itself is no news."""
        self._look()
        if self.ended_by_itself:
            return False
        stale = self.ring is not None and self.ring.heartbeat_age_s() > heartbeat_s
        return stale or self.state in (ProcessState.STOPPED, ProcessState.GONE)

    def read(self) -> None:
        """Look at the process and at the ring."""
        self._look()
        if self.ring is None and not self._open():
            return
        if self.ring is None:
            return
        snapshot = self.snapshot = self.ring.read(self._after)
        operations = snapshot.operations
        if not len(operations):
            return
        for communicator, newest in _newest_sequences(operations):
            self.entered[communicator] = max(newest, self.entered.get(communicator, 0))
        self._failed |= bool((operations["flags"] & OpFlag.FAILED).any())
        broken = operations[(operations["flags"] & OpFlag.MISMATCH) != 0]
        if len(broken) and not len(self.mismatched):
            self.mismatched = broken[:1]
        is_open = operations["end_ns"] == 0
        first_open = int(operations["op_id"][is_open][0]) if is_open.any() else snapshot.newest_op + 1
        done = operations[(operations["op_id"] > self._after) & (operations["op_id"] < first_open)]
        self.sums.add(done, snapshot.edges)
        self._learn_step(done, snapshot.at_ns)
        for communicator, end_ns in operations[~is_open][["communicator", "end_ns"]].tolist():
            self.ended_ns[communicator] = max(end_ns, self.ended_ns.get(communicator, 0))
        self._after = max(self._after, first_open - 1)

    def _learn_step(self, done: np.ndarray, now_ns: int) -> None:
        """How long a step takes, from the repetition of operations."""
        for enter_ns, *what in done[["enter_ns", "communicator", "op_type", "element_type", "bytes"]].tolist():
            self._recent.append((enter_ns, hash(tuple(what))))
        if len(done) and now_ns - self._step_at_ns >= PERIOD_EVERY_NS:
            self._step_at_ns = now_ns
            enter_ns, signatures = np.array(self._recent, dtype=np.int64).T
            found = step_period(enter_ns, signatures)
            self.step_s = found if not math.isnan(found) else self.step_s

    def rewind(self) -> None:
        """Count what the ring holds once more."""
        self._after = 0
        self._recent.clear()
        self.sums = BlockSums(self.rank)

    @property
    def heartbeat_age_s(self) -> float:
        """nan before the first record and after an orderly end."""
        if self.snapshot is None or self.snapshot.closed_ns or self.ended_by_itself:
            return math.nan
        return self.snapshot.heartbeat_age_s

    @property
    def ended_by_itself(self) -> bool:
        """The process has ended in order, or after an operation of its had failed because of a peer: no fault of this node."""
        closed = self.snapshot is not None and self.snapshot.closed_ns > 0
        return self.state is ProcessState.GONE and (closed or self._failed)

    def close(self) -> None:
        """Unmap."""
        if self.ring is not None:
            self.ring.close()
            self.ring = None

    def _look(self) -> None:
        facts, now = processes.look(self.pid), time.monotonic()
        if self.started_ticks < 0 and facts is not None and self.ring is None:
            self.started_ticks = facts.started_ticks
        if facts is None or facts.started_ticks != self.started_ticks:
            self.state, self.cpu_share = ProcessState.GONE, math.nan
            return
        self.state = facts.state
        self.wake_delay_s = self._heart.look(now) if self.ring is not None else math.nan
        if self._cpu is None or now - self._cpu[0] >= 0.5:  # ticks of 10 ms: shorter spans tell little
            if self._cpu is not None:
                self.cpu_share = (facts.cpu_s - self._cpu[1]) / (now - self._cpu[0])
            self._cpu = (now, facts.cpu_s)

    def _open(self) -> bool:
        try:
            ring = RingReader(self.path)
        except FileNotFoundError:
            return False
        except (RingFormatError, OSError) as error:
            if not self._complained:
                logger.warning("The ring of rank %d cannot be read: %s", self.rank, error)
                self._complained = True
            return False
        # The ring says which process wrote it; that counts, whoever bears the number now.
        if ring.identity.process_start > 0:
            self.started_ticks = ring.identity.process_start
        self.ring = ring
        self._look()
        return True


class _Tables:
    """Columns under construction."""

    def __init__(self) -> None:
        self._ranks: list[tuple[Any, ...]] = []
        self._progress: list[tuple[Any, ...]] = []
        self._links: list[tuple[Any, ...]] = []
        self._blocks: list[tuple[Any, ...]] = []
        self._link_blocks: list[tuple[Any, ...]] = []

    def add(self, worker: WorkerReader, index_of: Any) -> None:
        """All rows of one worker."""
        state = ProcessState.UNKNOWN if worker.ended_by_itself else worker.state
        age_s, times = worker.heartbeat_age_s, (worker.cpu_share, worker.step_s, worker.wake_delay_s)
        self._ranks.append((worker.rank, 0, state, age_s, 0.0, *times))
        snapshot = worker.snapshot
        if snapshot is None:
            return
        is_open = snapshot.operations[snapshot.operations["end_ns"] == 0]
        if len(worker.mismatched):  # it raised, but it never got done what it was called for
            is_open = np.concatenate([worker.mismatched, is_open])
        for number, communicator in enumerate(snapshot.communicators):
            if len(communicator.ranks) < 2 or number not in worker.entered:
                continue
            group, entered = index_of(communicator), worker.entered[number]
            mine = is_open[is_open["communicator"] == number]
            if not len(mine):
                idle_s = (snapshot.at_ns - worker.ended_ns.get(number, snapshot.at_ns)) / 1e9
                self._progress.append((group, worker.rank, entered, entered, 0, 0, 0, math.nan, idle_s))
                continue
            oldest = mine[np.argmin(mine["sequence"])]
            age_s = (snapshot.at_ns - int(oldest["enter_ns"])) / 1e9
            self._progress.append(
                (
                    group,
                    worker.rank,
                    entered,
                    int(oldest["sequence"]) - 1,
                    oldest["op_type"],
                    oldest["element_type"],
                    oldest["bytes"],
                    age_s,
                    math.nan,
                )
            )
            for edge in snapshot.edges[snapshot.edges["op_id"] == oldest["op_id"]]:
                outgoing = int(edge["source"]) == worker.rank
                progress_age_s = (snapshot.at_ns - int(edge["progress_ns"])) / 1e9
                sent, received = (int(edge["messages"]), -1) if outgoing else (-1, int(edge["messages"]))
                ends = int(edge["source"]), int(edge["destination"])
                self._links.append((group, *ends, oldest["sequence"], sent, received, progress_age_s))

    def add_blocks(self, worker: WorkerReader, index_of: Any) -> None:
        """The worker's finished blocks."""
        if worker.snapshot is None:
            return
        blocks, link_blocks = worker.sums.take()
        snapshot = worker.snapshot
        known = {number: index_of(one) for number, one in enumerate(snapshot.communicators) if len(one.ranks) > 1}
        self._blocks += [(known[row[0]], worker.rank, *row[1:]) for row in blocks if row[0] in known]
        self._link_blocks += [(known[row[0]], *row[1:]) for row in link_blocks if row[0] in known]

    def observation(self, generation: int, node: str, groups: tuple[Group, ...]) -> Observation:
        """The tables as columns."""
        tables: dict[str, Any] = {
            "ranks": _columns(RankRows, self._ranks),
            "progress": _columns(ProgressRows, self._progress),
            "links": _columns(LinkRows, self._links),
            "blocks": _columns(BlockRows, self._blocks),
            "link_blocks": _columns(LinkBlockRows, self._link_blocks),
        }
        return Observation(time.monotonic(), generation, (node,), groups, **tables)


def _columns(kind: Any, rows: list[tuple[Any, ...]]) -> Any:
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(DTYPES[kind])
    return kind(*(np.array(column, dtype=dtype) for column, (_, dtype) in zip(columns, DTYPES[kind], strict=True)))


def _newest_sequences(operations: np.ndarray) -> list[tuple[int, int]]:
    found: dict[int, int] = {}
    for communicator, sequence in operations[["communicator", "sequence"]].tolist():
        found[communicator] = max(sequence, found.get(communicator, 0))
    return list(found.items())
