"""Observations made by hand: a job in which all is well, to be spoiled cell by cell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from actors.c4.diagnosis.diagnose import diagnose
from actors.c4.diagnosis.memory import DiagnosisMemory
from actors.c4.diagnosis.observation import (
    BlockRows,
    Group,
    LinkBlockRows,
    LinkRows,
    Observation,
    ProcessState,
    ProgressRows,
    RankRows,
    empty,
)
from actors.c4.diagnosis.settings import DiagnosisSettings
from actors.c4.diagnosis.verdict import Verdict
from actors.c4.recorder.records import ElementType, OpType

STEP_S = 0.15
SETTINGS = DiagnosisSettings()


@dataclass(frozen=True)
class At:
    """How far a rank has come in a group. ``open_s`` None: inside nothing, since ``idle_s``."""

    entered: int
    open_s: float | None = None
    idle_s: float = 0.05
    kind: OpType = OpType.ALL_REDUCE
    size: int = 4096
    dtype: ElementType = ElementType.FLOAT32


def ranks(world: int, per_node: int = 1, **changes: Mapping[int, float]) -> RankRows:
    """Healthy processes; ``changes``: column -> {rank: value}."""
    columns = {
        "rank": np.arange(world, dtype=np.int32),
        "node": np.arange(world, dtype=np.int32) // per_node,
        "process_state": np.full(world, ProcessState.SLEEPING, np.uint8),
        "heartbeat_age_s": np.full(world, 0.03, np.float32),
        "report_age_s": np.full(world, 0.1, np.float32),
        "cpu_share": np.full(world, np.nan, np.float32),
        "step_s": np.full(world, STEP_S, np.float32),
        "wake_delay_s": np.full(world, 0.0004, np.float32),
    }
    for name, values in changes.items():
        for rank, value in values.items():
            columns[name][rank] = value
    return RankRows(**columns)


def progress(rows: Iterable[tuple[int, int, At]]) -> ProgressRows:
    """Rows of (group index, rank, how far)."""
    rows = list(rows)
    ats = [at for _, _, at in rows]
    is_open = [at.open_s is not None for at in ats]
    return ProgressRows(
        np.array([g for g, _, _ in rows], np.int32), np.array([r for _, r, _ in rows], np.int32),
        np.array([at.entered for at in ats], np.int64),
        np.array([at.entered - o for at, o in zip(ats, is_open, strict=True)], np.int64),
        np.array([at.kind if o else 0 for at, o in zip(ats, is_open, strict=True)], np.uint8),
        np.array([at.dtype if o else 0 for at, o in zip(ats, is_open, strict=True)], np.uint8),
        np.array([at.size if o else 0 for at, o in zip(ats, is_open, strict=True)], np.int64),
        np.array([at.open_s if o else np.nan for at, o in zip(ats, is_open, strict=True)], np.float32),
        np.array([np.nan if o else at.idle_s for at, o in zip(ats, is_open, strict=True)], np.float32),
    )  # fmt: skip


def links(rows: Iterable[tuple[int, int, int, int, int, float]], group: int = 0) -> LinkRows:
    """Both ends of (source, destination, sequence, sent, received, age of progress)."""
    table = []
    for source, to, sequence, sent, received, age in rows:
        table += [(group, source, to, sequence, sent, -1, age), (group, source, to, sequence, -1, received, age)]
    columns = list(zip(*table, strict=True))
    kinds = (np.int32, np.int32, np.int32, np.int64, np.int32, np.int32, np.float32)
    return LinkRows(*(np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)))


def observation(
    groups: Sequence[Group],
    rows: ProgressRows,
    *,
    at_s: float = 100.0,
    processes: RankRows | None = None,
    per_node: int = 1,
    **tables,
) -> Observation:
    world = 1 + max(rank for group in groups for rank in group.ranks)
    processes = processes if processes is not None else ranks(world, per_node)
    nodes = tuple(f"node{index}" for index in range(1 + int(processes.node.max())))
    rest = {"links": empty(LinkRows), "blocks": empty(BlockRows), "link_blocks": empty(LinkBlockRows)} | tables
    return Observation(at_s, 1, nodes, tuple(groups), processes, rows, **rest)


def look(
    seen: Observation, memory: DiagnosisMemory | None = None, settings: DiagnosisSettings = SETTINGS
) -> tuple[Verdict, ...]:
    return diagnose(seen, memory or DiagnosisMemory(), settings)[0]


def block_rows(
    group: int, members: Sequence[int], block: int, work: Sequence[float], wait: Sequence[float]
) -> BlockRows:
    count = len(members)
    return BlockRows(
        np.full(count, group, np.int32), np.array(members, np.int32), np.full(count, block, np.int64),
        np.array(work, np.float32), np.array(wait, np.float32), np.full(count, np.nan, np.float32),
    )  # fmt: skip


def link_block_rows(
    group: int, pairs: Sequence[tuple[int, int]], block: int, seconds: Sequence[float], size: int
) -> LinkBlockRows:
    count = len(pairs)
    return LinkBlockRows(
        np.full(count, group, np.int32), np.array([a for a, _ in pairs], np.int32), np.array([b for _, b in pairs], np.int32),
        np.full(count, block, np.int64), np.full(count, size, np.int64), np.array(seconds, np.float32),
    )  # fmt: skip


class Course:
    """A single-group job of blocks: in each, own work per rank; the wait follows (all end together, as in a collective).

    ``transfer(block, pair)`` gives the seconds that a connection of the ring took in a block.
    """

    def __init__(
        self,
        world: int = 4,
        per_node: int = 1,
        noise: float = 0.1,
        seed: int = 0,
        settings: DiagnosisSettings = SETTINGS,
    ):
        self.members = tuple(range(world))
        self.groups = (Group("0", "", self.members),)
        self.pairs = [(rank, (rank + 1) % world) for rank in self.members]
        self.per_node, self.noise, self.settings = per_node, noise, settings
        self.rng = np.random.default_rng(seed)
        self.memory = DiagnosisMemory()
        self.now, self.block = 50.0, 0
        self.wake_delay_s: dict[int, float] = {}
        """Of ranks on a busy host."""

    def run(
        self,
        blocks: int,
        work: Callable[[int, int], float] = lambda block, rank: 1.0,
        transfer: Callable[[int, tuple[int, int]], float] = lambda block, pair: 1.0,
    ) -> list[Verdict]:
        """Factors on 30 ms of work an operation and 8 ms of transfer a block; returns what was named."""
        named: list[Verdict] = []
        for _ in range(blocks):
            shake = np.maximum(1 + self.noise * self.rng.standard_normal((2, len(self.members))), 0.3)
            own = np.array([0.03 * work(self.block, rank) for rank in self.members]) * shake[0]
            seconds = np.array([0.008 * transfer(self.block, pair) for pair in self.pairs]) * shake[1]
            operation = 0.004 + seconds.max() / 4
            wait = own.max() - own + operation
            self.now += 4 * float(own.max() + operation)
            seen = observation(
                self.groups, progress((0, rank, At(4 * self.block + 4)) for rank in self.members), at_s=self.now,
                processes=ranks(len(self.members), self.per_node, wake_delay_s=self.wake_delay_s),
                blocks=block_rows(0, self.members, self.block, own, wait),
                link_blocks=link_block_rows(0, self.pairs, self.block, seconds, 4 << 20),
            )  # fmt: skip
            said, self.memory = diagnose(seen, self.memory, self.settings)
            named += said
            self.block += 1
        return named


def later(seen: Observation, seconds: float) -> Observation:
    """The same standstill, seen later."""
    rows = seen.progress
    return replace(
        seen, at_s=seen.at_s + seconds,
        progress=replace(rows, open_age_s=rows.open_age_s + np.float32(seconds), idle_s=rows.idle_s + np.float32(seconds)),
    )  # fmt: skip
