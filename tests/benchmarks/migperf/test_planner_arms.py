"""The arms of migperf_planner are fair: rivals' plans pass the same check, traces are replayed legally and the same for all."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from actors.mig.geometry import GpuState, gpu_geometry
from actors.mig.planner import PlannerError, make_plan
from benchmarks.migperf.admission import Request, first_fit, random_trace, replay, with_moves
from benchmarks.migperf.demands import random_problem, synthetic_profiles
from benchmarks.migperf.geometry import legal_subsets
from benchmarks.migperf.rivals import first_fit_decreasing, one_gpu_per_model, parvagpu_greedy, plan_with

A100 = gpu_geometry("A100-80GB")


def test_rivals_are_legal_and_never_better_than_the_bound():
    rng = random.Random(0)
    rows = synthetic_profiles(rng, workloads=3)
    compared = 0
    while compared < 3:
        try:
            problem, _ = random_problem(rows, {"A100-80GB": A100}, rng)
        except PlannerError:
            continue
        ours = make_plan(problem, seconds=5)
        for rival in (one_gpu_per_model, first_fit_decreasing, parvagpu_greedy):
            assert len(plan_with(rival, problem).gpus) >= ours.lower_bound
        compared += 1


def test_a_trace_by_hand():
    """Two 1g at the ends of both halves block a 4g for first fit; one move makes room for it."""
    trace = [
        Request(0.0, 9.0, "1g.10gb"),
        Request(0.1, 0.5, "3g.40gb"),
        Request(1.0, 9.0, "4g.40gb"),
    ]
    blocked = replay(A100, 1, trace, first_fit)
    assert (blocked.accepted["4g.40gb"], blocked.moves) == (0, 0)
    ours = replay(A100, 1, trace, with_moves(1))
    assert ours.accepted == Counter({"1g.10gb": 1, "3g.40gb": 1, "4g.40gb": 1})


def test_a_move_keeps_its_owner():
    """The 1g that moved leaves from where it went, and its old place is free again."""
    trace = [
        Request(0.0, 1.0, "1g.10gb"),
        Request(0.1, 9.0, "4g.40gb"),
        Request(2.0, 9.0, "3g.40gb"),
    ]

    def badly(states, profile):  # a first place in the way of the 4g
        if profile == "1g.10gb":
            return 0, A100.placement(profile, 0), ()
        return with_moves(1)(states, profile)

    outcome = replay(A100, 1, trace, badly)
    assert (outcome.accepted.total(), outcome.moves) == (3, 1)


def test_a_trace_asks_for_its_load():
    trace = random_trace(A100, 4, 0.9, {"1g.10gb": 1, "3g.40gb": 1}, 20_000, random.Random(1))
    asked = sum(request.holds_s * A100.profile(request.profile).compute_slices for request in trace) / trace[-1].at_s
    assert asked == pytest.approx(0.9 * 4 * 7, rel=0.05)


def test_first_fit_takes_the_first_gpu_and_the_lowest_start():
    states = [GpuState.of(A100, [("1g.10gb", 0)]), GpuState(A100)]
    gpu, place, moves = first_fit(states, "2g.20gb")
    assert (gpu, place.start, moves) == (0, 2, ())
    assert first_fit([GpuState.of(A100, [("7g.80gb", 0)])], "1g.10gb") is None


def test_legal_subsets_by_hand():
    """Two places that overlap and a third apart: 2^3 subsets less the two that hold both."""
    assert legal_subsets([(0b01, False), (0b01, False), (0b10, False)]).tolist() == [0, 1, 2, 4, 5, 6]
    assert legal_subsets([(0b01, True), (0b10, True)]).tolist() == [0, 1, 2]
