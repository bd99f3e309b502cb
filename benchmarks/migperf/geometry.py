"""Geometry against brute force: every subset of placements of a GPU, and random creates and destroys, judged by painting
memory slices.

The judge shares nothing with actors.mig.geometry but the question: its tables are typed anew from `nvidia-smi mig -lgipp`,
and it knows only two rules: no memory slice belongs to two instances, and one instance has the media extensions (+me, and the
whole GPU).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from actors.mig.geometry import GpuGeometry, GpuState, Placement, all_states, gpu_geometry

# kind: (starts, memory slices, has media extensions)
SEVEN_SLICES: dict[str, tuple[tuple[int, ...], int, bool]] = {
    "1g": ((0, 1, 2, 3, 4, 5, 6), 1, False),
    "1g+me": ((0, 1, 2, 3, 4, 5, 6), 1, True),
    "1g.x2": ((0, 2, 4, 6), 2, False),
    "2g": ((0, 2, 4), 2, False),
    "3g": ((0, 4), 4, False),
    "4g": ((0,), 4, False),
    "7g": ((0,), 8, True),
}
FOUR_SLICES: dict[str, tuple[tuple[int, ...], int, bool]] = {
    "1g": ((0, 1, 2, 3), 1, False),
    "1g+me": ((0, 1, 2, 3), 1, True),
    "2g": ((0, 2), 2, False),
    "2g+me": ((0, 2), 2, True),
    "4g": ((0,), 4, True),
}
JUDGED = (("A100-40GB", SEVEN_SLICES), ("A100-80GB", SEVEN_SLICES), ("H100-80GB", SEVEN_SLICES), ("A30", FOUR_SLICES))


@dataclass(frozen=True)
class GeometryErrors:
    """How often the geometry allowed what is impossible, refused what is possible, and how many questions were asked."""

    illegal_accepted: int = 0
    legal_rejected: int = 0
    checks: int = 0

    def __add__(self, other: GeometryErrors) -> GeometryErrors:
        return GeometryErrors(
            self.illegal_accepted + other.illegal_accepted,
            self.legal_rejected + other.legal_rejected,
            self.checks + other.checks,
        )


def geometry_rows(operations: int, seed: int = 0) -> dict[str, int]:
    """Both judgements over all GPUs; ``operations`` random operations are shared among them."""
    total = GeometryErrors()
    for gpu, table in JUDGED:
        geometry = gpu_geometry(gpu)
        total += compare_states(geometry, table) + compare_random(
            geometry, table, -(-operations // len(JUDGED)), random.Random(f"{seed} {gpu}")
        )
    return {
        "geometry_illegal_accepted": total.illegal_accepted,
        "geometry_legal_rejected": total.legal_rejected,
        "geometry_checks": total.checks,
    }


def compare_states(geometry: GpuGeometry, table: dict[str, tuple[tuple[int, ...], int, bool]]) -> GeometryErrors:
    """All subsets of the placements (2^25 on an A100), legal by brute force, against ``all_states``."""
    places = [
        (Placement(start, geometry.profile(kind).name, size), ((1 << size) - 1) << start, media)
        for kind, (starts, size, media) in table.items()
        for start in starts
    ]
    legal = legal_subsets([(span, media) for _, span, media in places])
    number = {place: index for index, (place, _, _) in enumerate(places)}
    ours = {sum(1 << number[place] for place in state.placements) for state in all_states(geometry)}
    brute = set(legal.tolist())
    return GeometryErrors(len(ours - brute), len(brute - ours), 1 << len(places))


def legal_subsets(places: Iterable[tuple[int, bool]]) -> np.ndarray:
    """Numbers (one bit a placement) of the subsets in which nothing overlaps; each subset is looked at, none is skipped.

    Args:
        places: (memory slices as bits, media extensions) of each placement.
    """
    ok = np.ones(1, dtype=bool)
    taken = np.zeros(1, dtype=np.uint16)
    for span, media in places:
        paint = np.uint16(span | (1 << 15 if media else 0))
        ok = np.concatenate([ok, ok & ((taken & paint) == 0)])
        taken = np.concatenate([taken, taken | paint])
    return np.flatnonzero(ok)


def compare_random(
    geometry: GpuGeometry, table: dict[str, tuple[tuple[int, ...], int, bool]], operations: int, rng: random.Random
) -> GeometryErrors:
    """Random creates at random (also impossible) places, and destroys, on one GPU after another state."""
    kinds = [(geometry.profile(kind).name, *row) for kind, row in table.items()]
    slots: list[int | None] = [None] * geometry.memory_slices
    instances: dict[int, tuple[str, int, bool]] = {}
    state = GpuState(geometry)
    accepted_wrongly = rejected_wrongly = 0
    for operation in range(operations):
        # Mostly creates while there is room, so that states of every size are met.
        if instances and rng.random() < 0.15 + 0.1 * len(instances):
            gone = rng.choice(list(instances))
            name, start, _ = instances.pop(gone)
            slots = [None if owner == gone else owner for owner in slots]
            state = state.remove(name, start)
            continue
        name, starts, size, media = rng.choice(kinds)
        start = rng.randrange(-1, geometry.memory_slices + 1)
        span = range(start, start + size)
        possible = (
            start in starts
            and all(slots[slot] is None for slot in span)
            and not (media and any(has for _, _, has in instances.values()))
        )
        allowed = state.can_place(name, start)
        accepted_wrongly += allowed and not possible
        rejected_wrongly += possible and not allowed
        if allowed and possible:
            state = state.place(name, start)
            instances[operation] = (name, start, media)
            for slot in span:
                slots[slot] = operation
    return GeometryErrors(accepted_wrongly, rejected_wrongly, operations)


def query_microseconds(geometry: GpuGeometry, queries: int = 20_000) -> float:
    """Mean time of a legality query on random states."""
    rng = random.Random(0)
    states = rng.choices(all_states(geometry), k=100)
    profiles = [profile.name for profile in geometry.profiles]
    questions = [(rng.choice(states), rng.choice(profiles), rng.randrange(8)) for _ in range(queries)]
    began = time.perf_counter()
    for state, profile, start in questions:
        state.can_place(profile, start)
    return (time.perf_counter() - began) / queries * 1e6
