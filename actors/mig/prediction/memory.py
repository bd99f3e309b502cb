"""Will it fit? Memory that a workload needs on a slice, as a probability of running out.

    need(b, s, p) = p (A + C SMs + B peak b s / 64)             MiB; out of memory when that exceeds the slice's memory

A (weights, optimizer, libraries) and B (activations) come from the frame buffer in use where it was measured, else
they are as unknown as the peak: the ratio of the moment of most activations and workspace to the average that a
monitor shows. C is what a CUDA context reserves an SM. What is not measured is integrated out over a grid, weighted
by every known row that fitted or did not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.mig.prediction.law import SEQUENCE_UNIT, Array
from actors.mig.prediction.measurement import Measurement
from actors.mig.prediction.slices import Slice

PEAK_MEAN = {"train": math.log(1.75), "infer": math.log(1.3)}
PEAK_SD = 0.25
"""ln(peak / average). Set by hand: of the workloads in MIGPerf's published data only two run out of memory, both in
training (ResNet-50 with a peak between 2.0 and 2.5, a ViT below 1.4), so no leave-one-out stands behind it. Rows that
are known to fit or not correct it."""
CONTEXT_MIB_PER_SM = 4.2
"""A100, MIGPerf's published data: the same workload shows 356, 296 and 234 MiB less on 14, 28 and 42 SMs than on 98."""
ALARM = 0.3
"""Probability from which a row is said to run out: that costs a run, a false alarm only a look."""
_SOFTNESS = 0.06
"""How sharp the limit is, of ln(need): what the formula leaves out."""
_BASE, _BASE_SD = math.log(1000.0), 0.6
_SLOPE, _SLOPE_SD = math.log(60.0), 1.5


@dataclass(frozen=True)
class MemoryModel:
    """The posterior of one workload: grid points of (ln A, ln B, ln peak) and their weights."""

    base: Array
    slope: Array
    peak: Array
    weight: Array

    def probability(self, rows: Sequence[tuple[Measurement, Slice]]) -> Array:
        """Probability of running out of memory of each row."""
        return _runs_out(rows, self.base, self.slope, self.peak) @ self.weight


def fit_memory(known: Sequence[tuple[Measurement, Slice]]) -> MemoryModel:
    """The memory model of one workload from its known rows (with ``fb_mib`` or ``oom`` or neither)."""
    middle = PEAK_MEAN[known[0][0].mode]
    measured = [(row, part) for row, part in known if row.fb_mib and not row.oom]
    if measured:
        base, slope = _fit_use(measured)
        peak = np.linspace(middle - 4 * PEAK_SD, middle + 4 * PEAK_SD, 161)
        grids = [np.full(len(peak), math.log(base)), np.full(len(peak), math.log(slope)), peak]
        log_weight = -0.5 * ((peak - middle) / PEAK_SD) ** 2
    else:
        # Without a measured use only A * peak and B * peak matter: the peak is left at its middle.
        axes = np.meshgrid(
            np.linspace(_BASE - 3 * _BASE_SD, _BASE + 3 * _BASE_SD, 49),
            np.linspace(_SLOPE - 3.5 * _SLOPE_SD, _SLOPE + 3.5 * _SLOPE_SD, 121),
        )
        grids = [axes[0].ravel(), axes[1].ravel(), np.full(axes[0].size, middle)]
        log_weight = -0.5 * (((grids[0] - _BASE) / _BASE_SD) ** 2 + ((grids[1] - _SLOPE) / _SLOPE_SD) ** 2)
    told = [(row, part) for row, part in known if row.oom is not None or row.latency_ms is not None]
    if told:
        chance = _runs_out(told, *grids)
        out = np.array([bool(row.oom) for row, _ in told])[:, None]
        # A floor on each row's likelihood: one stale row must not outvote all others.
        log_weight = log_weight + np.sum(np.log(np.maximum(np.where(out, chance, 1 - chance), 1e-3)), axis=0)
    weight = np.exp(log_weight - log_weight.max())
    return MemoryModel(grids[0], grids[1], grids[2], weight / weight.sum())


def _samples(rows: Sequence[tuple[Measurement, Slice]]) -> Array:
    """Batch of each row, in units of 64 tokens where there are tokens."""
    return np.array([row.batch * (row.sequence / SEQUENCE_UNIT if row.sequence else 1.0) for row, _ in rows])


def _context(rows: Sequence[tuple[Measurement, Slice]]) -> Array:
    return np.array([CONTEXT_MIB_PER_SM * part.sms for _, part in rows])


def _runs_out(rows: Sequence[tuple[Measurement, Slice]], base: Array, slope: Array, peak: Array) -> Array:
    """Probability of each row (N) at each grid point (G), by a logistic limit of width ``_SOFTNESS``."""
    processes = np.array([row.processes for row, _ in rows], dtype=float)[:, None]
    memory = np.array([part.memory_mib for _, part in rows])[:, None]
    need = processes * (np.exp(base) + _context(rows)[:, None] + np.exp(slope + peak) * _samples(rows)[:, None])
    result: Array = 1 / (1 + np.exp(np.clip(1.7 * np.log(memory / need) / _SOFTNESS, -60, 60)))
    return result


def _fit_use(measured: Sequence[tuple[Measurement, Slice]]) -> tuple[float, float]:
    """A and B, both above 0, by least squares of relative errors; a weak pull to the usual A where one batch alone is known."""
    samples = _samples(measured)
    total = np.array([(row.fb_mib or 0.0) / row.processes for row, _ in measured])
    use = np.maximum(total - _context(measured), 0.1 * total)
    usual = min(math.exp(_BASE), 0.9 * float(use.min()))
    rows = np.stack([1 / use, samples / use], axis=1)
    matrix = np.vstack([rows, [[0.1 / usual, 0.0]]])
    right = np.append(np.ones(len(use)), 0.1)
    base, slope = np.linalg.lstsq(matrix, right, rcond=None)[0]
    if slope <= 0:
        return float(np.mean(use)), 1e-6 * float(np.mean(use))
    if base <= 0:
        base = 0.01 * float(use.min())
        slope = max(float(np.mean((use - base) / samples)), 1e-6)
    return float(base), float(slope)
