"""Fits the law to what is known of one workload: maximum a posteriori, with Laplace's covariance for the uncertainty.

Residuals are Student-t (measured files hold stale and mistyped cells), the parameters' prior is Gaussian (prior.py),
the cells' deviations a Gaussian process over ln(batch), ln(sequence), ln(processes), so that a cell that nobody
measured follows its neighbours. Levenberg-Marquardt from several beginnings; local optima are mixed by their
evidence. numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.mig.prediction.law import COUNT, Array, Points, log_latency

_STARTS = (-1.5, 0.5, 2.5)
"""Beginnings of ln(F0 / (k1 + F1)), counted from the middle of the known ln(batch)."""
_NODES = (-2.25, -1.5, -0.75, 0.0, 0.75, 1.5, 2.25)
_WIDE = 0.5
"""Where the floor is known no better than this (of its logarithm), it is integrated over at so many deviations from
the optimum: Laplace's Gaussian does not see that a workload on the far side of the floor scales differently."""
_ITERATIONS = 60
_NOISE_ROUNDS = 4
_NOISE_ROWS = 4.0
"""The population's noise counts as so many rows when a workload's own is estimated."""


@dataclass(frozen=True)
class Population:
    """What workloads have in common: the Gaussian prior of the parameters and the scales of all deviations (of ln T)."""

    mean: tuple[float, ...]
    sd: tuple[float, ...]
    noise: float = 0.035
    """Standard deviation of a measurement beyond rounding and its own known spread."""
    cell_deviation: float = 0.08
    cell_length: tuple[float, float, float] = (2.0, 1.0, 1.5)
    """How far in ln(batch), ln(sequence), ln(processes) a cell's deviation reaches."""
    slice_deviation: float = 0.03
    interval_scale: float = 1.1
    """Factor on the standard deviations of an interval; set by hand, a little wide (nested leave-one-out asks for 0.8 to 0.9)."""
    degrees: float = 2.5
    """Degrees of freedom of Student's t."""


@dataclass(frozen=True)
class Mode:
    """One optimum: parameters, deviations, their joint covariance, and its weight among the optima."""

    theta: Array
    deviation: Array
    slice_effect: Array
    covariance: Array
    weight: float


@dataclass(frozen=True)
class Fit:
    """The posterior of one workload."""

    modes: tuple[Mode, ...]
    noise: float
    """Standard deviation of this workload's measurements (of ln T): the population's, or more where the law does not fit."""

    def predict(self, at: Points) -> tuple[Array, Array]:
        """Mean and standard deviation of ln(latency in ms) at ``at`` (cells and slices numbered as in the fit)."""
        means, variances = [], []
        for mode in self.modes:
            value, slope = log_latency(mode.theta, mode.deviation, mode.slice_effect, at)
            means.append(value)
            variances.append(np.einsum("ni,ij,nj->n", slope, mode.covariance, slope))
        weights = np.array([mode.weight for mode in self.modes])[:, None]
        mean = np.sum(weights * np.array(means), axis=0)
        spread = np.sum(weights * (np.array(variances) + (np.array(means) - mean) ** 2), axis=0)
        return mean, np.sqrt(np.maximum(spread, 0))

    def parameters(self) -> tuple[Array, Array]:
        """Posterior mean and variance of the ``COUNT`` parameters, over all optima."""
        weights = np.array([mode.weight for mode in self.modes])[:, None]
        thetas = np.array([mode.theta for mode in self.modes])
        variances = np.array([np.diag(mode.covariance)[:COUNT] for mode in self.modes])
        mean = np.sum(weights * thetas, axis=0)
        return mean, np.sum(weights * (variances + (thetas - mean) ** 2), axis=0)

    @property
    def best(self) -> Mode:
        """The optimum with the most evidence."""
        return max(self.modes, key=lambda mode: mode.weight)


def fit(
    known: Points, log_ms: Array, extra_variance: Array, cells: Array, slice_count: int, population: Population
) -> Fit:
    """The posterior given the known points.

    Args:
        known: N points, N >= 1.
        log_ms: their ln(latency in ms) (N).
        extra_variance: variance of each that is known beforehand, as of rounding (N).
        cells: coordinates of all cells, those of the points to be predicted too (C x 3).
        slice_count: number of distinct slices.
        population: the prior.
    """
    middle = float(np.mean(known.log_batch))
    precision, means = _prior(cells, slice_count, population, float(np.mean(log_ms)) - middle, middle)
    noise = population.noise**2
    count = len(cells)
    starts = []
    for start in _STARTS:
        x = means.copy()
        x[1] = start + middle
        value, _ = log_latency(x[:COUNT], x[COUNT : COUNT + count], x[COUNT + count :], known)
        x[0] += float(np.median(log_ms - value))
        starts.append(x)
    for _ in range(_NOISE_ROUNDS):
        variance = noise + extra_variance
        found = [_climb(x, known, log_ms, variance, precision, means, count, population.degrees) for x in starts]
        best = min(found, key=lambda one: one[0])
        residual = (
            log_ms - log_latency(best[1][:COUNT], best[1][COUNT : COUNT + count], best[1][COUNT + count :], known)[0]
        )
        weight = (population.degrees + 1) / (population.degrees + residual**2 / variance)
        surplus = float(np.sum(weight * residual**2 - extra_variance))
        updated = (_NOISE_ROWS * population.noise**2 + max(surplus, 0.0)) / (_NOISE_ROWS + len(log_ms))
        if updated < 1.1 * noise:
            break
        noise = updated
        starts = [x for _, x, _ in found]
    _, optimum, covariance = min(found, key=lambda one: one[0])
    reach = float(np.sqrt(covariance[1, 1]))
    if reach > _WIDE:
        nodes = [optimum + covariance[1] / reach * node for node in _NODES]
        found = [
            _climb(x, known, log_ms, noise + extra_variance, precision, means, count, population.degrees, fixed=1)
            for x in nodes
        ]
    return Fit(tuple(_mix(found, count)), float(np.sqrt(noise)))


def _prior(cells: Array, slice_count: int, population: Population, scale: float, middle: float) -> tuple[Array, Array]:
    """Precision (M x M) and mean (M) of (theta, deviations, slice effects).

    The slope is left nearly free around ``scale``; the floor is expected near the work of a batch of exp(``middle``),
    since people measure the batch sizes between which something changes.
    """
    size = len(cells)
    precision = np.zeros((COUNT + size + slice_count,) * 2)
    means = np.zeros(len(precision))
    means[:COUNT] = population.mean
    means[:2] += (scale, middle)
    precision[range(COUNT), range(COUNT)] = 1 / np.square(population.sd)
    gaps = np.abs(cells[:, None] - cells[None]) / population.cell_length
    distance = np.sqrt(np.sum(gaps**2, axis=-1))
    kernel = (1 + np.sqrt(3) * distance) * np.exp(-np.sqrt(3) * distance)
    kernel = population.cell_deviation**2 * (0.9 * kernel + 0.1 * np.eye(size))
    precision[COUNT : COUNT + size, COUNT : COUNT + size] = np.linalg.inv(kernel)
    tail = np.arange(COUNT + size, len(precision))
    precision[tail, tail] = 1 / population.slice_deviation**2
    return precision, means


def _climb(
    x: Array,
    known: Points,
    log_ms: Array,
    variance: Array,
    precision: Array,
    means: Array,
    cells: int,
    degrees: float,
    fixed: int | None = None,
) -> tuple[float, Array, Array]:
    """Levenberg-Marquardt on the negative log posterior; returns it, the optimum and Laplace's covariance there.

    ``fixed`` is the number of a parameter that stays where it is (its variance is then 0).
    """
    free = np.array([n for n in range(len(x)) if n != fixed])
    inner = np.ix_(free, free)

    def loss_of(at: Array) -> tuple[float, Array, Array]:
        value, slope = log_latency(at[:COUNT], at[COUNT : COUNT + cells], at[COUNT + cells :], known)
        residual = log_ms - value
        t = (degrees + 1) / 2 * np.sum(np.log1p(residual**2 / (degrees * variance)))
        return float(t + 0.5 * (at - means) @ precision @ (at - means)), residual, slope

    damping = 1e-2
    loss, residual, slope = loss_of(x)
    for _ in range(_ITERATIONS):
        weight = (degrees + 1) / (degrees * variance + residual**2)
        hessian = (slope * weight[:, None]).T @ slope + precision
        step = slope.T @ (weight * residual) - precision @ (x - means)
        moved = False
        while damping < 1e8:
            damped = hessian + damping * np.diag(np.diag(hessian))
            trial = x.copy()
            trial[free] += np.linalg.solve(damped[inner], step[free])
            trial[6] = np.clip(trial[6], -0.1, 4.0)  # q between 0.9 and 55: beyond it nothing changes but overflow
            trial_loss, trial_residual, trial_slope = loss_of(trial)
            if trial_loss < loss:
                moved = loss - trial_loss > 1e-7 * (1 + abs(loss))
                x, loss, residual, slope = trial, trial_loss, trial_residual, trial_slope
                damping = max(damping / 5, 1e-9)
                break
            damping *= 4
        if not moved:
            break
    weight = (degrees + 1) / (degrees * variance + residual**2)
    covariance = np.zeros_like(precision)
    covariance[inner] = np.linalg.inv(((slope * weight[:, None]).T @ slope + precision)[inner])
    return loss, x, covariance


def _mix(found: Sequence[tuple[float, Array, Array]], cells: int) -> list[Mode]:
    """Optima weighted by Laplace's evidence; one found twice counts once."""
    distinct: list[tuple[float, Array, Array]] = []
    for loss, x, covariance in sorted(found, key=lambda one: one[0]):
        if all(np.abs(x[:COUNT] - other[1][:COUNT]).max() > 0.05 for other in distinct):
            distinct.append((loss, x, covariance))
    evidence = np.array([-loss + 0.5 * _log_determinant(covariance) for loss, _, covariance in distinct])
    weights = np.exp(evidence - evidence.max())
    weights /= weights.sum()
    return [
        Mode(x[:COUNT], x[COUNT : COUNT + cells], x[COUNT + cells :], covariance, float(weight))
        for (_, x, covariance), weight in zip(distinct, weights, strict=True)
        if weight > 0.01
    ]


def _log_determinant(covariance: Array) -> float:
    """Of the parameters that were free."""
    free = np.flatnonzero(np.diag(covariance))
    return float(np.linalg.slogdet(covariance[np.ix_(free, free)])[1])
