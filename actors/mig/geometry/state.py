"""The state of one GPU: which GPU instances it holds, what may still be created, and why something may not.

Immutable; the answers are bit operations on `GpuGeometry.conflicts` (a legality query takes about a microsecond).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from actors.mig.geometry.errors import GeometryError, IllegalPlacement
from actors.mig.geometry.model import GpuGeometry, Placement


@dataclass(frozen=True, repr=False)
class GpuState:
    """A legal set of GPU instances; ``mask`` has a bit for each of ``geometry.placements``. Build it with ``of`` or
    ``place``."""

    geometry: GpuGeometry
    mask: int = 0

    @staticmethod
    def of(geometry: GpuGeometry, placements: Iterable[tuple[str, int] | Placement]) -> GpuState:
        """The state that holds these placements, given as (profile, start).

        Raises:
            UnknownProfile, IllegalPlacement: the first one that is not possible beside those before it.
        """
        state = GpuState(geometry)
        for given in placements:
            profile, start = (given.profile, given.start) if isinstance(given, Placement) else given
            state = state.place(profile, start)
        return state

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Ordered by start."""
        return tuple(self.geometry.placements[number] for number in bits(self.mask))

    @property
    def profiles(self) -> Counter[str]:
        """How many instances there are of each profile."""
        return Counter(place.profile for place in self.placements)

    @property
    def compute_used(self) -> int:
        """Compute slices that instances own."""
        return self.geometry.compute_used(self.mask)

    @property
    def memory_used(self) -> int:
        """Memory slices that instances own."""
        return sum(place.size for place in self.placements)

    def can_place(self, profile: str, start: int) -> bool:
        """Whether creating this instance would succeed. False for a start that the profile never has.

        Raises:
            UnknownProfile: the GPU has no such profile.
        """
        known = self.geometry.profile(profile)
        number = self.geometry.index.get(Placement(start, known.name, known.memory_slices))
        return number is not None and fits(self.geometry, self.mask, number)

    def why_not(self, profile: str, start: int) -> str | None:
        """The sentence that says why this instance cannot be created; None when it can.

        Raises:
            UnknownProfile, IllegalPlacement: not even on an empty GPU.
        """
        geometry = self.geometry
        place = geometry.placement(profile, start)
        number = geometry.index[place]
        if fits(geometry, self.mask, number):
            return None
        what = f"{place.profile} at memory slice {start} of {geometry.gpu}"
        overlapping = [
            other for other in self.placements if other.start < start + place.size and start < other.start + other.size
        ]
        if overlapping:
            return f"{what} overlaps {', '.join(map(str, overlapping))}."
        if geometry.conflicts[number] & self.mask:
            return f"{what} does not fit: another instance has the media extensions, of which the GPU has one set."
        for mask, most, limited in geometry.limits:
            if mask >> number & 1 and (self.mask & mask).bit_count() >= most:
                return f"{what} does not fit: the GPU allows {most} of {limited.name}."
        return f"{what} does not fit: {self.compute_used} of {geometry.compute_slices} compute slices are taken."

    def place(self, profile: str, start: int) -> GpuState:
        """The state with one more instance.

        Raises:
            UnknownProfile, IllegalPlacement: with the reason.
        """
        reason = self.why_not(profile, start)
        if reason is not None:
            raise IllegalPlacement(reason)
        return GpuState(self.geometry, self.mask | 1 << self.geometry.index[self.geometry.placement(profile, start)])

    def remove(self, profile: str, start: int) -> GpuState:
        """The state with one instance less.

        Raises:
            UnknownProfile, IllegalPlacement: there is no such instance.
        """
        place = self.geometry.placement(profile, start)
        bit = 1 << self.geometry.index[place]
        if not self.mask & bit:
            present = ", ".join(map(str, self.placements)) or "nothing"
            raise IllegalPlacement(f"There is no {place} on {self.geometry.gpu}: it holds {present}.")
        return GpuState(self.geometry, self.mask & ~bit)

    def free_starts(self, profile: str) -> tuple[int, ...]:
        """Where an instance of the profile could be created now.

        Raises:
            UnknownProfile: the GPU has no such profile.
        """
        known = self.geometry.profile(profile)
        return tuple(start for start in known.starts if self.can_place(known.name, start))

    def remaining_capacity(self, profile: str) -> int:
        """How many more instances of this profile the GPU could hold (NVML's nvmlDeviceGetGpuInstanceRemainingCapacity).

        Raises:
            UnknownProfile: the GPU has no such profile.
        """
        return remaining(self.geometry, self.mask, self.geometry.profile(profile).name)

    def is_maximal(self) -> bool:
        """Whether no instance of any profile fits any more."""
        geometry = self.geometry
        return not any(fits(geometry, self.mask, number) for number in range(len(geometry.placements)))

    def __repr__(self) -> str:
        return f"{self.geometry.gpu}[{', '.join(map(str, self.placements))}]"


def bits(mask: int) -> Iterator[int]:
    """The numbers of the set bits, from low to high."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def fits(geometry: GpuGeometry, mask: int, number: int) -> bool:
    """Whether placement ``number`` may join the legal set ``mask``: nothing in its way, its profile's limit, compute slices
    left."""
    if geometry.conflicts[number] & mask or mask >> number & 1:
        return False
    bit = 1 << number
    for limited, most, _ in geometry.limits:
        if limited & bit and (mask & limited).bit_count() >= most:
            return False
    return geometry.compute_used(mask | bit) <= geometry.compute_slices


def remaining(geometry: GpuGeometry, mask: int, profile: str) -> int:
    """How many instances of ``profile`` can be added to the legal set ``mask``.

    Greedy in the order of the starts is exact: a profile's own places are disjoint or equal in size, so an earliest-end
    choice packs the most.
    """
    count = 0
    for number in bits(geometry.profile_masks[profile]):
        if fits(geometry, mask, number):
            mask |= 1 << number
            count += 1
    return count


def check_compute(geometry: GpuGeometry, profile: str, cuts: Iterable[tuple[int, int]]) -> None:
    """Compute instances of one GPU instance, each (compute slices, start), as they are to stand beside each other.

    Raises:
        UnknownProfile: no such GPU instance profile.
        GeometryError: no such compute profile, no such start, or two overlap.
    """
    known = {cut.compute_slices: cut for cut in geometry.compute_profiles(profile)}
    slices = geometry.profile(profile).compute_slices
    taken: dict[int, str] = {}
    for size, start in cuts:
        cut = known.get(size)
        if cut is None:
            sizes = ", ".join(f"{size}c" for size in known)
            raise GeometryError(f"{profile} has no compute instance of {size} slices: it has {sizes}.")
        if start not in cut.starts:
            starts = ", ".join(map(str, cut.starts))
            raise GeometryError(f"{cut.name(profile)} cannot start at compute slice {start}: it may start at {starts}.")
        for number in range(start, start + size):
            if number in taken:
                raise GeometryError(f"{cut.name(profile)} at compute slice {start} overlaps {taken[number]}.")
            taken[number] = f"{cut.name(profile)} at {start}"
    if len(taken) > slices:  # never, while every start ends inside
        raise GeometryError(f"{profile} has {slices} compute slices.")


def place_compute(geometry: GpuGeometry, profile: str, sizes: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Starts for compute instances of these sizes inside one GPU instance, each (compute slices, start), in the order given.

    Raises:
        GeometryError: they do not fit beside each other, whatever the places.
    """
    wanted = list(sizes)
    known = {cut.compute_slices: cut for cut in geometry.compute_profiles(profile)}
    for size in wanted:
        if size not in known:
            raise GeometryError(
                f"{profile} has no compute instance of {size} slices: it has {', '.join(f'{size}c' for size in known)}."
            )
    order = sorted(range(len(wanted)), key=lambda index: -wanted[index])
    starts: dict[int, int] = {}

    def search(depth: int, taken: int) -> bool:
        if depth == len(order):
            return True
        size = wanted[order[depth]]
        for start in known[size].starts:
            span = ((1 << size) - 1) << start
            if not span & taken:
                starts[order[depth]] = start
                if search(depth + 1, taken | span):
                    return True
        return False

    if not search(0, 0):
        asked = " + ".join(f"{size}c" for size in wanted)
        raise GeometryError(f"{asked} do not fit beside each other in {profile}.")
    return tuple((size, starts[index]) for index, size in enumerate(wanted))
