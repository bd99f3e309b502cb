"""The guided search: it finds the best of devices that behave, with few trials, few re-partitions, and never forgets the end."""

from __future__ import annotations

import dataclasses
import math

import pytest

from actors.mig.prediction import Slice
from apps.migperf.measurements import read_table
from apps.migperf.sweep.replay import replay
from apps.migperf.sweep.search import Candidate, Costs, Search
from apps.migperf.sweep.trial import TrialPoint, TrialResult, objective

SHARES = {"a": (1 / 7, 7), "b": (2 / 7, 3), "c": (3 / 7, 2), "d": (1.0, 1)}
BATCHES = (1, 2, 4, 8, 16, 32, 64)
COSTS = Costs(start_s=1.0, window_s=0.0, steps=100)


def device(fits_mib: float = math.inf) -> tuple[list[Candidate], dict[str, TrialResult]]:
    """A workload of a launch floor of 8 ms and 2 ms a sample on the whole device; ``fits_mib``: of the whole memory."""
    candidates, truth = [], {}
    for name, (share, most) in SHARES.items():
        for batch in BATCHES:
            point = TrialPoint("cpu", "toy", name, "w", "infer", batch)
            layout = (name,) if name == "d" else ("a", "b", "c")
            candidates.append(
                Candidate(point, Slice("toy", name, 0, share, share, min(fits_mib, 1e9) * share), most, layout)
            )
            ms = 8 + 2 * batch / share
            fits = 100 + 20 * batch <= fits_mib * share
            truth[point.key] = TrialResult(
                point, "ok" if fits else "oom", latency_mean_ms=ms, latency_p99_ms=ms, throughput_per_s=batch / ms * 1e3,
                memory_mib=100.0 + 20 * batch,
            )  # fmt: skip
    return candidates, truth


def run(search: Search, truth: dict[str, TrialResult]) -> tuple[list[str], int]:
    """Keys in the order of their trials, and how often the layout changed."""
    held, keys, cuts = (), [], 0
    while (choice := search.next(held)) is not None:
        if choice.candidate.layout != held:
            held, cuts = choice.candidate.layout, cuts + 1
        result = truth[choice.candidate.point.key]
        if result.status == "ok":
            look = dataclasses.replace(result, status="stopped")
            result = result if choice.full or search.goes_on(look) else look
        search.tell(result)
        keys.append(result.point.key)
        assert len(keys) < 200
    return keys, cuts


def regret(search: Search, truth: dict[str, TrialResult], limit: float | None = None) -> float:
    best = max(objective(truth[c.point.key], c.most, limit) for c in search.candidates)
    found = search.best(search.candidates[0].point.question)
    return 1.0 if found is None else 1 - objective(truth[found[0].point.key], found[0].most, limit) / best


def test_the_grid_measures_every_point_in_the_order_of_layouts() -> None:
    candidates, truth = device()
    search = Search(candidates, guided=False)
    keys, cuts = run(search, truth)
    assert sorted(keys) == sorted(truth)
    assert cuts == 2
    assert regret(search, truth) == 0
    assert search.next() is None


def test_the_search_finds_the_best_with_a_fraction_of_the_trials() -> None:
    candidates, truth = device()
    search = Search(candidates, COSTS)
    keys, cuts = run(search, truth)
    assert regret(search, truth) <= 0.02
    assert len(keys) <= 0.5 * len(candidates)
    assert cuts <= 5
    best = search.best(candidates[0].point.question)
    assert best is not None
    assert search.done[best[0].point.key].status == "ok"  # the winner was measured in full
    assert search.pruned


@pytest.mark.parametrize("limit_ms", [60.0, 150.0])
def test_a_latency_limit_is_kept(limit_ms: float) -> None:
    candidates, truth = device()
    search = Search(candidates, COSTS, latency_limit_ms=limit_ms)
    keys, _ = run(search, truth)
    best = search.best(candidates[0].point.question)
    assert best is not None
    assert (truth[best[0].point.key].latency_p99_ms or 0) <= limit_ms
    assert regret(search, truth, limit_ms) <= 0.02
    assert len(keys) < len(candidates)


def test_running_out_of_memory_is_survived_and_mostly_foreseen() -> None:
    candidates, truth = device(fits_mib=2000)
    search = Search(candidates, COSTS)
    run(search, truth)
    assert regret(search, truth) <= 0.02
    # 10 of 28 points run out; most of them were never tried.
    assert sum(result.status == "oom" for result in search.done.values()) <= 5


def test_a_device_on_which_everything_fails_ends_the_search() -> None:
    candidates, _ = device()
    search = Search(candidates, COSTS)
    while (choice := search.next()) is not None:
        search.tell(TrialResult(choice.candidate.point, "failed"))
    assert search.best(candidates[0].point.question) is None


def test_results_of_before_are_not_measured_again() -> None:
    candidates, truth = device()
    first = Search(candidates, COSTS)
    keys, _ = run(first, truth)
    second = Search(candidates, COSTS)
    for result in first.done.values():
        second.tell(result)
    again, _ = run(second, truth)
    assert len(again) <= 2


@pytest.mark.shared_data
def test_on_published_measurements_the_best_is_found_for_less_than_the_grid(shared_data) -> None:
    rows = [
        row for row in read_table(shared_data / "mig" / "migprofiler.csv").rows if row.workload == "vision_transformer"
    ]
    for mode, gpu in (("infer", "A100-80GB"), ("train", "A100-40GB")):
        one = replay([row for row in rows if (row.mode, row.gpu) == (mode, gpu)], Costs(5.0, 0.0, 100, 5.0))
        assert max(one.regrets) <= 0.02
        assert one.cost_fraction <= 0.4
