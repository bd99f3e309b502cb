"""Changing states at the least cost: where to place a request, which instances to move for it, how to re-partition a GPU.

A move is one instance destroyed and created elsewhere with its profile unchanged (its workload is drained and restarted: the
cost that counts). Searches are exact: fewest moves, fewest instances destroyed; among equals the result keeps most room for
what may come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from actors.mig.geometry.enumerate_states import layouts_by_multiset
from actors.mig.geometry.errors import GeometryError, IllegalPlacement
from actors.mig.geometry.model import GpuGeometry, Placement
from actors.mig.geometry.state import GpuState, bits, fits, remaining

EQUALS_COMPARED = 512
"""Solutions of equal moves among which the roomiest is chosen."""


@dataclass(frozen=True)
class Move:
    """An instance that goes from a place to another, both given with the index of the GPU in the fleet."""

    from_gpu: int
    source: Placement
    to_gpu: int
    target: Placement


@dataclass(frozen=True)
class Defragmentation:
    """What ``make_room`` found: ``moves`` (all sources are destroyed before any target is created), then the request's
    place."""

    moves: tuple[Move, ...]
    gpu: int
    placement: Placement
    states: tuple[GpuState, ...]
    """The fleet with the request placed."""


@dataclass(frozen=True)
class Repartition:
    """The steps from a state to a layout: destroy, then create; what is kept is not touched."""

    keep: tuple[Placement, ...]
    destroy: tuple[Placement, ...]
    create: tuple[Placement, ...]
    target: GpuState

    @property
    def steps(self) -> int:
        return len(self.destroy) + len(self.create)


def room(state: GpuState) -> int:
    """How much a state still offers: the compute slices of all instances that could be created, profile by profile."""
    return _room(state.geometry, state.mask)


def place_best(states: Sequence[GpuState], profile: str) -> tuple[int, Placement] | None:
    """The GPU and place for a new instance that cost the fleet the least room; None when it fits nowhere as things stand.

    Raises:
        UnknownProfile: a GPU of the fleet has no such profile.
    """
    found = make_room(states, profile, max_moves=0)
    return None if found is None else (found.gpu, found.placement)


def make_room(
    states: Sequence[GpuState],
    profile: str,
    *,
    max_moves: int = 2,
    pinned: Collection[tuple[int, Placement]] = (),
) -> Defragmentation | None:
    """Places a request in a fleet, moving as few instances as possible (none, if it fits); None when ``max_moves`` do not
    suffice.

    Args:
        states: the fleet's GPUs; all of the same geometry.
        max_moves: most instances that may move.
        pinned: instances (GPU's index, placement) that must not move.

    Raises:
        UnknownProfile: the GPUs have no such profile.
        GeometryError: GPUs of different geometries.
    """
    if not states:
        return None
    geometry = states[0].geometry
    if any(state.geometry is not geometry and state.geometry != geometry for state in states):
        raise GeometryError("Instances move between GPUs of one geometry only: the fleet has several.")
    known = geometry.profile(profile)
    fixed = [0] * len(states)
    for gpu, place in pinned:
        fixed[gpu] |= 1 << geometry.index[place]
    masks = [state.mask for state in states]
    for budget in range(max_moves + 1):
        solutions = islice(_settle(geometry, masks, fixed, ((known.name, None),), budget), EQUALS_COMPARED)
        best = max(solutions, key=lambda found: sum(_room(geometry, mask) for mask in found[0]), default=None)
        if best is None:
            continue
        after, steps = best
        moves = tuple(
            Move(origin[0], geometry.placements[origin[1]], gpu, geometry.placements[number])
            for origin, gpu, number in steps
            if origin is not None
        )
        gpu, number = next((gpu, number) for origin, gpu, number in steps if origin is None)
        return Defragmentation(
            moves, gpu, geometry.placements[number], tuple(GpuState(geometry, mask) for mask in after)
        )
    return None


def repartition(
    state: GpuState,
    target: Sequence[str | tuple[str, int]],
    *,
    pinned: Collection[Placement] = (),
) -> Repartition:
    """The fewest instances to destroy and create so that the GPU holds exactly ``target``.

    Args:
        target: profiles, each alone (any place) or with its start.
        pinned: instances that must stay (they must be a part of the target).

    Raises:
        UnknownProfile, IllegalPlacement: a target that the GPU never allows.
        GeometryError: the target does not fit on one GPU, or not around what is pinned.
    """
    geometry = state.geometry
    names: list[str] = []
    fixed = 0
    for wanted in target:
        if isinstance(wanted, str):
            names.append(geometry.profile(wanted).name)
            continue
        place = geometry.placement(*wanted)
        names.append(place.profile)
        bit = 1 << geometry.index[place]
        if fixed & bit:
            raise GeometryError(f"The target names {place} twice.")
        fixed |= bit
    for place in pinned:
        bit = 1 << geometry.index[place]
        if not state.mask & bit:
            raise IllegalPlacement(f"{place} is to stay, but it is not on {geometry.gpu}.")
        fixed |= bit
    layouts = layouts_by_multiset(geometry).get(tuple(sorted(names)))
    listed = " + ".join(names) or "nothing"
    if layouts is None:
        raise GeometryError(f"{listed} do not fit on one {geometry.gpu}.")
    possible = [layout for layout in layouts if layout.mask & fixed == fixed]
    if not possible:
        kept = ", ".join(str(geometry.placements[number]) for number in bits(fixed))
        raise GeometryError(f"{listed} do not fit on one {geometry.gpu} with {kept}.")
    best = max(possible, key=lambda layout: ((layout.mask & state.mask).bit_count(), room(layout), -layout.mask))

    def named(mask: int) -> tuple[Placement, ...]:
        return tuple(geometry.placements[number] for number in bits(mask))

    return Repartition(
        keep=named(state.mask & best.mask),
        destroy=named(state.mask & ~best.mask),
        create=named(best.mask & ~state.mask),
        target=best,
    )


def place_multiset(geometry: GpuGeometry, names: Sequence[str]) -> GpuState:
    """A state that holds exactly these profiles, with the most room left.

    Raises:
        GeometryError: they do not fit on one GPU.
    """
    return repartition(GpuState(geometry), list(names)).target


_Origin = tuple[int, int] | None
_Step = tuple[_Origin, int, int]


def _settle(
    geometry: GpuGeometry,
    masks: list[int],
    fixed: list[int],
    pending: tuple[tuple[str, _Origin], ...],
    budget: int,
) -> Iterator[tuple[list[int], tuple[_Step, ...]]]:
    """All ways to give every pending instance a place, displacing at most ``budget`` further instances.

    ``pending`` are (profile, where it came from: GPU and placement number, None for the request). What was settled is
    fixed: an instance that moved twice could have gone to its last place at once, so nothing is lost.
    """
    if not pending:
        yield list(masks), ()
        return
    (profile, origin), rest = pending[0], pending[1:]
    seen: set[tuple[int, int]] = set()
    for gpu, mask in enumerate(masks):
        if (mask, fixed[gpu]) in seen:
            continue  # a GPU in the same state offers the same
        seen.add((mask, fixed[gpu]))
        for number in bits(geometry.profile_masks[profile]):
            in_the_way = geometry.conflicts[number] & mask
            count = in_the_way.bit_count()
            if count > budget or in_the_way & fixed[gpu] or (gpu, number) == origin:
                continue
            left = mask & ~in_the_way
            if not fits(geometry, left, number):
                continue
            displaced = tuple((geometry.placements[other].profile, (gpu, other)) for other in bits(in_the_way))
            bit = 1 << number
            masks[gpu], fixed[gpu] = left | bit, fixed[gpu] | bit
            for after, steps in _settle(geometry, masks, fixed, rest + displaced, budget - count):
                yield after, ((origin, gpu, number), *steps)
            masks[gpu], fixed[gpu] = mask, fixed[gpu] & ~bit


@lru_cache(maxsize=64)
def _rooms(geometry: GpuGeometry) -> dict[int, int]:
    """Room by mask, filled as states are met."""
    return {}


def _room(geometry: GpuGeometry, mask: int) -> int:
    rooms = _rooms(geometry)
    found = rooms.get(mask)
    if found is None:
        found = sum(p.compute_slices * remaining(geometry, mask, p.name) for p in geometry.profiles)
        rooms[mask] = found
    return found


def moved(before: Sequence[GpuState], after: Sequence[GpuState]) -> Counter[tuple[int, Placement]]:
    """Instances of ``before`` that are no longer at their place in ``after``, by (GPU, placement)."""
    gone: Counter[tuple[int, Placement]] = Counter()
    for gpu, (old, new) in enumerate(zip(before, after, strict=True)):
        for number in bits(old.mask & ~new.mask):
            gone[gpu, old.geometry.placements[number]] += 1
    return gone
