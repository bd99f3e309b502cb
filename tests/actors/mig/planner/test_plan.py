"""Plans are legal, cover the demands, and are the fewest GPUs: compared with exhaustion on small problems."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import random

import pytest

from actors.mig.geometry import gpu_geometry
from actors.mig.planner import Demand, Measurement, PlannerError, check_plan, make_plan, pose
from actors.mig.planner import plan as planning
from actors.mig.planner.bound import price_bound
from actors.mig.planner.exact import MilpAnswer, solve
from tests.actors.mig.planner.problems import GEOMETRIES, exhaustive_fewest_gpus, problem_of, rows_of, small_problem

SIZES = {"1g.10gb": 10.0, "2g.20gb": 20.0, "3g.40gb": 30.0, "4g.40gb": 40.0, "7g.80gb": 70.0}


@pytest.mark.parametrize("seed", range(12))
def test_a_plan_has_the_fewest_gpus_and_proves_it(seed):
    problem = small_problem(random.Random(seed))
    optimum = exhaustive_fewest_gpus(problem, 5)
    plan = make_plan(problem, seconds=10)
    assert (len(plan.gpus), plan.lower_bound) == (optimum, optimum)
    fast = make_plan(problem, method="heuristic")
    assert fast.lower_bound <= optimum <= len(fast.gpus)
    assert fast.method == "heuristic"


@pytest.mark.parametrize("seed", range(4))
def test_the_solver_alone_finds_the_optimum_and_proves_that_less_is_impossible(seed):
    problem = small_problem(random.Random(seed))
    optimum = exhaustive_fewest_gpus(problem, 5)
    answer = solve(problem, 1, optimum + 2, 10)
    assert (len(answer.cuts), answer.lower_bound, answer.finished) == (optimum, optimum, True)
    if optimum > 1:
        below = solve(problem, 1, optimum - 1, 10)
        assert (below.purchase, below.lower_bound, below.finished) == (None, optimum, True)


def test_the_exact_planner_improves_on_the_fast_one():
    problem = small_problem(random.Random(21), loads=4)
    plan, fast = make_plan(problem), make_plan(problem, method="heuristic")
    assert plan.method == "milp"
    assert (len(plan.gpus), plan.gap) == (len(fast.gpus) - 1, 0)
    assert fast.gap == 1


def test_where_prices_prove_too_little_branch_and_bound_proves_the_rest(monkeypatch):
    problem = small_problem(random.Random(3))
    optimum = exhaustive_fewest_gpus(problem, 5)
    weak = price_bound(problem, {kind: int(kind[1] == "7g.80gb") for kind in problem.slices})
    assert weak.gpus < optimum
    monkeypatch.setattr(planning, "best_prices", lambda problem, deadline: [weak])
    plan = make_plan(problem)
    assert (len(plan.gpus), plan.lower_bound, plan.bound_by) == (optimum, optimum, "branch and bound")


def test_when_the_solvers_time_is_up_the_fast_plan_stands_and_the_gap_is_said(monkeypatch):
    problem = small_problem(random.Random(21), loads=4)
    monkeypatch.setattr(planning, "solve", lambda problem, least, most, seconds: MilpAnswer(None, [], least, False))
    plan = make_plan(problem)
    assert (plan.method, plan.gap) == ("heuristic", 1)
    check_plan(problem, plan)


def test_without_a_solver_the_plan_is_the_fast_ones_and_its_bound_still_holds(monkeypatch):
    problem = small_problem(random.Random(1))
    optimum = exhaustive_fewest_gpus(problem, 5)
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "scipy" else original(name, *rest)
    )
    plan = make_plan(problem)
    assert plan.method == "heuristic"
    assert plan.lower_bound <= optimum <= len(plan.gpus)


def test_a_demand_that_is_met_exactly_needs_nothing_more():
    plan = make_plan(problem_of({"net": (74.408 * 7, {"1g.10gb": 74.408})}))
    assert (len(plan.gpus), len(plan.segments), plan.lower_bound) == (1, 7, 1)
    more = make_plan(problem_of({"net": (74.408 * 7 + 0.01, {"1g.10gb": 74.408})}))
    assert (len(more.gpus), len(more.segments), more.lower_bound) == (2, 8, 2)


def test_segments_that_nobody_needs_are_given_back():
    plan = make_plan(problem_of({"a": (5.0, SIZES), "b": (5.0, SIZES)}))
    assert [segment.placement.profile for segment in plan.segments] == ["1g.10gb", "1g.10gb"]


def test_a_training_job_is_not_split():
    loads = {"bert": (35.0, SIZES), "resnet": (30.0, SIZES)}
    plan = make_plan(problem_of(loads, training=("bert",)))
    (job,) = [segment for segment in plan.segments if segment.workload == "bert"]
    assert job.placement.profile in ("4g.40gb", "7g.80gb")
    assert len(plan.gpus) == 1
    with pytest.raises(PlannerError, match="No slice trains bert at 90 samples per second: the fastest reaches 70"):
        problem_of({"bert": (90.0, SIZES)}, training=("bert",))


def test_two_jobs_of_one_workload_get_two_slices():
    rows = rows_of("bert", SIZES, mode="train")
    demands = [Demand("bert", 35.0, mode="train"), Demand("bert", 30.0, mode="train")]
    problem = pose(rows, demands, GEOMETRIES)
    plan = make_plan(problem)
    assert len(plan.segments) == 2
    assert len(plan.gpus) == 1  # 4g + 3g
    check_plan(problem, plan)


def test_gpus_of_several_models_and_how_many_there_are():
    geometries = {name: gpu_geometry(name) for name in ("A100-80GB", "A30")}
    rows = rows_of("net", {"7g.80gb": 100.0}) + [Measurement("net", "A30", "4g.24gb", 8, 1, 10.0, 40.0)]
    demand = [Demand("net", 230.0, 100.0)]
    assert make_plan(pose(rows, demand, geometries)).gpus == ("A100-80GB",) * 3
    limited = make_plan(pose(rows, demand, geometries, available={"A100-80GB": 2, "A30": 4}))
    assert sorted(limited.gpus) == ["A100-80GB", "A100-80GB", "A30"]
    with pytest.raises(PlannerError, match=r"do not fit on 1 x A100-80GB, 2 x A30|need at least \d GPUs: there are 3"):
        make_plan(pose(rows, demand, geometries, available={"A100-80GB": 1, "A30": 2}))


def test_only_what_meets_half_the_limit_qualifies_and_of_each_slice_the_fastest():
    rows = [
        Measurement("net", "A100-80GB", "1g.10gb", 1, 1, 20.0, 50.0),
        Measurement("net", "A100-80GB", "1g.10gb", 4, 2, 50.0, 160.0),
        Measurement("net", "A100-80GB", "1g.10gb", 8, 2, 50.1, 320.0),
    ]
    problem = pose(rows, [Demand("net", 100.0, 100.0)], GEOMETRIES)
    assert problem.loads[0].options[("A100-80GB", "1g.10gb")].batch == 4
    wider = pose(rows, [Demand("net", 100.0, 100.0)], GEOMETRIES, latency_share=1.0)
    assert wider.loads[0].options[("A100-80GB", "1g.10gb")].batch == 8


@pytest.mark.parametrize("demands, message", [
    ([("other", 5.0, 100.0)], "no infer measurement of other that ran: measured are net"),
    ([("net", 5.0, 19.9)], r"No slice meets the latency limit of net: 0\.5 of 19\.9 ms are 9\.95 ms, and the fastest"),
    ([("net", 5.0, 100.0), ("net", 6.0, 100.0)], "net is demanded twice"),
    ([], "no demand"),
    ([("net", 0.0, 100.0)], "0 requests per second: it must be a positive number"),
    ([("net", -1.0, 100.0)], "-1 requests per second"),
    ([("net", math.nan, 100.0)], "nan requests per second"),
    ([("net", math.inf, 100.0)], "inf requests per second"),
    ([("net", 5.0, 0.0)], "latency limit of net is 0 ms"),
    ([("net", 5.0, math.nan)], "latency limit of net is nan ms"),
])  # fmt: skip
def test_a_demand_that_cannot_be_says_why(demands, message):
    with pytest.raises(PlannerError, match=message):
        pose(rows_of("net", SIZES), [Demand(*demand) for demand in demands], GEOMETRIES)


def test_the_check_catches_what_is_wrong_with_a_plan():
    problem = problem_of({"a": (95.0, SIZES), "b": (33.0, SIZES)})
    plan = make_plan(problem)
    check_plan(problem, plan)
    first = plan.segments[0]
    overlapping = dataclasses.replace(first, placement=dataclasses.replace(first.placement, start=3))
    other_slice = dataclasses.replace(first, measurement=dataclasses.replace(first.measurement, profile="2g.20gb"))
    for wrong, message in (
        (dataclasses.replace(plan, segments=plan.segments[1:]), "does not cover|runs nothing"),
        (dataclasses.replace(plan, segments=(*plan.segments, first)), "cannot be cut so"),
        (dataclasses.replace(plan, segments=(overlapping, *plan.segments[1:])), "cannot be cut so|does not cover"),
        (dataclasses.replace(plan, segments=(other_slice, *plan.segments[1:])), "measured on another slice"),
        (dataclasses.replace(plan, gpus=(*plan.gpus, "A100-80GB")), "runs nothing"),
        (dataclasses.replace(plan, lower_bound=9), "above the plan's"),
    ):
        with pytest.raises(PlannerError, match=message):
            check_plan(problem, wrong)
