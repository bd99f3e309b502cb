"""A sweep replayed on published measurements: what would the search have cost, and would it have found the best?"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.mig.backends.simulated import SimBackend
from actors.mig.geometry import gpu_geometry
from actors.mig.prediction import Measurement, parse_slice
from apps.migperf.sweep.layouts import Layout, cover
from apps.migperf.sweep.search import Candidate, Costs, Search
from apps.migperf.sweep.trial import TrialPoint, TrialResult, objective


@dataclass(frozen=True)
class Replayed:
    """One workload on one GPU: all its questions."""

    gpu: str
    mode: str
    workload: str
    cells: int
    trials: int
    full_trials: int
    repartitions: int
    cost_s: float
    grid_cost_s: float
    """Of measuring every cell in full, in the order of layouts."""
    regrets: tuple[float, ...]
    """Of each question: 1 - true objective of what was found / of the true best."""

    @property
    def cost_fraction(self) -> float:
        return self.cost_s / self.grid_cost_s


def replay(rows: Sequence[Measurement], costs: Costs, seed: int = 0, regret: float = 0.02) -> Replayed:
    """Replays the rows of one GPU, mode and workload. A first look sees the mean of fewer batches: the published spread over
    the root of their number is its noise."""
    gpu, mode, workload = rows[0].group
    backend, geometry = SimBackend(gpu), gpu_geometry(gpu)
    there = {row.profile for row in rows}
    layouts = cover([profile.name for profile in backend.profiles() if profile.name in there], backend.fits)
    truth: dict[str, TrialResult] = {}
    spread: dict[str, float] = {}
    candidates = []
    for row in rows:
        point = TrialPoint(
            "sim", gpu, row.profile, workload, "train" if mode == "train" else "infer", row.batch, row.sequence
        )
        layout = next(layout for layout in layouts if row.profile in layout)
        most = geometry.profile(row.profile).max_instances
        candidates.append(Candidate(point, parse_slice(gpu, row.profile), most, layout))
        out = bool(row.oom) or not row.latency_ms
        speed = None if out or not row.latency_ms else row.batch / row.latency_ms * 1e3
        latency = None if out else row.latency_ms
        truth[point.key] = TrialResult(
            point, "oom" if out else "ok", latency_mean_ms=latency, throughput_per_s=speed, memory_mib=row.fb_mib
        )
        spread[point.key] = min((row.latency_std_ms or 0.0) / row.latency_ms, 1.0) if row.latency_ms else 0.0
    search = Search(candidates, costs, regret=regret)
    rng = random.Random(seed)
    steps = max(1.0, costs.first_rung * costs.steps)
    cost_s, held, cuts, full, trials = 0.0, (), 0, 0, 0
    while (choice := search.next(held)) is not None:
        layout: Layout = choice.candidate.layout
        if layout != held:
            held, cuts, cost_s = layout, cuts + 1, cost_s + costs.repartition_s
        result = truth[choice.candidate.point.key]
        latency = result.latency_mean_ms or 0.0
        trials, cost_s = trials + 1, cost_s + costs.look_s(latency)
        if result.status == "ok":
            seen_ms = latency * max(0.5, 1 + rng.gauss(0, 1) * spread[result.point.key] / steps**0.5)
            look = dataclasses.replace(
                result, status="stopped", latency_mean_ms=seen_ms, throughput_per_s=result.point.batch / seen_ms * 1e3
            )
            if choice.full or search.goes_on(look):
                cost_s, full = cost_s + (1 - costs.first_rung) * costs.measuring_s(latency), full + 1
            else:
                result = look
        search.tell(result)
    grid = sum(costs.start_s + costs.measuring_s(truth[c.point.key].latency_mean_ms or 0.0) for c in candidates)
    grid += costs.repartition_s * len(layouts)
    regrets = tuple(_regret(search, question, truth) for question in search.questions)
    return Replayed(gpu, mode, workload, len(candidates), trials, full, cuts, cost_s, grid, regrets)


def _regret(search: Search, question: tuple[object, ...], truth: Mapping[str, TrialResult]) -> float:
    members = [c for c in search.candidates if c.point.question == question]
    best = max(objective(truth[c.point.key], c.most) for c in members)
    found = search.best(question)
    if best <= 0:
        return 0.0
    return 1.0 if found is None else 1 - objective(truth[found[0].point.key], found[0].most) / best
