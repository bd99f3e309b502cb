"""What the controller reads and writes, as data: instances, targets, steps; and the fewest steps from one to the other.
Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from actors.mig.geometry import GpuGeometry, GpuState, Placement, place_compute, repartition

Action = Literal["destroy compute", "destroy", "create", "create compute"]


@dataclass(frozen=True)
class ComputeInstance:
    """A compute instance as it exists: ``uuid`` is what CUDA_VISIBLE_DEVICES takes."""

    id: int
    slices: int
    start: int
    uuid: str


@dataclass(frozen=True)
class GpuInstance:
    """A GPU instance as it exists, with its compute instances by their start."""

    id: int
    placement: Placement
    compute: tuple[ComputeInstance, ...]


@dataclass(frozen=True)
class SliceTarget:
    """A GPU instance that is wanted: at ``start`` (None: anywhere), with compute instances of ``compute`` slices (None: one,
    the whole)."""

    profile: str
    start: int | None = None
    compute: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Step:
    """One call. ``compute`` is (slices, start) for steps on compute instances."""

    action: Action
    placement: Placement
    compute: tuple[int, int] | None = None

    def __str__(self) -> str:
        place = self.placement
        where = f"{place.profile} at memory slice {place.start}"
        if self.compute is None:
            return f"{self.action} GPU instance {where}"
        return f"{self.action} instance of {self.compute[0]} slices at {self.compute[1]} in {where}"


def fewest_steps(
    geometry: GpuGeometry,
    current: Sequence[GpuInstance],
    target: Sequence[SliceTarget],
    *,
    pinned: Collection[Placement] = (),
) -> tuple[Step, ...]:
    """The steps from ``current`` to ``target``: destroys first (compute instances before their GPU instance), then creates.

    As many GPU instances as possible stay; one that stays with another compute cut is re-cut inside. Among targets of the
    same profile those whose compute cut is already there take the instance that has it.

    Args:
        pinned: instances that must not be touched (processes run there).

    Raises:
        GeometryError: a target that is not possible, or not around what is pinned.
    """
    state = GpuState.of(geometry, [instance.placement for instance in current])
    named = [target_.profile if target_.start is None else (target_.profile, target_.start) for target_ in target]
    change = repartition(state, named, pinned=pinned)
    at = {instance.placement: instance for instance in current}
    cut = _compute_cuts(geometry, target, change.target, at, pinned)
    steps: list[Step] = []
    for place in change.destroy:
        steps += [Step("destroy compute", place, (ci.slices, ci.start)) for ci in at[place].compute]
        steps.append(Step("destroy", place))
    for place in change.keep:
        have = {(ci.slices, ci.start) for ci in at[place].compute}
        steps += [Step("destroy compute", place, one) for one in sorted(have - set(cut[place]))]
    steps += [Step("create", place) for place in change.create]
    for place in sorted(change.keep + change.create):
        have = {(ci.slices, ci.start) for ci in at[place].compute} if place in change.keep else set()
        steps += [Step("create compute", place, one) for one in cut[place] if one not in have]
    return tuple(steps)


def _compute_cuts(
    geometry: GpuGeometry,
    target: Sequence[SliceTarget],
    state: GpuState,
    at: dict[Placement, GpuInstance],
    pinned: Collection[Placement],
) -> dict[Placement, tuple[tuple[int, int], ...]]:
    """Which compute cut goes to which place of the new state."""
    open_places = list(state.placements)
    cut: dict[Placement, tuple[tuple[int, int], ...]] = {}
    waiting: list[tuple[str, tuple[int, ...]]] = []
    for wanted in target:
        profile = geometry.profile(wanted.profile)
        sizes = (profile.compute_slices,) if wanted.compute is None else wanted.compute
        if wanted.start is not None:
            place = geometry.placement(profile.name, wanted.start)
            open_places.remove(place)
            cut[place] = _cut(geometry, place, sizes, at.get(place))
        else:
            waiting.append((profile.name, sizes))

    def same(place: Placement, sizes: tuple[int, ...]) -> bool:
        return place in at and sorted(ci.slices for ci in at[place].compute) == sorted(sizes)

    rest = []
    for name, sizes in waiting:
        fitting = [place for place in open_places if place.profile == name and same(place, sizes)]
        if not fitting:
            rest.append((name, sizes))
            continue
        # What is pinned goes first: nothing else may be asked of it.
        place = min(fitting, key=lambda place: (place not in pinned, place))
        open_places.remove(place)
        cut[place] = _cut(geometry, place, sizes, at[place])
    for name, sizes in rest:
        place = next(place for place in open_places if place.profile == name)
        open_places.remove(place)
        cut[place] = _cut(geometry, place, sizes, at.get(place))
    return cut


def _cut(
    geometry: GpuGeometry, place: Placement, sizes: Sequence[int], existing: GpuInstance | None
) -> tuple[tuple[int, int], ...]:
    """Places for the compute instances: where they are, if the sizes are the same already."""
    if existing is not None and sorted(ci.slices for ci in existing.compute) == sorted(sizes):
        return tuple(sorted((ci.slices, ci.start) for ci in existing.compute))
    return tuple(sorted(place_compute(geometry, place.profile, sizes), key=lambda one: one[1]))
