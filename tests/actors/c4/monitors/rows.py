"""Observations made by hand, for tests of who carries and shows them."""

from __future__ import annotations

from typing import Any

import numpy as np

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
from actors.c4.generation import Generation, Worker
from actors.c4.monitors.wire import DTYPES

DP = Group("0", "dp", (0, 1, 2, 3))


def table(kind: type, rows: list[tuple[Any, ...]]) -> Any:
    """Columns of a table from its rows."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(DTYPES[kind])
    return kind(*(np.array(column, dtype=dtype) for column, (_, dtype) in zip(columns, DTYPES[kind], strict=True)))


def observation(
    node: str,
    ranks: tuple[int, ...],
    *,
    generation: int = 1,
    groups: tuple[Group, ...] = (DP,),
    progress: list[tuple[Any, ...]] = (),  # type: ignore[assignment]
    blocks: list[tuple[Any, ...]] = (),  # type: ignore[assignment]
    link_blocks: list[tuple[Any, ...]] = (),  # type: ignore[assignment]
    state: ProcessState = ProcessState.SLEEPING,
    at_s: float = 10.0,
) -> Observation:
    """Of one node; every rank sleeps with a fresh heartbeat."""
    rows = [(rank, 0, state, 0.02, 0.0, 0.5, 0.1, 0.0004) for rank in ranks]
    tables = {
        "ranks": table(RankRows, rows),
        "progress": table(ProgressRows, list(progress)),
        "links": table(LinkRows, []),
        "blocks": table(BlockRows, list(blocks)),
        "link_blocks": table(LinkBlockRows, list(link_blocks)),
    }
    return Observation(at_s, generation, (node,), groups, **tables)


def generation(number: int = 1, nodes: int = 2, size: int = 4, first_pid: int = 100) -> Generation:
    """Ranks in blocks over nodes ``n0``, ``n1``, ..."""
    workers = [
        Worker(rank, f"n{rank * nodes // size}", f"host-{rank * nodes // size}", first_pid + rank)
        for rank in range(size)
    ]
    return Generation(number, tuple(workers))
