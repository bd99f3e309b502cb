"""What is known of a workload before it is measured: the population of parameters, and how it is learned from other workloads.

Empirical Bayes: each round fits every workload under the present prior and sets the prior to the mean and spread (of
estimates and of their uncertainty) of what was found. A family of n variants (two BERTs) counts as
the square root of n workloads, since copies are little evidence.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.mig.prediction.fit import Population, fit
from actors.mig.prediction.law import Array, Points

WEAK = Population(
    mean=(0.0, 0.5, -2.5, -1.0, 1.0, 0.3, 1.4, 1.1, 0.03),
    sd=(3.0, 1.5, 1.2, 1.0, 0.07, 0.15, 0.7, 0.2, 0.04),
)
"""Before any measurement: the floor equals the work of a usual batch, work scales with SMs, a third of it with bandwidth."""

SMALLEST_SD = np.array([3.0, 0.5, 0.5, 0.5, 0.03, 0.08, 0.3, 0.1, 0.02])
ROUNDS = 2
"""Few: with a score of workloads, more rounds fit the prior's width to chance."""


@dataclass(frozen=True)
class Known:
    """One workload's known points, ready for the fit; ``family`` names workloads that are variants of one."""

    family: str
    points: Points
    log_ms: Array
    extra_variance: Array
    cells: Array
    slice_count: int


@dataclass(frozen=True)
class Lesson:
    """What one workload teaches: its parameters (the floor counted from its middle batch, as in the prior) and their variance."""

    family: str
    theta: Array
    variance: Array


def study(workload: Known, population: Population) -> Lesson:
    """Fits one workload under a prior."""
    posterior = fit(
        workload.points, workload.log_ms, workload.extra_variance, workload.cells, workload.slice_count, population
    )
    theta, variance = posterior.parameters()
    theta[1] -= float(np.mean(workload.points.log_batch))  # fit.py adds it to the prior's mean
    return Lesson(workload.family, theta, variance)


def combine(lessons: Sequence[Lesson], start: Population, votes: float = 0) -> Population:
    """The prior that follows from the lessons; ``start`` counts as ``votes`` families and gives all scales of deviations."""
    if not lessons:
        return start
    members = Counter(one.family for one in lessons)
    weight = np.array([members[one.family] ** -0.5 for one in lessons])[:, None]
    theta, variance = np.array([one.theta for one in lessons]), np.array([one.variance for one in lessons])
    total = weight.sum() + votes
    mean = (np.sum(weight * theta, axis=0) + votes * np.array(start.mean)) / total
    spread = np.sum(weight * ((theta - mean) ** 2 + variance), axis=0)
    spread += votes * (np.square(start.sd) + (np.array(start.mean) - mean) ** 2)
    sd = np.maximum(np.sqrt(spread / total), SMALLEST_SD)
    mean[0], sd[0] = 0.0, SMALLEST_SD[0]  # a workload's size is its own
    return dataclasses.replace(start, mean=tuple(map(float, mean)), sd=tuple(map(float, sd)))


def learn(workloads: Sequence[Known], start: Population = WEAK, *, rounds: int = ROUNDS) -> Population:
    """The population that ``workloads``, each measured on several slices, come from; ``start`` only begins.

    Without workloads it is ``start``.
    """
    population = start
    for _ in range(rounds):
        population = combine([study(one, population) for one in workloads], start)
    return population
