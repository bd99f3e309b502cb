"""Nested leave-one-out: the predictor's hyper-parameters chosen, and its intervals scaled, without the family that is tested.

For each family f: every setting of the grid is scored on all other families g, each with a prior that has seen
neither f nor g; the best setting, with the interval scale that those scores want, then predicts f. So nothing of f
has touched anything that predicts it, except the form of the law itself, which was written by people who had seen all
the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from actors.mig.prediction.fit import Population
from actors.mig.prediction.prior import WEAK
from benchmarks.migperf.leave_out import SOURCES, Case, Score, learn_without, mape, score

GRID = (
    WEAK,
    dataclasses.replace(WEAK, noise=0.045, cell_deviation=0.06),
    dataclasses.replace(WEAK, noise=0.025, cell_deviation=0.12, slice_deviation=0.04, degrees=4.0),
)
"""Settings to choose from: as shipped, a stiffer law with noisier measurements, a softer law with better ones."""
_SCALE_90 = 1.645


@dataclass(frozen=True)
class Nested:
    """Scores of every case by protocol, and what was chosen for each family."""

    scores: dict[str, list[Score]]
    chosen: dict[str, Population]


def nested(
    cases: Sequence[Case], protocols: Sequence[str], grid: Sequence[Population] = GRID,
    say: Callable[[str], None] = lambda _: None,
) -> Nested:  # fmt: skip
    """Runs it; one setting in ``grid`` leaves only the interval scale to be chosen."""
    families = sorted({case.family for case in cases})
    priors: dict[tuple[int, frozenset[str]], Population] = {}

    def prior(setting: int, without: frozenset[str]) -> Population:
        key = (setting, without)
        if key not in priors:
            priors[key] = learn_without(cases, sorted(without), grid[setting])
        return priors[key]

    scores: dict[str, list[Score]] = {protocol: [] for protocol in protocols}
    chosen = {}
    for number, family in enumerate(families):
        say(f"nested leave-one-out {number + 1}/{len(families)}: without {family}")
        best: tuple[float, int, float] | None = None
        for setting in range(len(grid)):
            inner = [
                one
                for case in cases
                if case.family != family
                for protocol in protocols
                if (one := score(case, protocol, prior(setting, frozenset((family, case.family))))) is not None
            ]
            loss = float(np.mean([mape(inner, source) for source in SOURCES if _has(inner, source)]))
            if best is None or loss < best[0]:
                best = (loss, setting, interval_scale(inner))
        if best is None:
            raise ValueError("The grid is empty.")
        chosen[family] = dataclasses.replace(prior(best[1], frozenset((family,))), interval_scale=best[2])
        for protocol in protocols:
            found = [score(case, protocol, chosen[family]) for case in cases if case.family == family]
            scores[protocol] += [one for one in found if one is not None]
    return Nested(scores, chosen)


def interval_scale(scores: Sequence[Score]) -> float:
    """Factor on the intervals with which nine of ten rows would have lain inside, every case counting the same."""
    z = np.concatenate([np.abs(one.z) for one in scores])
    weight = np.concatenate([np.full(len(one.z), 1 / len(one.z)) for one in scores])
    order = np.argsort(z)
    share = np.cumsum(weight[order]) / weight.sum()
    return float(z[order][min(np.searchsorted(share, 0.9), len(z) - 1)] / _SCALE_90)


def _has(scores: Sequence[Score], source: str) -> bool:
    return any(one.case.source == source for one in scores)
