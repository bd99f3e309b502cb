"""The predictor: measurements in, a prediction with its interval and a word on memory out, for every row.

Rows of one GPU, mode and workload explain each other (law.py, fit.py); the other groups of the same call lend their
experience to the prior (prior.py), never their latencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.mig.prediction.errors import PredictionError
from actors.mig.prediction.fit import Population, fit
from actors.mig.prediction.law import Array, Indices, Points, make_points
from actors.mig.prediction.measurement import Measurement, Prediction
from actors.mig.prediction.memory import ALARM, fit_memory
from actors.mig.prediction.prior import Known, combine, study
from actors.mig.prediction.shipped import POPULATION, SHIPPED_FAMILIES
from actors.mig.prediction.slices import Slice, parse_slice

TEACHING_ROWS = 6
"""Known rows, on two slices or more, from which a workload takes part in the prior of the others."""
_NORMAL_90 = 1.645


@dataclass(frozen=True)
class Group:
    """The rows of one workload on one GPU in one mode, with their slices, points and what is known."""

    rows: tuple[Measurement, ...]
    slices: tuple[Slice, ...]
    points: Points
    cells: Array
    slice_count: int
    known: Indices
    """Numbers of the rows whose latency is known."""
    log_ms: Array
    extra_variance: Array

    def teaching(self, family: str | None = None) -> Known:
        """As a workload to learn the prior from."""
        where = self.points.take(self.known)
        return Known(
            family or self.rows[0].workload, where, self.log_ms, self.extra_variance, self.cells, self.slice_count
        )


def make_group(rows: Sequence[Measurement]) -> Group:
    """Checks and arranges the rows of one workload.

    Raises:
        PredictionError: a row that cannot be, an unknown GPU or profile.
    """
    for row in rows:
        row.check()
    slices = tuple(parse_slice(row.gpu, row.profile) for row in rows)
    points, cells, distinct = make_points(
        [(row.batch, row.sequence, row.processes, part) for row, part in zip(rows, slices, strict=True)]
    )
    known = np.array([n for n, row in enumerate(rows) if row.latency_ms is not None and not row.oom], dtype=np.int64)
    latency = np.array([rows[n].latency_ms for n in known], dtype=float)
    rounding = _resolution_ms(latency) ** 2 / 12 / latency**2 if len(known) else np.empty(0)
    return Group(tuple(rows), slices, points, cells, len(distinct), known, np.log(latency), rounding)


def predict_group(group: Group, population: Population = POPULATION) -> list[Prediction]:
    """Predictions of all rows of one workload, the known ones too (there: what the fit makes of them).

    Raises:
        PredictionError: no latency of the workload is known.
    """
    if not len(group.known):
        gpu, mode, workload = group.rows[0].group
        raise PredictionError(
            f"Nothing is known of {workload!r} ({mode}) on {gpu}: give the latency of at least one row, "
            "best of the whole GPU over several batch sizes."
        )
    at = group.points.take(group.known)
    posterior = fit(at, group.log_ms, group.extra_variance, group.cells, group.slice_count, population)
    mean, doubt = posterior.predict(group.points)
    resolution = _resolution_ms(np.exp(group.log_ms)) ** 2 / 12 * np.exp(-2 * mean)
    sd = np.sqrt(doubt**2 + posterior.noise**2 + resolution + _spread(group) ** 2)
    width = _NORMAL_90 * population.interval_scale * sd
    known = [(row, part) for row, part in zip(group.rows, group.slices, strict=True) if _tells(row)]
    chance = fit_memory(known).probability(list(zip(group.rows, group.slices, strict=True)))
    found = []
    for row, middle, half, out in zip(group.rows, mean, width, chance, strict=True):
        out = float(bool(row.oom)) if _tells(row) else float(out)
        low, high = float(np.exp(middle - half)), float(np.exp(middle + half))
        found.append(Prediction(float(np.exp(middle)), low, high, out >= ALARM, out))
    return found


def predict(rows: Sequence[Measurement], population: Population = POPULATION) -> list[Prediction]:
    """Predictions of all rows, in their order.

    Raises:
        PredictionError: a row that cannot be, an unknown GPU or profile, or a workload of which nothing is known.
    """
    members: dict[tuple[str, str, str], list[int]] = {}
    for number, row in enumerate(rows):
        members.setdefault(row.group, []).append(number)
    groups = {key: make_group([rows[n] for n in numbers]) for key, numbers in members.items()}
    lessons = {key: study(group.teaching(), population) for key, group in groups.items() if _teaches(group)}
    found: list[Prediction | None] = [None] * len(rows)
    for key, numbers in members.items():
        others = [lesson for name, lesson in lessons.items() if name[2] != key[2]]
        prior = combine(others, population, SHIPPED_FAMILIES)
        for number, prediction in zip(numbers, predict_group(groups[key], prior), strict=True):
            found[number] = prediction
    return [one for one in found if one is not None]


def _teaches(group: Group) -> bool:
    return len(group.known) >= TEACHING_ROWS and len(set(group.points.slice_index[group.known])) > 1


def _tells(row: Measurement) -> bool:
    """Whether the row is a measurement, rather than a question."""
    return row.latency_ms is not None or bool(row.oom)


def _resolution_ms(latency: Array) -> float:
    """The step to which latencies were rounded: 1, 0.1, 0.01 ms, or 0 where none is seen."""
    for step in (1.0, 0.1, 0.01):
        if np.all(np.abs(latency / step - np.round(latency / step)) < 1e-6):
            return step
    return 0.0


def _spread(group: Group) -> float:
    """A part of the typical spread of single runs: what spreads widely is not measured exactly either, so intervals open."""
    spreads = [
        row.latency_std_ms / row.latency_ms
        for row in group.rows
        if row.latency_std_ms and row.latency_ms and not row.oom
    ]
    return 0.25 * min(float(np.median(spreads)), 2.0) if spreads else 0.0
