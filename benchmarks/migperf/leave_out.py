"""Leave-one-workload-out evaluation of the slice predictor on the published measurements, with its baselines.

A fold leaves out a family: all workloads that are variants of one network (v1 and v2 of a model, ResNet-50 and -152,
BERT under three names), in all three sources, so that no copy of the tested workload is in its prior. Of the tested
workload the predictor sees the rows of the whole GPU (7g) and of one more slice, the same for all; every other
measured row is predicted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actors.mig.prediction import Measurement
from actors.mig.prediction.fit import Population
from actors.mig.prediction.predictor import Group, make_group, predict_group
from actors.mig.prediction.prior import WEAK, learn
from apps.migperf.measurements import read_table

SOURCES = ("migprofiler", "parvagpu", "miso")
PROTOCOLS: dict[str, tuple[str, ...]] = {
    "7g": ("7g",),
    "7g+1g": ("7g", "1g"),
    "7g+2g": ("7g", "2g"),
    "7g+3g": ("7g", "3g"),
}
FAMILIES = {
    "bert": "bert", "bert-base-multilingual-cased": "bert", "paraphrase-multilingual-mpnet-base-v2": "bert",
    "distiluse-base-multilingual-cased-v1": "distiluse", "distiluse-base-multilingual-cased-v2": "distiluse",
    "resnet": "resnet", "resnet50": "resnet", "resnet152": "resnet", "resnet50_moco": "resnet",
    "densenet121": "densenet", "densenet201": "densenet",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One workload of one source."""

    source: str
    family: str
    group: Group


@dataclass(frozen=True)
class Score:
    """What was predicted of one case: relative errors, whether intervals held, and memory."""

    case: Case
    error: NDArray[np.float64]
    inside: NDArray[np.bool_]
    log_width: NDArray[np.float64]
    """ln(high / low)."""
    z: NDArray[np.float64]
    """ln(measured / predicted) over the interval's half width / 1.645."""
    oom_hits: int = 0
    oom_cells: int = 0
    false_alarms: int = 0
    feasible: int = 0


def load_cases(folder: Path) -> list[Case]:
    """All workloads of the three files."""
    cases = []
    for source in SOURCES:
        groups: dict[tuple[str, str, str], list[Measurement]] = {}
        for row in read_table(folder / f"{source}.csv").rows:
            groups.setdefault(row.group, []).append(row)
        for key, rows in groups.items():
            cases.append(Case(source, FAMILIES.get(key[2], key[2]), make_group(rows)))
    return cases


def learn_without(cases: Sequence[Case], families: Sequence[str], start: Population = WEAK) -> Population:
    """The prior from all cases that are of none of these families."""
    return learn([one.group.teaching(one.family) for one in cases if one.family not in families], start)


def hide(case: Case, protocol: str) -> tuple[list[Measurement], NDArray[np.bool_]]:
    """The rows with everything hidden that the protocol does not give, and which were given."""
    slices = PROTOCOLS[protocol]
    given = np.array([row.profile.startswith(slices) for row in case.group.rows])
    rows = [row if seen else _question(row) for row, seen in zip(case.group.rows, given, strict=True)]
    return rows, given


def _question(row: Measurement) -> Measurement:
    """The row without anything that was measured."""
    return dataclasses.replace(row, latency_ms=None, latency_std_ms=None, gract=None, fb_mib=None, oom=None)


def score(case: Case, protocol: str, population: Population) -> Score | None:
    """The predictor on one case; None where the protocol hides nothing."""
    rows, given = hide(case, protocol)
    if given.all():
        return None
    found = predict_group(make_group(rows), population)
    truth = case.group.rows
    hidden = [n for n in range(len(truth)) if not given[n]]
    timed = [n for n in hidden if truth[n].latency_ms is not None]
    measured = np.array([truth[n].latency_ms for n in timed], dtype=float)
    middle, low, high = np.array([[found[n].latency_ms, found[n].low_ms, found[n].high_ms] for n in timed]).T
    cells = [n for n in hidden if truth[n].oom]
    feasible = [n for n in hidden if not truth[n].oom]
    return Score(
        case,
        np.abs(middle / measured - 1),
        (low <= measured) & (measured <= high),
        np.log(high / low),
        np.log(measured / middle) / (np.log(high / low) / 2 / 1.645),
        oom_hits=sum(found[n].oom for n in cells),
        oom_cells=len(cells),
        false_alarms=sum(found[n].oom for n in feasible),
        feasible=len(feasible),
    )


def leave_one_out(
    cases: Sequence[Case], protocols: Sequence[str], priors: Mapping[str, Population]
) -> dict[str, list[Score]]:
    """Scores of every case under every protocol, each with the prior of its family's fold."""
    found: dict[str, list[Score]] = {}
    for protocol in protocols:
        scores = [score(case, protocol, priors[case.family]) for case in cases]
        found[protocol] = [one for one in scores if one is not None]
    return found


def mape(scores: Sequence[Score], source: str | None = None) -> float:
    """Mean absolute percentage error over all predicted rows of a source, per cent."""
    return float(100 * np.mean(np.concatenate([one.error for one in scores if source in (None, one.case.source)])))


def coverage(scores: Sequence[Score], source: str | None = None) -> float:
    """Share of the predicted rows that lie in their 90 % interval."""
    return float(np.mean(np.concatenate([one.inside for one in scores if source in (None, one.case.source)])))


# ---- baselines: predict from the same given rows, without a prior


def power_law(case: Case, protocol: str) -> NDArray[np.float64]:
    """Errors of T = c sm_share^-a through the 7g row and the given slice's row at the same batch; linear where only
    7g is given."""
    return _baseline(case, protocol, _through_two)


def linear_scaling(case: Case, protocol: str) -> NDArray[np.float64]:
    """Errors of T = T(7g) * SMs(7g) / SMs(slice)."""
    return _baseline(case, protocol, lambda known, share: known[-1][1] * known[-1][0] / share)


def nearest(case: Case, protocol: str) -> NDArray[np.float64]:
    """Errors of taking the latency of the given slice nearest in SMs, at the same batch."""
    return _baseline(case, protocol, lambda known, share: min(known, key=lambda one: abs(np.log(one[0] / share)))[1])


Curve = Callable[[list[tuple[float, float]], float], float]


def _through_two(known: list[tuple[float, float]], share: float) -> float:
    (small, slow), (large, fast) = known[0], known[-1]
    exponent = np.log(slow / fast) / np.log(large / small) if len(known) > 1 else 1.0
    return float(fast * (large / share) ** exponent)


def _baseline(case: Case, protocol: str, curve: Curve) -> NDArray[np.float64]:
    """Errors of a curve through (sm_share, latency) of the rows given at the same batch, sequence and processes."""
    rows, given = hide(case, protocol)
    known: dict[tuple[int, int | None, int], list[tuple[float, float]]] = {}
    for row, part, seen in zip(rows, case.group.slices, given, strict=True):
        if seen and row.latency_ms is not None:
            known.setdefault((row.batch, row.sequence, row.processes), []).append((part.sm_share, row.latency_ms))
    errors = []
    for row, part, seen in zip(case.group.rows, case.group.slices, given, strict=True):
        if not seen and row.latency_ms is not None:
            here = sorted(known.get((row.batch, row.sequence, row.processes), []))
            if here:
                errors.append(abs(curve(here, part.sm_share) / row.latency_ms - 1))
    return np.array(errors)
