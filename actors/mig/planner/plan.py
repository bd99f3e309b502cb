"""From a problem to a plan: bound, fast planner, then, where these two differ, the exact one until its time is up."""

from __future__ import annotations

import importlib.util
import time
from typing import Literal

from actors.mig.planner.bound import PriceBound, best_prices, guessed_prices, price_bound
from actors.mig.planner.check import check_plan
from actors.mig.planner.errors import PlannerError
from actors.mig.planner.exact import solve
from actors.mig.planner.heuristic import plan_by_prices
from actors.mig.planner.packing import Cuts, Purchase, lay_out, prune
from actors.mig.planner.problem import Plan, Problem

PRICE_LISTS_TRIED = 8
LEAST_SOLVER_SECONDS = 0.5


def make_plan(problem: Problem, *, seconds: float = 10.0, method: Literal["auto", "heuristic"] = "auto") -> Plan:
    """Plans within about ``seconds``. ``heuristic`` (or a missing scipy) leaves the exact planner out; the bound holds all
    the same.

    Raises:
        PlannerError: the demands do not fit on the GPUs that there are.
    """
    began = time.monotonic()
    solver = importlib.util.find_spec("scipy") is not None
    if solver:
        bounds = best_prices(problem, deadline=began + 0.4 * seconds)
    else:
        guesses = [price_bound(problem, prices) for prices in guessed_prices(problem)]
        bounds = sorted(guesses, key=lambda bound: -bound.value)
    lower, bound_by = bounds[0].gpus, "slice prices"
    limit = sum(problem.available.values()) if set(problem.available) >= set(problem.geometries) else None
    if limit is not None and lower > limit:
        raise PlannerError(f"The demands need at least {lower} GPUs: there are {limit}.")

    purchase, cuts = _fast(problem, bounds)
    found_by = "heuristic"
    use_solver = solver and method == "auto"
    while use_solver and (not cuts or lower < len(cuts)):
        left = began + seconds - time.monotonic()
        most = len(cuts) - 1 if cuts else _enough_gpus(problem)
        answer = solve(problem, lower, most, max(LEAST_SOLVER_SECONDS, left))
        if answer.lower_bound > lower:
            lower, bound_by = answer.lower_bound, "branch and bound"
        if answer.purchase is not None:
            purchase, cuts, found_by = answer.purchase, answer.cuts, "milp"
        if answer.finished and answer.purchase is None and not cuts:
            raise PlannerError(f"The demands do not fit on {_listed(problem)}.")
        if answer.finished or left <= LEAST_SOLVER_SECONDS or answer.purchase is None:
            break
    if not cuts:
        raise PlannerError(f"No plan was found on {_listed(problem)}.")
    cost = {kind: problem.cost(kind) for kind in problem.slices}
    purchase = [prune(load, bought, cost) for load, bought in zip(problem.loads, purchase, strict=True)]
    gpus, segments = lay_out(problem, purchase, cuts)
    plan = Plan(gpus, segments, min(lower, len(gpus)), found_by, bound_by, time.monotonic() - began)
    check_plan(problem, plan)
    return plan


def _fast(problem: Problem, bounds: list[PriceBound]) -> tuple[Purchase, Cuts]:
    """The fast planner's answer; nothing when it cannot keep the limits on GPUs (the exact one may)."""
    try:
        return plan_by_prices(problem, [bound.prices for bound in bounds[:PRICE_LISTS_TRIED]])
    except PlannerError:
        return [], []


def _enough_gpus(problem: Problem) -> int:
    """Certainly enough: as many as there are, or every segment alone."""
    alone = 0
    for load in problem.loads:
        best = max(row.throughput_per_s for row in load.options.values())
        alone += int(load.demand.requests_per_s // best) + 1 if load.divisible else 1
    limited = sum(problem.available.values()) if set(problem.available) >= set(problem.geometries) else alone
    return max(1, min(alone, limited))


def _listed(problem: Problem) -> str:
    return ", ".join(
        f"{problem.available[gpu]} x {gpu}" if gpu in problem.available else gpu for gpu in problem.geometries
    )
