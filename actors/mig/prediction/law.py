"""The performance law of a workload on a slice, and its derivatives.

    T(b, s, p, slice)^q = F(b)^q + (K(b, s, p) slow(slice))^q                                                   latency, ms
    F(b)       = F0 + F1 b                     launch floor: host time and kernel latency, which no slice changes
    K(b, s, p) = k1 p (b + b0) (s / 64)^e exp(d)     time on the whole GPU's SMs and memory: p processes, b0 the weights' share
    slow       = (1 / sm_share)^(a - m) (1 / bandwidth_share)^m exp(w [bandwidth_share > 1/2] + u)    SM, bandwidth term

q is 1 where the host waits for the GPU (the terms add) and large where launches run ahead (the slower one hides the other).
w is what it costs to span both halves of the memory (the whole GPU has two L2 partitions, and draws the power of all of it).
d is a deviation of one (batch, sequence, processes) from the straight law, u one of a slice; both are drawn towards 0.
All of it is written in logarithms, because errors of latencies are relative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.mig.prediction.slices import Slice

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

NAMES = ("log_slope", "log_f0", "log_host", "log_b0", "scaling", "memory", "log_q", "sequence", "span")
"""Parameters: ln(k1 + F1) in ms per sample, ln(F0 / (k1 + F1)), ln(F1 / k1), ln b0 (samples), a, m, ln q, e, w.

The sum k1 + F1 is what measurements on one slice fix, whatever its division, so it is a parameter of its own."""
COUNT = len(NAMES)
SEQUENCE_UNIT = 64.0


@dataclass(frozen=True)
class Points:
    """Where latencies are wanted or known, one entry a point; ``cell`` numbers the (batch, sequence, processes)."""

    log_batch: Array
    log_sequence: Array
    """ln(sequence / 64); 0 where there is none."""
    log_processes: Array
    log_inverse_sms: Array
    """ln(1 / sm_share)."""
    log_inverse_bandwidth: Array
    cell: Indices
    slice_index: Indices

    def __len__(self) -> int:
        return len(self.log_batch)

    def take(self, rows: Indices) -> Points:
        """The points of these numbers."""
        return Points(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})


def make_points(rows: Sequence[tuple[int, int | None, int, Slice]]) -> tuple[Points, Array, list[Slice]]:
    """Points of (batch, sequence, processes, slice); with the coordinates of the cells (C x 3, logarithms) and the slices."""
    cells: dict[tuple[float, float, float], int] = {}
    slices: dict[tuple[float, float], int] = {}
    distinct: list[Slice] = []
    table = []
    for batch, sequence, processes, part in rows:
        key = (np.log(batch), np.log(sequence / SEQUENCE_UNIT) if sequence else 0.0, np.log(processes))
        shares = (part.sm_share, part.bandwidth_share)
        if shares not in slices:
            distinct.append(part)
        where = (cells.setdefault(key, len(cells)), slices.setdefault(shares, len(slices)))
        table.append((*key, -np.log(part.sm_share), -np.log(part.bandwidth_share), *where))
    columns = np.array(table, dtype=float).reshape(len(table), 7).T
    cell, slice_index = columns[5:].astype(np.int64)
    points = Points(columns[0], columns[1], columns[2], columns[3], columns[4], cell, slice_index)
    return points, np.array(list(cells)).reshape(len(cells), 3), distinct


def log_latency(theta: Array, deviation: Array, slice_effect: Array, at: Points) -> tuple[Array, Array]:
    """ln T and its derivatives.

    Args:
        theta: the ``COUNT`` parameters of ``NAMES``.
        deviation: d of each cell (C).
        slice_effect: u of each slice (S).
        at: N points.

    Returns:
        ln(latency in ms) (N), and d ln T / d(theta, deviation, slice_effect) (N x (COUNT + C + S)).
    """
    log_slope, log_f0, log_host, log_b0, scaling, memory, log_q, sequence, span = theta
    host = 1 / (1 + np.exp(-np.clip(log_host, -50, 50)))  # F1 / (F1 + k1)
    log_f1 = log_host - np.logaddexp(0, log_host)
    q = np.exp(log_q)
    batch = np.exp(at.log_batch)
    spans_halves = at.log_inverse_bandwidth < 0.6
    floor_share = 1 / (1 + np.exp(np.clip(log_f1 + at.log_batch - log_f0, -50, 50)))
    log_floor = log_slope + np.logaddexp(log_f0, log_f1 + at.log_batch)
    weights = np.exp(log_b0)
    log_work = (
        log_slope - np.logaddexp(0, log_host) + np.log(batch + weights) + at.log_processes + sequence * at.log_sequence
        + (scaling - memory) * at.log_inverse_sms + memory * at.log_inverse_bandwidth
        + span * spans_halves + deviation[at.cell] + slice_effect[at.slice_index]
    )  # fmt: skip
    work_share = 1 / (1 + np.exp(np.clip(q * (log_floor - log_work), -50, 50)))
    value = np.logaddexp(q * log_floor, q * log_work) / q
    count = len(at)
    slope = np.zeros((count, COUNT + len(deviation) + len(slice_effect)))
    slope[:, 0] = 1
    slope[:, 1] = (1 - work_share) * floor_share
    slope[:, 2] = (1 - work_share) * (1 - floor_share) * (1 - host) - work_share * host
    slope[:, 3] = work_share * weights / (batch + weights)
    slope[:, 4] = work_share * at.log_inverse_sms
    slope[:, 5] = work_share * (at.log_inverse_bandwidth - at.log_inverse_sms)
    slope[:, 6] = (1 - work_share) * log_floor + work_share * log_work - value
    slope[:, 7] = work_share * at.log_sequence
    slope[:, 8] = work_share * spans_halves
    rows = np.arange(count)
    slope[rows, COUNT + at.cell] = work_share
    slope[rows, COUNT + len(deviation) + at.slice_index] = work_share
    return value, slope
