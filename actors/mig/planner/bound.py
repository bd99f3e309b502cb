"""Certified lower bounds: slice prices that no GPU's cut can exceed, and what every demand must then pay at least.

Give each slice kind a price so that the slices of any legal cut of one GPU cost at most 1. A demand must buy a cover, so it
pays at least the cheapest one (`cover.py`); the sum over demands is a lower bound on GPUs, whatever the prices. `price_bound`
checks this in integers: its answer needs no trust in a solver. `best_prices` finds the prices that make the bound largest:
the dual of the Dantzig-Wolfe master problem, solved by column generation (Gilmore & Gomory's method for cutting stock).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from actors.mig.planner.cover import cheapest_cover
from actors.mig.planner.problem import Load, Problem, SliceKind

PRICE_UNIT = 10**9
"""Prices are integers in units of a billionth of a GPU."""
RATE_UNIT = 10**6
"""Rates are integers in millionths of a request per second; throughputs are rounded up and needs down, so the bound stays
valid."""


@dataclass(frozen=True)
class PriceBound:
    """Prices (billionths of a GPU) and the bound that they prove; ``gpus`` is its ceiling."""

    prices: Mapping[SliceKind, int]
    value: Fraction

    @property
    def gpus(self) -> int:
        return max(1, -(-self.value.numerator // self.value.denominator))


def price_bound(problem: Problem, prices: Mapping[SliceKind, int]) -> PriceBound:
    """The bound that these prices prove. Any prices >= 0 prove one; they are scaled to the dearest cut of a GPU.

    Where GPU models are limited in number the bound stays valid (a limit can only ask for more GPUs).
    """
    dearest = max(sum(prices[gpu, name] for name in names) for gpu, names in problem.patterns)
    if dearest <= 0:
        return PriceBound(dict(prices), Fraction(0))
    total = sum(cover(load, prices)[0] for load in problem.loads)
    return PriceBound(dict(prices), Fraction(total, dearest))


def cover(load: Load, prices: Mapping[SliceKind, int]) -> tuple[int, dict[SliceKind, int]]:
    """The least that a demand pays at these prices, and for which slices."""
    if not load.divisible:
        kind = min(load.options, key=lambda kind: (prices[kind], kind))
        return prices[kind], {kind: 1}
    sizes = {kind: _up(row.throughput_per_s) for kind, row in load.options.items()}
    return cheapest_cover(max(1, int(load.demand.requests_per_s * RATE_UNIT)), sizes, {k: prices[k] for k in sizes})


def guessed_prices(problem: Problem) -> list[dict[SliceKind, int]]:
    """Prices that need no solver: shares of compute, of memory, and the larger of both."""
    found = []
    for weigh in range(3):
        prices = {}
        for kind in problem.slices:
            geometry = problem.geometries[kind[0]]
            profile = geometry.profile(kind[1])
            compute = Fraction(profile.compute_slices, geometry.compute_slices)
            memory = Fraction(profile.memory_slices, geometry.memory_slices)
            prices[kind] = int((compute, memory, max(compute, memory))[weigh] * PRICE_UNIT)
        found.append(prices)
    return found


def best_prices(problem: Problem, deadline: float, rounds: int = 200) -> list[PriceBound]:
    """Bounds found by column generation, the best first; needs scipy, and ends at ``deadline`` (time.monotonic).

    The prices of the rounds on the way are kept too: the heuristic tries them.
    """
    found = [price_bound(problem, prices) for prices in guessed_prices(problem)]
    columns: list[list[Counter[SliceKind]]] = [[] for _ in problem.loads]
    for bound in found:
        _add_columns(problem, bound.prices, columns)
    for _ in range(rounds):
        if time.monotonic() > deadline:
            break
        prices = _master_prices(problem, columns)
        if prices is None:
            break
        found.append(price_bound(problem, prices))
        if not _add_columns(problem, prices, columns):
            break
    return sorted(found, key=lambda bound: -bound.value)


def _add_columns(problem: Problem, prices: Mapping[SliceKind, int], columns: list[list[Counter[SliceKind]]]) -> bool:
    """Adds for every demand its cheapest cover at these prices; whether any is new."""
    fresh = False
    for load, known in zip(problem.loads, columns, strict=True):
        bought = Counter(cover(load, prices)[1])
        if bought not in known:
            known.append(bought)
            fresh = True
    return fresh


def _master_prices(problem: Problem, columns: list[list[Counter[SliceKind]]]) -> dict[SliceKind, int] | None:
    """Prices that make the sum of the cheapest known covers largest: max sum_w v_w, v_w <= price of each cover, cuts <= 1."""
    import numpy as np
    from scipy.optimize import linprog

    kinds = {kind: number for number, kind in enumerate(problem.slices)}
    loads = len(columns)
    rows, right = [], []
    for number, known in enumerate(columns):
        for bought in known:
            row = np.zeros(len(kinds) + loads)
            row[len(kinds) + number] = 1.0
            for kind, count in bought.items():
                row[kinds[kind]] = -count
            rows.append(row)
            right.append(0.0)
    for gpu, names in problem.patterns:
        row = np.zeros(len(kinds) + loads)
        for name in names:
            row[kinds[gpu, name]] += 1.0
        rows.append(row)
        right.append(1.0)
    objective = np.concatenate([np.zeros(len(kinds)), -np.ones(loads)])
    answer = linprog(objective, A_ub=np.array(rows), b_ub=np.array(right), bounds=(0, None), method="highs")
    if answer.status != 0:
        return None
    return {kind: max(0, round(float(answer.x[number]) * PRICE_UNIT)) for kind, number in kinds.items()}


def _up(throughput: float) -> int:
    return -int(-throughput * RATE_UNIT // 1)
