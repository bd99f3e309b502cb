"""What people want to see of an observation: a row a rank, who waits for whom, how long a MiB takes. Pure, no Ray."""

from __future__ import annotations

import math

import numpy as np

from actors.c4.diagnosis.observation import Observation, ProcessState
from actors.c4.generation import Generation
from actors.c4.ports import DelayMatrix, OpenOperation, RankStatus, Wait
from actors.c4.recorder.records import OpType

MATRIX_RANKS = 64
"""Groups larger than this get no delay matrix here."""
MATRIX_BLOCKS = 16
MIB = 2**20


def rank_rows(generation: Generation | None, observation: Observation | None) -> tuple[RankStatus, ...]:
    """A row for every worker of the generation, observed or not."""
    if generation is None:
        return ()
    seen: dict[int, int] = {}
    progress: dict[int, list[int]] = {}
    if observation is not None:
        seen = {int(rank): row for row, rank in enumerate(observation.ranks.rank)}
        for at, rank in enumerate(observation.progress.rank):
            progress.setdefault(int(rank), []).append(at)
    rows = []
    for worker in generation.workers:
        row = seen.get(worker.rank)
        state, heartbeat, report, share = ProcessState.UNKNOWN, math.nan, math.nan, math.nan
        entered = completed = 0
        operation = None
        if row is not None and observation is not None:
            ranks, table = observation.ranks, observation.progress
            state = ProcessState(int(ranks.process_state[row]))
            heartbeat, report = float(ranks.heartbeat_age_s[row]), float(ranks.report_age_s[row])
            share = float(ranks.cpu_share[row])
            of_rank = progress.get(worker.rank, [])
            entered = int(sum(table.entered[i] for i in of_rank))
            completed = int(sum(table.completed[i] for i in of_rank))
            is_open = [i for i in of_rank if table.open_type[i]]
            if is_open:
                oldest = max(is_open, key=lambda i: float(table.open_age_s[i]))
                operation = OpenOperation(
                    group=observation.groups[table.group[oldest]].name,
                    operation=operation_name(int(table.open_type[oldest])),
                    sequence=int(table.completed[oldest]) + 1,
                    age_s=float(table.open_age_s[oldest]),
                )
        rows.append(
            RankStatus(
                rank=worker.rank,
                node_id=worker.node_id,
                node_name=worker.node_name,
                pid=worker.pid,
                process=state.name.lower(),
                heartbeat_age_s=heartbeat,
                report_age_s=report,
                entered=entered,
                completed=completed,
                open=operation,
                cpu_share=share,
            )
        )
    return tuple(rows)


def operation_name(number: int) -> str:
    """``all_reduce`` for an ``OpType``'s number; ``operation 77`` for one that this version does not know."""
    return OpType(number).name.lower() if number in set(OpType) else f"operation {number}"


def waits(observation: Observation) -> tuple[Wait, ...]:
    """For each group with an open operation: its members that are in it wait for those that have not entered it."""
    found = []
    table = observation.progress
    for index, group in enumerate(observation.groups):
        rows = np.flatnonzero(table.group == index)
        if len(rows) < 2:
            continue
        entered = table.entered[rows]
        newest = int(entered.max())
        late = rows[entered < newest]
        if not len(late):
            continue
        for row in rows[(entered == newest) & (table.open_type[rows] > 0)]:
            found += [
                Wait(int(table.rank[row]), int(table.rank[one]), group.name, newest, float(table.open_age_s[row]))
                for one in late
            ]
    return tuple(sorted(found, key=lambda wait: -wait.age_s)[:100])


def delay_matrices(observation: Observation) -> tuple[DelayMatrix, ...]:
    """Milliseconds per MiB of every connection over its last blocks, for groups of up to ``MATRIX_RANKS`` ranks."""
    matrices = []
    table = observation.link_blocks
    for index, group in enumerate(observation.groups):
        rows = np.flatnonzero((table.group == index) & (table.bytes > 0))
        if not len(rows) or len(group.ranks) > MATRIX_RANKS:
            continue
        rows = rows[table.block[rows] > table.block[rows].max() - MATRIX_BLOCKS]
        place = {rank: at for at, rank in enumerate(group.ranks)}
        per_mib = np.full((len(group.ranks),) * 2, np.nan)
        ends = table.source[rows].astype(np.int64) * 2**32 + table.destination[rows]
        for key in np.unique(ends):
            of_link = rows[ends == key]
            delays = table.transfer_s[of_link].astype(float) / table.bytes[of_link] * MIB * 1e3
            source, destination = place.get(int(key) >> 32), place.get(int(key) & 0xFFFFFFFF)
            if source is not None and destination is not None:
                per_mib[source, destination] = float(np.median(delays))
        matrices.append(DelayMatrix(group.name, group.ranks, per_mib))
    return tuple(matrices)


def median_operation_s(observation: Observation) -> float:
    """Median over the last blocks of all ranks of own work and wait together, seconds per operation; nan without blocks."""
    blocks = observation.blocks
    if not len(blocks.block):
        return math.nan
    return float(np.nanmedian(blocks.work_s + blocks.wait_s))
