"""From slices to GPUs: packs slice kinds into legal cuts, and gives every segment a place on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from actors.mig.geometry import GpuGeometry, layouts_by_multiset
from actors.mig.geometry.moves import place_multiset
from actors.mig.planner.errors import PlannerError
from actors.mig.planner.problem import Load, Measurement, Problem, Segment, SliceKind

Purchase = Sequence[Mapping[SliceKind, int]]
"""For each load, how many slices of each kind it gets."""
Cuts = list[tuple[str, tuple[str, ...]]]
"""GPU model and profiles of each GPU."""


def pack(problem: Problem, slices: Counter[SliceKind]) -> Cuts:
    """First-fit decreasing with best fit, exact in what one GPU holds: the largest slices first, each on the fullest GPU that
    takes it."""
    cuts: list[tuple[str, list[str]]] = []

    def size(kind: SliceKind) -> tuple[int, int]:
        profile = problem.geometries[kind[0]].profile(kind[1])
        return profile.memory_slices, profile.compute_slices

    for kind in sorted(slices, key=lambda kind: (size(kind), kind), reverse=True):
        gpu, name = kind
        geometry = problem.geometries[gpu]
        layouts = layouts_by_multiset(geometry)
        for _ in range(slices[kind]):
            possible = [cut for cut in cuts if cut[0] == gpu and tuple(sorted([*cut[1], name])) in layouts]
            if possible:
                max(possible, key=lambda cut: _fill(geometry, cut[1]))[1].append(name)
            else:
                cuts.append((gpu, [name]))
    return [(gpu, tuple(names)) for gpu, names in cuts]


def _fill(geometry: GpuGeometry, names: Sequence[str]) -> int:
    return sum(geometry.profile(name).compute_slices + geometry.profile(name).memory_slices for name in names)


def prune(load: Load, bought: Mapping[SliceKind, int], cost: Mapping[SliceKind, float]) -> dict[SliceKind, int]:
    """The same purchase without slices that the demand does not need, the dearest given back first."""
    if not load.divisible:
        kind = min((kind for kind, count in bought.items() if count), key=lambda kind: cost[kind])
        return {kind: 1}
    kept = Counter({kind: count for kind, count in bought.items() if count})
    for kind in sorted(kept, key=lambda kind: -cost[kind]):
        while kept[kind]:
            kept[kind] -= 1
            if not covered(load, kept):
                kept[kind] += 1
                break
    return {kind: count for kind, count in kept.items() if count}


def covered(load: Load, bought: Mapping[SliceKind, int]) -> bool:
    """Whether the slices serve the demand (their throughputs add up to it; a job has a slice)."""
    if not load.divisible:
        return sum(bought.values()) >= 1
    total = sum(load.options[kind].throughput_per_s * count for kind, count in sorted(bought.items()))
    return total >= load.demand.requests_per_s * (1 - 1e-12)


def lay_out(problem: Problem, purchase: Purchase, cuts: Cuts) -> tuple[tuple[str, ...], tuple[Segment, ...]]:
    """Segments with places: GPUs on which nothing runs are left out, slices without a segment are not created.

    Raises:
        PlannerError: the cuts hold fewer slices than were bought (a mistake of the caller).
    """
    waiting: dict[SliceKind, list[tuple[Load, Measurement]]] = {}
    for load, bought in zip(problem.loads, purchase, strict=True):
        for kind, count in bought.items():
            waiting.setdefault(kind, []).extend([(load, load.options[kind])] * count)
    gpus: list[str] = []
    segments: list[Segment] = []
    for gpu, names in cuts:
        used = [(name, waiting[gpu, name].pop(0)) for name in names if waiting.get((gpu, name))]
        if not used:
            continue
        state = place_multiset(problem.geometries[gpu], [name for name, _ in used])
        places = {name: [place for place in state.placements if place.profile == name] for name, _ in used}
        for name, (load, measurement) in used:
            segments.append(Segment(load.demand.workload, len(gpus), gpu, places[name].pop(0), measurement))
        gpus.append(gpu)
    left = sum(map(len, waiting.values()))
    if left:
        raise PlannerError(f"{left} segments found no slice in the cuts.")
    return tuple(gpus), tuple(sorted(segments, key=lambda s: (s.gpu, s.placement.start)))
