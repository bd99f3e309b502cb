"""Finished operations of one rank -> sums per block of ``BLOCK_OPS`` operations: own work, wait, lateness, link times. No Ray."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from actors.c4.diagnosis.observation import BLOCK_OPS
from actors.c4.recorder.records import OpFlag


class Operation(NamedTuple):
    """Of an OP_RECORD what is counted."""

    op_id: int
    sequence: int
    enter_ns: int
    end_ns: int
    communicator: int
    flags: int


class Edge(NamedTuple):
    """Of an EDGE_RECORD what is counted."""

    op_id: int
    bytes: int
    lateness_ns: int
    transfer_ns: int
    source: int
    destination: int


@dataclass
class _Sum:
    block: int
    count: int = 0
    work_s: float = 0.0
    worked: int = 0
    """Operations before which the own work is known."""
    wait_s: float = 0.0
    lateness_s: float = 0.0
    told: int = 0
    """Operations whose transport told the lateness."""
    links: dict[tuple[int, int], tuple[int, float]] = field(default_factory=dict)
    """By (source, destination): bytes, transfer in s."""


class BlockSums:
    """Of one rank. ``add`` operations in order of op_id, each once; ``take`` what is finished."""

    def __init__(self, rank: int):
        self._rank = rank
        self._open: dict[int, _Sum] = {}
        self._mark_ns = 0
        """When the rank last went over to its own work: an operation ended, or went on by itself while the rank did."""
        self._running: list[int] = []
        """Ends of operations that were under way when the newest one was entered."""
        self._blocks: list[tuple[int, int, float, float, float]] = []
        self._link_blocks: list[tuple[int, int, int, int, int, float]] = []

    def add(self, operations: np.ndarray, edges: np.ndarray) -> None:
        """Ended operations (OP_RECORD, ascending op_id) and the edges (EDGE_RECORD) of these and perhaps others."""
        incoming: dict[int, list[Edge]] = {}
        for edge in map(Edge._make, edges[edges["destination"] == self._rank][list(Edge._fields)].tolist()):
            incoming.setdefault(edge.op_id, []).append(edge)
        for one in map(Operation._make, operations[list(Operation._fields)].tolist()):
            mark_ns = max([self._mark_ns, *(end for end in self._running if end <= one.enter_ns)])
            self._running = [end for end in self._running if end > one.enter_ns] + [one.end_ns]
            self._mark_ns = max(mark_ns, one.enter_ns)
            work_s = max(0, one.enter_ns - mark_ns) / 1e9 if mark_ns else math.nan
            if not one.flags & OpFlag.FAILED.value:
                self._count(one, work_s, incoming.get(one.op_id, []))

    def take(self) -> tuple[list[tuple[int, int, float, float, float]], list[tuple[int, int, int, int, int, float]]]:
        """(communicator, block, work_s, wait_s, lateness_s) and (communicator, source, destination, block, bytes,
        transfer_s) of the blocks that finished since the last call."""
        blocks, links = self._blocks, self._link_blocks
        self._blocks, self._link_blocks = [], []
        return blocks, links

    def _count(self, one: Operation, work_s: float, edges: list[Edge]) -> None:
        block = (one.sequence - 1) // BLOCK_OPS
        current = self._open.get(one.communicator)
        if current is None or current.block != block:  # a block of which operations were missed is dropped
            current = self._open[one.communicator] = _Sum(block)
        current.count += 1
        current.wait_s += (one.end_ns - one.enter_ns) / 1e9
        if not math.isnan(work_s):
            current.work_s += work_s
            current.worked += 1
        for edge in edges:
            current.lateness_s += edge.lateness_ns / 1e9
            current.told += 1
            ends = edge.source, edge.destination
            moved, transfer_s = current.links.get(ends, (0, 0.0))
            current.links[ends] = moved + edge.bytes, transfer_s + edge.transfer_ns / 1e9
        if current.count == BLOCK_OPS:
            self._finish(one.communicator, self._open.pop(one.communicator))

    def _finish(self, communicator: int, done: _Sum) -> None:
        work_s = done.work_s / done.worked if done.worked else math.nan
        lateness_s = done.lateness_s / done.told if done.told else math.nan
        self._blocks.append((communicator, done.block, work_s, done.wait_s / done.count, lateness_s))
        for (source, destination), (moved, transfer_s) in done.links.items():
            self._link_blocks.append((communicator, source, destination, done.block, moved, transfer_s))
