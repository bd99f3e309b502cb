"""The exact planner: a mixed-integer programme over cuts of a GPU, solved by HiGHS (scipy.optimize.milp).

    x_c   how many GPUs are cut by pattern c (undominated multisets of slices: 12 for the base profiles of an A100)
    n_ws  how many slices of kind s run workload w
    min sum_c x_c   subject to   sum_s T_ws n_ws >= R_w,   sum_w n_ws <= sum_c a_cs x_c,   all integer

A job that may not be split takes exactly one slice. Places follow from the patterns (`packing.py`): every pattern is realisable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from actors.mig.planner.packing import Cuts, Purchase, covered
from actors.mig.planner.problem import Problem

ROUNDING = 2e-6
"""HiGHS keeps constraints within 1e-6: a cover that misses by this is asked for again with this much more."""


@dataclass(frozen=True)
class MilpAnswer:
    """What the solver found below ``most`` GPUs: a purchase (None: nothing found) and a proven lower bound."""

    purchase: Purchase | None
    cuts: Cuts
    lower_bound: int
    finished: bool


def solve(problem: Problem, least: int, most: int, seconds: float) -> MilpAnswer:
    """Looks for a plan of ``least`` to ``most`` GPUs.

    If there is none, the answer's ``lower_bound`` is ``most + 1`` and ``finished`` is True.
    """
    answer = _solve(problem, least, most, seconds, 0.0)
    if answer.purchase is not None and not _all_covered(problem, answer.purchase):
        tightened = _solve(problem, least, most, seconds, ROUNDING)
        purchase = tightened.purchase
        if purchase is not None and not _all_covered(problem, purchase):
            purchase = None
        return MilpAnswer(purchase, tightened.cuts, answer.lower_bound, False)
    return answer


def _all_covered(problem: Problem, purchase: Purchase) -> bool:
    return all(covered(load, bought) for load, bought in zip(problem.loads, purchase, strict=True))


def _solve(problem: Problem, least: int, most: int, seconds: float, margin: float) -> MilpAnswer:
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    patterns = problem.patterns
    buys = [(number, kind) for number, load in enumerate(problem.loads) for kind in load.options]
    columns = len(patterns) + len(buys)
    entries: list[tuple[int, int, float]] = []
    low: list[float] = []
    high: list[float] = []

    def row(terms: list[tuple[int, float]], at_least: float, at_most: float) -> None:
        entries.extend((len(low), column, value) for column, value in terms)
        low.append(at_least)
        high.append(at_most)

    for number, load in enumerate(problem.loads):
        mine = [(len(patterns) + index, kind) for index, (owner, kind) in enumerate(buys) if owner == number]
        if load.divisible:
            need = load.demand.requests_per_s
            # Divided by the demand, so that the solver's tolerance is a share of it.
            row([(column, load.options[kind].throughput_per_s / need) for column, kind in mine], 1.0 + margin, np.inf)
        else:
            row([(column, 1.0) for column, _ in mine], 1.0, 1.0)
    for kind in problem.slices:
        terms: list[tuple[int, float]] = [
            (column, float(names.count(kind[1])))
            for column, (gpu, names) in enumerate(patterns)
            if gpu == kind[0] and kind[1] in names
        ]
        terms += [(len(patterns) + index, -1.0) for index, (_, bought) in enumerate(buys) if bought == kind]
        row(terms, 0.0, np.inf)
    row([(column, 1.0) for column in range(len(patterns))], float(least), float(most))
    for model, count in problem.available.items():
        row([(column, 1.0) for column, (gpu, _) in enumerate(patterns) if gpu == model], 0.0, float(count))

    data, row_of, column_of = [e[2] for e in entries], [e[0] for e in entries], [e[1] for e in entries]
    matrix = coo_matrix((data, (row_of, column_of)), shape=(len(low), columns)).tocsr()
    upper = [float(most)] * len(patterns)
    for number, kind in buys:
        load = problem.loads[number]
        enough = (
            math.ceil(load.demand.requests_per_s / load.options[kind].throughput_per_s * (1 + ROUNDING))
            if load.divisible
            else 1
        )
        upper.append(float(enough))
    objective = np.concatenate([np.ones(len(patterns)), np.zeros(len(buys))])
    result = milp(
        objective,
        constraints=LinearConstraint(matrix, np.array(low), np.array(high)),
        integrality=np.ones(columns),
        bounds=Bounds(np.zeros(columns), np.array(upper)),
        options={"time_limit": max(0.1, seconds), "mip_rel_gap": 0.0},
    )
    if result.status == 2:
        return MilpAnswer(None, [], most + 1, True)
    dual = result.mip_dual_bound
    bound = least if dual is None or not math.isfinite(dual) else max(least, math.ceil(dual - 1e-5))
    if result.x is None:
        return MilpAnswer(None, [], min(bound, most + 1), False)
    counts = [round(value) for value in result.x]
    cuts: Cuts = [pattern for pattern, count in zip(patterns, counts, strict=False) for _ in range(count)]
    purchase: list[dict[tuple[str, str], int]] = [{} for _ in problem.loads]
    for (number, kind), count in zip(buys, counts[len(patterns) :], strict=True):
        if count:
            purchase[number][kind] = count
    return MilpAnswer(purchase, cuts, min(bound, len(cuts)), result.status == 0)
