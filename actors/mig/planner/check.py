"""Checks a plan from the outside: legal places, slices as measured, limits kept, demands covered, bound not above the plan.

Every plan passes through here before it leaves the planner, so that a mistake of a solver is an error and no plan.
"""

from __future__ import annotations

from collections import Counter

from actors.mig.geometry import GeometryError, GpuState
from actors.mig.planner.errors import PlannerError
from actors.mig.planner.problem import Plan, Problem


def check_plan(problem: Problem, plan: Plan) -> None:
    """
    Raises:
        PlannerError: what is wrong with the plan.
    """
    for number, model in enumerate(plan.gpus):
        mine = [segment for segment in plan.segments if segment.gpu == number]
        if not mine:
            raise PlannerError(f"GPU {number} of the plan runs nothing.")
        try:
            GpuState.of(problem.geometries[model], [segment.placement for segment in mine])
        except GeometryError as error:
            raise PlannerError(f"GPU {number} of the plan cannot be cut so: {error}") from error
    used = Counter(plan.gpus)
    for model, count in problem.available.items():
        if used[model] > count:
            raise PlannerError(f"The plan uses {used[model]} of {count} {model}.")
    by_demand: dict[tuple[str, str], list[float]] = {}
    for segment in plan.segments:
        row = segment.measurement
        if not 0 <= segment.gpu < len(plan.gpus):
            raise PlannerError(f"A segment of {segment.workload} is on GPU {segment.gpu} of {len(plan.gpus)}.")
        where = (segment.workload, segment.gpu_model, segment.placement.profile)
        if (row.workload, row.gpu, row.profile) != where or plan.gpus[segment.gpu] != segment.gpu_model:
            raise PlannerError(f"A segment of {segment.workload} was measured on another slice than it is to run on.")
        by_demand.setdefault((segment.workload, row.mode), []).append(row.throughput_per_s)
    jobs = Counter((load.demand.workload, load.demand.mode) for load in problem.loads)
    for load in problem.loads:
        demand = load.demand
        got = by_demand.get((demand.workload, demand.mode), [])
        enough = len(got) >= jobs[demand.workload, demand.mode] if not load.divisible else (
            sum(sorted(got)) >= demand.requests_per_s * (1 - 1e-9)
        )  # fmt: skip
        if not enough:
            raise PlannerError(f"The plan does not cover the demand of {demand.workload}.")
    if plan.lower_bound > len(plan.gpus):
        raise PlannerError(f"The bound of {plan.lower_bound} GPUs is above the plan's {len(plan.gpus)}.")
