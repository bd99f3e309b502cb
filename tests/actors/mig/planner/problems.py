"""Small problems, and their optimum by exhaustion: no solver, no pruning, only the definition."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

from actors.mig.geometry import gpu_geometry, layouts_by_multiset
from actors.mig.planner import Demand, Measurement, Problem, pose

GPU = "A100-80GB"
GEOMETRIES = {GPU: gpu_geometry(GPU)}


def rows_of(workload: str, rates: dict[str, float], latency_ms: float = 10.0, mode: str = "infer") -> list[Measurement]:
    return [Measurement(workload, GPU, profile, 8, 1, latency_ms, rate, mode) for profile, rate in rates.items()]


def problem_of(loads: dict[str, tuple[float, dict[str, float]]], training: tuple[str, ...] = (), **options) -> Problem:
    """{workload: (demand, {profile: throughput})}."""
    rows, demands = [], []
    for name, (rate, rates) in loads.items():
        mode = "train" if name in training else "infer"
        rows += rows_of(name, rates, mode=mode)
        demands.append(Demand(name, rate, math.inf if mode == "train" else 100.0, mode))
    return pose(rows, demands, GEOMETRIES, **options)


def small_problem(rng: random.Random, loads: int = 3) -> Problem:
    """Up to three loads on 2g, 3g, 4g and 7g, of one to four GPUs."""
    given = {}
    for number in range(rng.randint(2, loads)):
        base, power = rng.uniform(5, 20), rng.uniform(0.6, 1.1)
        rates = {
            name: round(base * slices**power * rng.uniform(0.9, 1.1), 1)
            for name, slices in (("2g.20gb", 2), ("3g.40gb", 3), ("4g.40gb", 4), ("7g.80gb", 7))
        }
        given[f"net{number}"] = (round(base * rng.uniform(1, 9), 1), rates)
    return problem_of(given)


def exhaustive_fewest_gpus(problem: Problem, most: int) -> int:
    """Tries every multiset of cuts of 1, 2, ... GPUs and every way to hand out their slices."""
    names = {profile for _, profile in problem.slices}
    layouts = [Counter(names_of) for names_of in layouts_by_multiset(GEOMETRIES[GPU].restricted(names))]
    cuts = [one for one in layouts if not any(one < other for other in layouts)]
    for count in range(1, most + 1):
        for chosen in itertools.combinations_with_replacement(cuts, count):
            if _serves(problem, 0, sum(chosen, Counter())):
                return count
    raise AssertionError(f"more than {most} GPUs are needed")


def _serves(problem: Problem, number: int, left: Counter) -> bool:
    if number == len(problem.loads):
        return True
    load = problem.loads[number]
    kinds = sorted(load.options)
    for counts in itertools.product(*[range(left[profile] + 1) for _, profile in kinds]):
        served = sum(load.options[kind].throughput_per_s * count for kind, count in zip(kinds, counts, strict=True))
        enough = served >= load.demand.requests_per_s if load.divisible else sum(counts) == 1
        if enough and _serves(
            problem, number + 1, left - Counter({p: c for (_, p), c in zip(kinds, counts, strict=True)})
        ):
            return True
    return False
