"""The choice of the next trial: all in turn, or those that may still be the best by what the predictor makes of the done ones.

A trial begins with a short look (the first rung); it is measured in full only if it may be the best, and the winner always is.
A *question* is one workload under one load: which profile and batch give the device most? After a few cheap trials the
predictor says, for each open point, what to expect and how sure that is. A question is closed when no open point is likely to
beat the best measured one by more than ``regret``; of the open ones the one with the most to win for its cost is next. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from actors.mig.prediction import Measurement, Slice
from actors.mig.prediction.fit import Population
from actors.mig.prediction.law import make_points
from actors.mig.prediction.memory import ALARM
from actors.mig.prediction.predictor import Group, predict_group
from actors.mig.prediction.shipped import POPULATION
from apps.migperf.sweep.layouts import Layout
from apps.migperf.sweep.trial import FULL, TrialPoint, TrialResult, objective


@dataclass(frozen=True)
class Candidate:
    """A point with what its slice is and how many of them the device holds."""

    point: TrialPoint
    part: Slice
    most: int
    layout: Layout = ()


@dataclass(frozen=True)
class Costs:
    """Benchmark seconds: of a trial's start, of measuring (``steps`` batches, at least ``window_s``), of a re-partition."""

    start_s: float = 3.0
    window_s: float = 2.0
    steps: int = 0
    repartition_s: float = 5.0
    first_rung: float = 0.2
    """The share of a full measurement that the first look takes."""

    def measuring_s(self, latency_ms: float) -> float:
        """Of a full measurement, without the start."""
        return max(self.window_s, self.steps * latency_ms / 1e3)

    def look_s(self, latency_ms: float) -> float:
        """Of a start and the first rung."""
        return self.start_s + self.first_rung * self.measuring_s(latency_ms)


@dataclass(frozen=True)
class Choice:
    """The next trial and why."""

    candidate: Candidate
    why: str
    full: bool = False
    """Measure in full whatever the first look says."""


@dataclass
class Search:
    """``next`` is asked, results are told with ``tell``. ``guided`` False: every point, in the order of layouts."""

    candidates: Sequence[Candidate]
    costs: Costs = field(default_factory=Costs)
    guided: bool = True
    regret: float = 0.02
    doubt: float = 0.2
    """A point is given up when it beats the best by more than the regret with a smaller probability than this."""
    latency_limit_ms: float | None = None
    population: Population = POPULATION

    def __post_init__(self) -> None:
        self.done: dict[str, TrialResult] = {}
        self.pruned: dict[str, str] = {}
        """Keys of points that were never measured, with the reason."""
        self.short: set[str] = set()
        """Keys of points that had a first look alone."""
        self._forecast_of: object = None
        self._forecasts: Mapping[str, tuple[float, float, float]] = {}
        self._expected: dict[tuple[object, ...], float] = {}
        self._questions: dict[tuple[object, ...], list[Candidate]] = {}
        for candidate in self.candidates:
            self._questions.setdefault(candidate.point.question, []).append(candidate)

    def tell(self, result: TrialResult) -> None:
        """A trial ended, however; the status ``stopped`` is that of a first look."""
        self.done[result.point.key] = result
        (self.short.add if result.status == "stopped" else self.short.discard)(result.point.key)

    def goes_on(self, look: TrialResult) -> bool:
        """Whether a trial whose first look this is shall be measured in full: it may be the best of its question."""
        if not self.guided:
            return True
        candidate = next(c for c in self.candidates if c.point.key == look.point.key)
        question = look.point.question
        before = self.best(question)
        bar = max(before[1] if before else 0.0, self._expected.get(question, 0.0))
        return bar > 0 and objective(look, candidate.most, self.latency_limit_ms) >= bar * (1 - self.regret)

    def next(self, held: Layout = ()) -> Choice | None:
        """The next trial, with as few changes of the layout ``held`` as possible; None when every question is closed."""
        open_ = [c for c in self.candidates if c.point.key not in self.done and c.point.key not in self.pruned]
        if not open_ and not (self.guided and self.short):
            return None
        if not self.guided:
            here = [c for c in open_ if c.layout == held]
            return Choice((here or open_)[0], "every point is measured")
        found = [choice for members in self._questions.values() if (choice := self._ask(members, held)) is not None]
        return max(found, key=lambda one: (one.candidate.layout == held, -one.candidate.point.batch)) if found else None

    def best(self, question: tuple[object, ...]) -> tuple[Candidate, float] | None:
        """The best measured point of a question, with its objective; None before one ran."""
        found = [
            (candidate, self._objective(candidate))
            for candidate in self._questions[question]
            if candidate.point.key in self.done
        ]
        found = [pair for pair in found if pair[1] > 0]
        return max(found, key=lambda pair: pair[1]) if found else None

    @property
    def questions(self) -> tuple[tuple[object, ...], ...]:
        return tuple(self._questions)

    # ---- the inside

    def _objective(self, candidate: Candidate) -> float:
        return objective(self.done[candidate.point.key], candidate.most, self.latency_limit_ms)

    def _ask(self, members: list[Candidate], held: Layout) -> Choice | None:
        open_ = [c for c in members if c.point.key not in self.done and c.point.key not in self.pruned]
        chosen = self._explore(members, open_, held) if open_ else None
        if chosen is not None:
            return chosen
        best = self.best(members[0].point.question)
        if best is not None and best[0].point.key in self.short:
            return Choice(best[0], "the best by a first look, measured in full", full=True)
        return None

    def _explore(self, members: list[Candidate], open_: list[Candidate], held: Layout) -> Choice | None:
        measured = [c for c in members if _ran(self.done.get(c.point.key))]
        seed = self._seed(members, open_, measured)
        if seed is not None:
            return seed
        forecast = self._forecast(members)
        best = max((self._objective(c) for c in members if c.point.key in self.done), default=0.0)
        rivals: list[tuple[float, Candidate, float]] = []
        for candidate in open_:
            mean_ms, sd_log, out = forecast[candidate.point.key]
            if out >= max(ALARM, 0.5):
                self.pruned[candidate.point.key] = f"runs out of memory with probability {out:.2f}"
                continue
            gain, chance = self._promise(candidate, mean_ms, sd_log, best)
            if chance < self.doubt:
                self.pruned[candidate.point.key] = f"beats the best by {self.regret:.0%} with probability {chance:.3f}"
                continue
            cost = self.costs.look_s(mean_ms) + (self.costs.repartition_s if candidate.layout != held else 0.0)
            rivals.append((gain * (1 - out) / cost, candidate, chance))
        if not rivals:
            return None
        _, chosen, chance = max(rivals, key=lambda one: one[0])
        self._expected[chosen.point.question] = max(
            c.most * c.point.batch / forecast[c.point.key][0] * 1e3 for _, c, _ in rivals
        )
        return Choice(chosen, f"may beat the best by {self.regret:.0%} with probability {chance:.2f}")

    def _seed(self, members: list[Candidate], open_: list[Candidate], measured: list[Candidate]) -> Choice | None:
        """Before anything can be predicted: the smallest batch on the largest slice, then a middle batch there, then the
        smallest batch on the smallest slice. A seed that runs out of memory is replaced by its smaller neighbour."""
        related = [c for c in self.candidates if _family(c.point) == _family(members[0].point)]
        known = [c for c in related if _ran(self.done.get(c.point.key))]
        batches = sorted({c.point.batch for c in members})
        if not known:
            largest = max(c.part.sm_share for c in open_)
            first = min((c for c in open_ if c.part.sm_share == largest), key=lambda c: c.point.batch)
            return Choice(first, "the first look: the largest slice, the smallest batch")
        if len({c.point.batch for c in known}) == 1 and len(batches) > 2:
            largest = max(c.part.sm_share for c in open_)
            wanted = batches[len(batches) // 2]
            there = [c for c in open_ if c.part.sm_share == largest and c.point.batch <= wanted]
            if there and len(measured) < 3:
                return Choice(max(there, key=lambda c: c.point.batch), "a second batch on the largest slice")
        if len({c.part.sm_share for c in known}) == 1 and len({c.part.sm_share for c in members}) > 1:
            smallest = min(c.part.sm_share for c in open_)
            there = [c for c in open_ if c.part.sm_share == smallest]
            return Choice(min(there, key=lambda c: c.point.batch), "a second slice: the smallest")
        return None

    def _promise(self, candidate: Candidate, mean_ms: float, sd_log: float, best: float) -> tuple[float, float]:
        """(expected gain over the best in log units, probability of beating it by more than the regret)."""
        batch = candidate.point.batch
        if self.latency_limit_ms is not None and self._over_limit(mean_ms * math.exp(-1.64 * sd_log)):
            return 0.0, 0.0
        if best <= 0:
            return 1.0 + batch / 1e6, 1.0
        ahead = math.log(candidate.most * batch / mean_ms * 1e3) - math.log(best)
        chance = _above((ahead - math.log1p(self.regret)) / sd_log)
        z = ahead / sd_log
        gain = sd_log * (z * _above(z) + math.exp(-z * z / 2) / math.sqrt(2 * math.pi))
        return gain, chance

    def _over_limit(self, mean_ms: float) -> bool:
        """Tails are longer than means: by the smallest ratio that was seen."""
        ratios = [
            r.latency_p99_ms / r.latency_mean_ms
            for r in self.done.values()
            if _ran(r) and r.latency_p99_ms and r.latency_mean_ms
        ]
        return mean_ms * max(1.0, min(ratios, default=1.0)) > (self.latency_limit_ms or math.inf)

    def _forecast(self, members: list[Candidate]) -> Mapping[str, tuple[float, float, float]]:
        """For each point: predicted latency (ms), its standard deviation (of the logarithm), probability of no memory."""
        family = _family(members[0].point)
        related = [c for c in self.candidates if _family(c.point) == family]
        state = (family, tuple(sorted(c.point.key for c in related if c.point.key in self.done)), len(self.short))
        if state == self._forecast_of:
            return self._forecasts  # the questions of one family are asked one after another
        rows = [_measurement(c, self.done.get(c.point.key)) for c in related]
        predictions = predict_group(make_group_of_slices(rows, [c.part for c in related]), self.population)
        self._forecast_of = state
        self._forecasts = {
            c.point.key: (
                p.latency_ms,
                max(math.log(p.high_ms / p.low_ms) / (2 * 1.645 * self.population.interval_scale), 1e-3),
                p.oom_probability,
            )
            for c, p in zip(related, predictions, strict=True)
        }
        return self._forecasts


def _ran(result: TrialResult | None) -> bool:
    return result is not None and result.status in ("ok", "stopped")


def _family(point: TrialPoint) -> tuple[object, ...]:
    """Points whose latencies explain each other."""
    return (point.backend, point.device, point.workload, point.mode, point.rate_per_s, point.scale, point.corun)


def _measurement(candidate: Candidate, result: TrialResult | None) -> Measurement:
    point = candidate.point
    known = _ran(result)
    return Measurement(
        gpu=point.device,
        mode=point.mode,
        workload=point.workload,
        profile=point.profile,
        batch=point.batch,
        sequence=point.sequence,
        latency_ms=result.latency_mean_ms if known and result else None,
        latency_std_ms=None,
        fb_mib=result.memory_mib if known and result else None,
        oom=None if result is None or result.status == "failed" else result.status == "oom",
    )


def make_group_of_slices(rows: Sequence[Measurement], slices: Sequence[Slice]) -> Group:
    """The predictor's group of one workload, for slices that no MIG table knows (CPU shares, green contexts)."""
    points, cells, distinct = make_points(
        [(row.batch, row.sequence, row.processes, part) for row, part in zip(rows, slices, strict=True)]
    )
    known = np.array([n for n, row in enumerate(rows) if row.latency_ms is not None], dtype=np.int64)
    latency = np.array([rows[n].latency_ms for n in known], dtype=float)
    return Group(tuple(rows), tuple(slices), points, cells, len(distinct), known, np.log(latency), np.zeros(len(known)))


def _above(z: float) -> float:
    """Probability of a standard normal above -z."""
    return 0.5 * math.erfc(-z / math.sqrt(2))


def is_baseline(point: TrialPoint) -> bool:
    """The whole device without slices: measured for comparison, and a configuration like the others."""
    return point.profile == FULL
