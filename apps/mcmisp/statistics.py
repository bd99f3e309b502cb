"""Paired statistics of arms over seeds: steps to a loss, ratios, bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Course = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval."""

    value: float
    low: float
    high: float
    seeds: int


def reached_at(course: Course, loss: float, against: str = "step") -> float:
    """Where the validation loss first reaches ``loss``, between evaluations by interpolation; infinity if it never does.

    ``against``: the entries' key that is counted, such as step or seconds. Before the first evaluation is the first evaluation.
    """
    points = [(e[against], e["validation_loss"]) for e in course if "validation_loss" in e]
    for number, (place, value) in enumerate(points):
        if value <= loss:
            if number == 0:
                return float(place)
            before, higher = points[number - 1]
            return float(before + (place - before) * (higher - loss) / (higher - value))
    return math.inf


def target_loss(plain: Course, quantile: float = 1.0) -> float:
    """The best validation loss of the plain run within the first ``quantile`` of its steps."""
    points = [(e["step"], e["validation_loss"]) for e in plain if "validation_loss" in e]
    limit = quantile * points[-1][0]
    return min(value for step, value in points if step <= limit) if points[0][0] <= limit else points[0][1]


def steps_to_loss_ratio(
    arm: Mapping[int, Course], plain: Mapping[int, Course], quantile: float, draws: int, against: str = "step"
) -> Interval:
    """Geometric mean over seeds of (arm's / plain's) way to the plain run's loss of the same seed, with a bootstrap interval.

    A run that never gets there has no ratio of its own; it counts as 2, as do ratios above it, so that failures weigh against
    the arm instead of being left out.
    """
    seeds = sorted(set(arm) & set(plain))
    ratios = []
    for seed in seeds:
        loss = target_loss(plain[seed], quantile)
        mine, theirs = reached_at(arm[seed], loss, against), reached_at(plain[seed], loss, against)
        ratios.append(math.log(min(2.0, mine / theirs)))
    return bootstrap(np.array(ratios), draws, np.exp)


def paired_difference(arm: Mapping[int, float], plain: Mapping[int, float], draws: int) -> Interval:
    """Mean over seeds of arm - plain."""
    seeds = sorted(set(arm) & set(plain))
    return bootstrap(np.array([arm[seed] - plain[seed] for seed in seeds]), draws)


def bootstrap(values: np.ndarray, draws: int, transform=lambda x: x) -> Interval:
    """``transform`` of the mean, with the 2.5 and 97.5 percentiles of means of resamples (Efron 1979); the same every time."""
    if len(values) == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(transform(values.mean())), float(transform(low)), float(transform(high)), len(values))


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


__all__ = [
    "Interval",
    "bootstrap",
    "mean_interval",
    "paired_difference",
    "reached_at",
    "steps_to_loss_ratio",
    "target_loss",
]
