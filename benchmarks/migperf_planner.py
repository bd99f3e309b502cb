"""MIG geometry against brute force; the planner against its certified bound and its rivals; defragmentation against first fit.

``python -m benchmarks.migperf_planner [--quick]``: random demands of 2 to 16 GPUs over ParvaGPU's measured profiles (a simple
law where the shared data is missing). Every plan, the rivals' too, passes the same check (legal places, demand covered). GPU
counts are ratios over the same demands; accept gains are ratios over the same traces.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections import Counter
from collections.abc import Mapping

from actors.mig.geometry import GpuGeometry, gpu_geometry
from actors.mig.planner import PlannerError, make_plan
from apps.program.report import PALETTE, new_figure
from benchmarks.harness import Benchmark, Target, print_rows
from benchmarks.migperf.admission import Outcome, first_fit, random_trace, replay, with_moves
from benchmarks.migperf.demands import load_profiles, random_problem
from benchmarks.migperf.geometry import geometry_rows, query_microseconds
from benchmarks.migperf.rivals import first_fit_decreasing, one_gpu_per_model, parvagpu_greedy, plan_with

SECONDS = 9.0
TARGETS = [
    Target("geometry_illegal_accepted", 0, 0, "lower", "against every subset of placements, and random operations"),
    Target("geometry_legal_rejected", 0, 0, "lower", "as above"),
    Target("planner_gap", 0.1, 0, "lower", "share of random demands whose plan is above the certified bound"),
    Target("planner_s", 20, 10, "lower", "slowest plan, seconds"),
    Target("defrag_accept_gain", 1.1, 1.2, "higher", "accepted 3g and 4g requests / first fit's, same traces"),
    Target("defrag_moves_per_accepted", 1, 0.2, "lower", "instances moved per accepted request"),
]
RIVALS = {
    "one_gpu_per_model": one_gpu_per_model,
    "first_fit_decreasing": first_fit_decreasing,
    "parvagpu_greedy": parvagpu_greedy,
}
MIXES: dict[str, dict[str, float]] = {
    "even": {"1g.10gb": 1, "2g.20gb": 1, "3g.40gb": 1, "4g.40gb": 1},
    "mostly small": {"1g.10gb": 5, "2g.20gb": 2, "3g.40gb": 1, "4g.40gb": 1},
    "all sizes": {"1g.10gb": 6, "2g.20gb": 4, "3g.40gb": 2, "4g.40gb": 2, "7g.80gb": 1},
}
MOVES = 2
LARGE = ("3g.40gb", "4g.40gb")


def main() -> int:
    """Runs everything; returns the exit code."""
    bench = Benchmark("migperf_planner", __doc__ or "", TARGETS)
    _geometry(bench, 100_000 if bench.quick else 1_000_000)
    gpus = _plans(bench, 40 if bench.quick else 300)
    gains = _admission(bench, 400 if bench.quick else 3000)
    _picture(bench, gpus, gains)
    return bench.finish()


def _geometry(bench: Benchmark, operations: int) -> None:
    bench.say(f"geometry against brute force and {operations} random operations")
    for key, value in geometry_rows(operations).items():
        bench.figure(key, value)
    bench.figure("geometry_query_us", query_microseconds(gpu_geometry("A100-80GB")))


def _plans(bench: Benchmark, count: int) -> dict[str, list[int]]:
    """GPUs of each planner on random demands."""
    rows, geometries, source = load_profiles()
    bench.say(f"{count} random demands over {source}")
    rng = random.Random(0)
    gpus: dict[str, list[int]] = {"bound": [], "sextant": [], "heuristic": [], **{name: [] for name in RIVALS}}
    seconds: list[float] = []
    methods: Counter[str] = Counter()
    while len(seconds) < count:
        try:
            problem, _ = random_problem(rows, geometries, rng)
        except PlannerError:
            continue
        plan = make_plan(problem, seconds=SECONDS)
        if not 2 <= len(plan.gpus) <= 16:
            continue
        seconds.append(plan.seconds)
        methods[f"{plan.method}, bound by {plan.bound_by}"] += 1
        gpus["bound"].append(plan.lower_bound)
        gpus["sextant"].append(len(plan.gpus))
        gpus["heuristic"].append(len(make_plan(problem, seconds=SECONDS, method="heuristic").gpus))
        for name, rival in RIVALS.items():
            gpus[name].append(len(plan_with(rival, problem).gpus))
        bench.row(what="plan", demands=len(problem.loads), seconds=round(plan.seconds, 3), method=plan.method,
                  bound_by=plan.bound_by, **{name: found[-1] for name, found in gpus.items()})  # fmt: skip
    gaps = [ours - bound for ours, bound in zip(gpus["sextant"], gpus["bound"], strict=True)]
    bench.figure("planner_gap", sum(gap > 0 for gap in gaps) / count)
    bench.figure("planner_gap_largest_gpus", max(gaps))
    bench.figure("planner_s", max(seconds))
    bench.figure("planner_median_s", statistics.median(seconds))
    above = [heuristic > bound for heuristic, bound in zip(gpus["heuristic"], gpus["bound"], strict=True)]
    bench.figure("heuristic_gap", sum(above) / count)
    for name in ("heuristic", *RIVALS):
        bench.figure(f"gpus_{name}_over_sextant", sum(gpus[name]) / sum(gpus["sextant"]))
    print_rows("How plans were found", [{"how": how, "plans": number} for how, number in methods.most_common()])
    return gpus


def _admission(bench: Benchmark, requests: int) -> dict[str, list[float]]:
    """Ratios to first fit of what is accepted, over fleets, loads and mixes."""
    geometry = gpu_geometry("A100-80GB")
    bench.say(f"traces of {requests} slice requests")
    gains: dict[str, list[float]] = {"large": [], "all": [], "slices": [], "placement only": []}
    moves = accepted = 0
    for fleet in (1, 2, 4, 8):
        for load in (0.8, 1.0, 1.2):
            for mix_name, mix in MIXES.items():
                trace = random_trace(geometry, fleet, load, mix, requests, random.Random(f"{fleet} {load} {mix_name}"))
                base = replay(geometry, fleet, trace, first_fit)
                placed = replay(geometry, fleet, trace, with_moves(0))
                ours = replay(geometry, fleet, trace, with_moves(MOVES))
                gains["large"].append(_large(ours) / _large(base))
                gains["placement only"].append(_large(placed) / _large(base))
                gains["all"].append(ours.accepted.total() / base.accepted.total())
                gains["slices"].append(_slices(geometry, ours.accepted) / _slices(geometry, base.accepted))
                moves += ours.moves
                accepted += ours.accepted.total()
                bench.row(what="trace", gpus=fleet, load=load, mix=mix_name, first_fit=base.accepted.total() / requests,
                          ours=ours.accepted.total() / requests, large_gain=gains["large"][-1], moves=ours.moves)  # fmt: skip
    bench.figure("defrag_accept_gain", statistics.geometric_mean(gains["large"]))
    bench.figure("defrag_moves_per_accepted", moves / accepted)
    bench.figure("placement_accept_gain", statistics.geometric_mean(gains["placement only"]))
    bench.figure("defrag_accept_gain_all_sizes", statistics.geometric_mean(gains["all"]))
    bench.figure("defrag_accept_gain_compute_slices", statistics.geometric_mean(gains["slices"]))
    return gains


def _large(outcome: Outcome) -> int:
    return max(1, sum(outcome.accepted[profile] for profile in LARGE))


def _slices(geometry: GpuGeometry, counts: Mapping[str, int]) -> int:
    return sum(geometry.profile(name).compute_slices * count for name, count in counts.items())


def _picture(bench: Benchmark, gpus: dict[str, list[int]], gains: dict[str, list[float]]) -> None:
    figure, (left, right) = new_figure(10, 4, 1, 2)
    order = sorted(range(len(gpus["bound"])), key=lambda index: (gpus["bound"][index], gpus["parvagpu_greedy"][index]))
    for colour, name in zip(
        PALETTE, ("one_gpu_per_model", "first_fit_decreasing", "parvagpu_greedy", "sextant"), strict=False
    ):
        left.plot([gpus[name][index] for index in order], color=colour, label=name.replace("_", " "), linewidth=1.2)
    left.plot([gpus["bound"][index] for index in order], color="black", linestyle=":", label="certified bound")
    left.set(title="GPUs for the same demands", xlabel="random demand", ylabel="GPUs")
    left.legend(fontsize=8)
    names = ("large", "placement only", "all", "slices")
    right.boxplot(
        [gains[name] for name in names], tick_labels=["3g, 4g\nwith moves", "3g, 4g\nno moves", "all sizes", "slices"]
    )
    right.axhline(1.0, color="black", linewidth=0.8)
    right.set(title="Accepted requests / first fit's", ylabel="ratio")
    bench.picture(figure)


if __name__ == "__main__":
    sys.exit(main())
