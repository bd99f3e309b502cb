"""Rivals of the planner: one GPU per model, first-fit decreasing, and a greedy like ParvaGPU's. Written from their
descriptions.

Each takes a posed problem of one GPU model and returns segments with places; `check_plan` judges them as it judges our plans.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from actors.mig.geometry import GpuGeometry, GpuState, Placement
from actors.mig.planner import Load, Measurement, Plan, Problem, Segment, check_plan

Wanted = tuple[Load, Measurement]
# ParvaGPU's order of places: it keeps the places that only small instances can use for them.
PREFERRED = {1: (6, 5, 4, 0, 1, 2, 3), 2: (0, 4, 2), 3: (4, 0), 4: (0,), 7: (0,)}


def plan_with(rival: Callable[[Problem], list[list[tuple[Load, Measurement, Placement]]]], problem: Problem) -> Plan:
    """Runs a rival and checks its plan."""
    began = time.monotonic()
    gpus = [gpu for gpu in rival(problem) if gpu]
    (model,) = problem.geometries
    segments = tuple(
        Segment(load.demand.workload, number, model, place, measurement)
        for number, gpu in enumerate(gpus)
        for load, measurement, place in gpu
    )
    plan = Plan((model,) * len(gpus), segments, 1, rival.__name__, "nothing", time.monotonic() - began)
    check_plan(problem, plan)
    return plan


def one_gpu_per_model(problem: Problem) -> list[list[tuple[Load, Measurement, Placement]]]:
    """Whole GPUs for every model, as serving without slices does: the 7g slice, as often as the demand needs it."""
    ((_, geometry),) = problem.geometries.items()
    found = []
    for load in problem.loads:
        size = max(_slices(geometry, row) for row in load.options.values())
        same = [row for row in load.options.values() if _slices(geometry, row) == size]
        measurement = max(same, key=lambda row: row.throughput_per_s)
        start = geometry.profile(measurement.profile).starts[0]
        count = math.ceil(load.demand.requests_per_s / measurement.throughput_per_s)
        found += [[(load, measurement, geometry.placement(measurement.profile, start))] for _ in range(count)]
    return found


def first_fit_decreasing(problem: Problem) -> list[list[tuple[Load, Measurement, Placement]]]:
    """For each demand as many as needed of the slice with the best throughput per compute slice; the largest first, on the
    first GPU."""
    ((_, geometry),) = problem.geometries.items()
    wanted: list[Wanted] = []
    for load in problem.loads:
        best = max(load.options.values(), key=lambda row: row.throughput_per_s / _slices(geometry, row))
        wanted += [(load, best)] * math.ceil(load.demand.requests_per_s / best.throughput_per_s)
    fleet = _Fleet(geometry)
    for load, row in sorted(wanted, key=lambda one: -_slices(geometry, one[1])):
        fleet.add(load, row, best_fit=False)
    return fleet.gpus


def parvagpu_greedy(problem: Problem) -> list[list[tuple[Load, Measurement, Placement]]]:
    """ParvaGPU (SC24): best segment by throughput per slice, a last one that is just large enough, best-fit, small GPUs taken
    apart."""
    ((_, geometry),) = problem.geometries.items()
    wanted: list[Wanted] = []
    for load in problem.loads:
        wanted += [(load, row) for row in _match(geometry, load)]
    fleet = _Fleet(geometry)
    for load, row in sorted(wanted, key=lambda one: -_slices(geometry, one[1])):
        fleet.add(load, row, best_fit=True)
    _relocate(geometry, fleet)
    return fleet.gpus


def _match(geometry: GpuGeometry, load: Load) -> list[Measurement]:
    """Demand matching: floor of the demand in best segments, then the smallest one that covers the rest."""
    best = max(load.options.values(), key=lambda row: row.throughput_per_s / _slices(geometry, row))
    count = math.floor(load.demand.requests_per_s / best.throughput_per_s)
    rest = load.demand.requests_per_s - count * best.throughput_per_s
    found = [best] * count
    if rest > 0:
        enough = [row for row in load.options.values() if row.throughput_per_s >= rest]
        found.append(min(enough, key=lambda row: _slices(geometry, row)) if enough else best)
    return found


def _relocate(geometry: GpuGeometry, fleet: _Fleet) -> None:
    """Segments of GPUs with at most four slices in use, from the last, are replaced by 1g and 2g segments where those go
    elsewhere."""
    for number in reversed(range(len(fleet.gpus))):
        held = fleet.gpus[number]
        if not held or sum(_slices(geometry, row) for _, row, _ in held) > 4:
            continue
        smaller: list[Wanted] = []
        for load, row, _ in held:
            small = [option for option in load.options.values() if _slices(geometry, option) <= 2]
            if not small:
                smaller = []
                break
            best = max(small, key=lambda option: option.throughput_per_s / _slices(geometry, option))
            smaller += [(load, best)] * math.ceil(row.throughput_per_s / best.throughput_per_s)
        trial = fleet.without(number)
        if smaller and all(trial.add(load, row, best_fit=True, grow=False) for load, row in smaller):
            fleet.gpus, fleet.states = trial.gpus, trial.states


class _Fleet:
    """GPUs being filled."""

    def __init__(self, geometry: GpuGeometry):
        self.geometry = geometry
        self.gpus: list[list[tuple[Load, Measurement, Placement]]] = []
        self.states: list[GpuState] = []

    def add(self, load: Load, row: Measurement, *, best_fit: bool, grow: bool = True) -> bool:
        possible = [n for n, state in enumerate(self.states) if state.free_starts(row.profile)]
        if possible:
            number = max(possible, key=lambda n: (self.states[n].compute_used, -n)) if best_fit else possible[0]
        elif grow:
            self.gpus.append([])
            self.states.append(GpuState(self.geometry))
            number = len(self.gpus) - 1
        else:
            return False
        free = self.states[number].free_starts(row.profile)
        order = PREFERRED.get(_slices(self.geometry, row), free) if best_fit else free
        start = next((start for start in order if start in free), free[0])
        self.states[number] = self.states[number].place(row.profile, start)
        self.gpus[number].append((load, row, self.geometry.placement(row.profile, start)))
        return True

    def without(self, number: int) -> _Fleet:
        other = _Fleet(self.geometry)
        other.gpus = [list(gpu) for n, gpu in enumerate(self.gpus) if n != number]
        other.states = [state for n, state in enumerate(self.states) if n != number]
        return other


def _slices(geometry: GpuGeometry, row: Measurement) -> int:
    return geometry.profile(row.profile).compute_slices
