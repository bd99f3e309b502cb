"""The planner: the fewest GPUs, their cuts, and what runs where, for given demands. Pure: no Ray, no GPU.

problem = pose(measurements, demands, {"A100-80GB": gpu_geometry("A100-80GB")})
plan = make_plan(problem, seconds=10)
plan.gap        # 0: proven to be the fewest
"""

from __future__ import annotations

from actors.mig.planner.check import check_plan
from actors.mig.planner.errors import PlannerError
from actors.mig.planner.plan import make_plan
from actors.mig.planner.problem import Demand, Load, Measurement, Plan, Problem, Segment, pose

__all__ = [
    "Demand", "Load", "Measurement", "Plan", "PlannerError", "Problem", "Segment", "check_plan", "make_plan", "pose",
]  # fmt: skip
