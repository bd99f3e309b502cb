"""What a GPU's MIG geometry is: profiles, the placements that each allows, and which placements exclude each other.

Pure data. `tables.py` fills it from NVIDIA's published tables (for the simulator and the planner), `actors.mig.controller`
from NVML (where there is a GPU). Names: a *GPU instance* (GI) owns memory slices and compute slices; a *compute instance*
(CI) inside it owns compute slices and shares the GI's memory. A placement is `{start}:size` in memory slices, as `nvidia-smi
mig -lgipp` prints it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from actors.mig.geometry.errors import GeometryError, IllegalPlacement, UnknownProfile


@dataclass(frozen=True, order=True)
class Placement:
    """A GPU instance profile at a place: it occupies memory slices ``start`` to ``start + size - 1``."""

    start: int
    profile: str
    size: int

    def __str__(self) -> str:
        return f"{self.profile}@{self.start}"


@dataclass(frozen=True)
class GpuInstanceProfile:
    """One way to cut a GPU instance. ``sm_count`` and ``memory_mib`` are None where they are not published.

    ``nvml_enum`` is what NVML's profile query takes (NVML_GPU_INSTANCE_PROFILE_*), ``profile_id`` what its answer and
    nvidia-smi call the profile and what creation takes: the two are different numbers.
    """

    name: str
    nvml_enum: int
    profile_id: int
    compute_slices: int
    memory_slices: int
    starts: tuple[int, ...]
    max_instances: int
    sm_count: int | None = None
    memory_mib: int | None = None
    copy_engines: int | None = None
    ofa_count: int = 0
    """Optical flow accelerators: a GPU has one, so only one instance with media extensions (``+me``) fits."""

    @property
    def media_extensions(self) -> bool:
        return "+me" in self.name

    @property
    def kind(self) -> str:
        """The profile without its gigabytes (``1g``, ``1g+me``, ``3g``); 1g with double memory has its parent's name
        ``1g.x2``."""
        double = ".x2" if self.compute_slices == 1 and self.memory_slices == 2 else ""
        return re.sub(r"\.[\d.]+gb", double, self.name)


@dataclass(frozen=True)
class ComputeInstanceProfile:
    """A way to cut a compute instance inside a GPU instance of ``gi_slices`` compute slices."""

    compute_slices: int
    gi_slices: int
    nvml_enum: int
    starts: tuple[int, ...]

    @property
    def max_instances(self) -> int:
        return len(self.starts)

    def name(self, gpu_instance_profile: str) -> str:
        """nvidia-smi's name: ``1c.3g.40gb``, and the GPU instance's own name when it takes the whole of it."""
        if self.compute_slices == self.gi_slices:
            return gpu_instance_profile
        return f"{self.compute_slices}c.{gpu_instance_profile}"


@dataclass(frozen=True)
class GpuGeometry:
    """A GPU's slices and profiles, and what follows from them (computed once, on first use).

    A set of placements is an integer with one bit a placement, in the order of ``placements``: the searches of this room are
    bit operations.
    """

    gpu: str
    compute_slices: int
    memory_slices: int
    profiles: tuple[GpuInstanceProfile, ...]
    sm_count: int | None = None
    """SMs with MIG off."""
    source: str = "tables"
    """``tables`` or ``nvml``."""

    def __post_init__(self) -> None:
        names = [profile.name for profile in self.profiles]
        if len(set(names)) != len(names):
            raise GeometryError(f"{self.gpu} has two profiles of the same name: {', '.join(names)}.")
        for profile in self.profiles:
            if any(start < 0 or start + profile.memory_slices > self.memory_slices for start in profile.starts):
                raise GeometryError(
                    f"{profile.name} of {self.gpu} reaches outside its {self.memory_slices} memory slices."
                )

    def profile(self, name: str) -> GpuInstanceProfile:
        """The profile of this name; ``3g`` is understood when it is the only profile of that kind.

        Raises:
            UnknownProfile: with the names that there are.
        """
        found = self._by_name.get(name.strip().removeprefix("MIG ").removeprefix("mig-"))
        if found is None:
            raise UnknownProfile(
                f"{self.gpu} has no profile {name!r}: it has {', '.join(p.name for p in self.profiles)}."
            )
        return found

    def placement(self, profile: str, start: int) -> Placement:
        """The placement of a profile at a memory slice.

        Raises:
            UnknownProfile, IllegalPlacement: the profile may not start there on an empty GPU.
        """
        known = self.profile(profile)
        found = Placement(start, known.name, known.memory_slices)
        if found not in self.index:
            allowed = ", ".join(map(str, known.starts))
            raise IllegalPlacement(
                f"{known.name} cannot start at memory slice {start} of {self.gpu}: it may start at {allowed}."
            )
        return found

    def restricted(self, names: set[str]) -> GpuGeometry:
        """The same GPU with these profiles only."""
        kept = tuple(profile for profile in self.profiles if profile.name in names)
        return GpuGeometry(self.gpu, self.compute_slices, self.memory_slices, kept, self.sm_count, self.source)

    @cached_property
    def _by_name(self) -> dict[str, GpuInstanceProfile]:
        names = {profile.name: profile for profile in self.profiles}
        kinds: dict[str, list[GpuInstanceProfile]] = {}
        for profile in self.profiles:
            kinds.setdefault(profile.kind, []).append(profile)
        return {**{kind: found[0] for kind, found in kinds.items() if len(found) == 1}, **names}

    @cached_property
    def placements(self) -> tuple[Placement, ...]:
        """Every placement that an empty GPU allows, ordered by start and size."""
        every = [Placement(start, p.name, p.memory_slices) for p in self.profiles for start in p.starts]
        return tuple(sorted(every, key=lambda place: (place.start, place.size, place.profile)))

    @cached_property
    def index(self) -> dict[Placement, int]:
        return {place: number for number, place in enumerate(self.placements)}

    @cached_property
    def profile_masks(self) -> dict[str, int]:
        """For each profile the bits of its placements."""
        masks = dict.fromkeys((profile.name for profile in self.profiles), 0)
        for number, place in enumerate(self.placements):
            masks[place.profile] |= 1 << number
        return masks

    @cached_property
    def conflicts(self) -> tuple[int, ...]:
        """For each placement the bits of those that cannot be beside it: overlapping memory, or no engine left (``+me``)."""
        ofa = {profile.name: profile.ofa_count for profile in self.profiles}
        ofa_total = max(ofa.values(), default=0)
        result = []
        for one in self.placements:
            bits = 0
            for number, other in enumerate(self.placements):
                overlap = one.start < other.start + other.size and other.start < one.start + one.size
                if overlap or ofa[one.profile] + ofa[other.profile] > ofa_total:
                    bits |= 1 << number
            result.append(bits)
        return tuple(result)

    @cached_property
    def limits(self) -> tuple[tuple[int, int, GpuInstanceProfile], ...]:
        """Per profile (bits, most instances, profile) where the number of its places alone does not keep the limit."""
        return tuple(
            (self.profile_masks[p.name], p.max_instances, p) for p in self.profiles if p.max_instances < len(p.starts)
        )

    @cached_property
    def weights(self) -> tuple[tuple[int, int], ...]:
        """(bits of the placements, compute slices of each) for every number of compute slices."""
        masks: dict[int, int] = {}
        for profile in self.profiles:
            masks[profile.compute_slices] = masks.get(profile.compute_slices, 0) | self.profile_masks[profile.name]
        return tuple((mask, slices) for slices, mask in sorted(masks.items()))

    def compute_used(self, mask: int) -> int:
        """Compute slices of a set of placements."""
        return sum(slices * (mask & bits).bit_count() for bits, slices in self.weights)

    def compute_profiles(self, gpu_instance_profile: str) -> tuple[ComputeInstanceProfile, ...]:
        """How compute instances may be cut inside a GPU instance.

        The counts are those of `nvidia-smi mig -lcip` (7g: 1c x7, 2c x3, 3c x2, 4c x1, 7c x1); the starts are the only ones
        in steps of 1, 2 and 4 that give these counts. Where there is a GPU, NVML says them.
        """
        slices = self.profile(gpu_instance_profile).compute_slices
        found = []
        for size, step, enum in ((1, 1, 0), (2, 2, 1), (3, 4, 2), (4, 4, 3)):
            if size < slices:
                starts = tuple(range(0, slices - size + 1, step))
                found.append(ComputeInstanceProfile(size, slices, enum, starts))
        found.append(ComputeInstanceProfile(slices, slices, {1: 0, 2: 1, 3: 2, 4: 3, 6: 6, 7: 4, 8: 5}[slices], (0,)))
        return tuple(found)
