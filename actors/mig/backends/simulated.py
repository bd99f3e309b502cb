"""The backend ``sim``: a GPU of the published tables, cut by the exact rules of the geometry. It runs nothing itself.

What a workload does on a simulated slice is asked of published measurements or of the prediction model
(apps/migperf/sweep); here are the profiles, the legal partitions and the leases.
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.mig.backends.errors import BackendError, NoRoom, NoSuchProfile
from actors.mig.backends.interface import PREFIX, BookKeeping, DeviceSlice, SliceProfile
from actors.mig.geometry import GeometryError, GpuState, Placement, gpu_geometry, place_best, repartition
from actors.mig.geometry.moves import place_multiset
from actors.mig.prediction import parse_slice


class SimBackend(BookKeeping):
    """One GPU that exists in tables only."""

    name = "sim"
    label = "simulated from published tables and the prediction model"

    def __init__(self, gpu: str = "A100-80GB"):
        """Raises BackendError for a GPU without a table."""
        super().__init__()
        try:
            self._state = GpuState(gpu_geometry(gpu))
        except GeometryError as error:
            raise BackendError(str(error)) from error
        self._uuids: dict[Placement, str] = {}

    @property
    def device(self) -> str:
        return self._state.geometry.gpu

    def profiles(self) -> tuple[SliceProfile, ...]:
        found = []
        for profile in self._state.geometry.profiles:
            part = parse_slice(self.device, profile.name)
            found.append(
                SliceProfile(
                    profile.name,
                    part.sm_share,
                    part.memory_mib,
                    profile.max_instances,
                    part.sms,
                    part.bandwidth_share,
                )
            )
        return tuple(sorted(found, key=lambda one: (one.compute_share, one.bandwidth_share)))

    def slices(self) -> tuple[DeviceSlice, ...]:
        return tuple(self._slice(place) for place in self._state.placements)

    def create(self, profile: str) -> DeviceSlice:
        self.profile(profile)
        found = place_best([self._state], profile)
        if found is None:
            held = ", ".join(map(str, self._state.placements)) or "nothing"
            raise NoRoom(f"No place for {profile} is left on {self.device}: it holds {held}.")
        self._state = self._state.place(found[1].profile, found[1].start)
        return self._slice(found[1])

    def fits(self, profiles: Sequence[str]) -> bool:
        try:
            place_multiset(self._state.geometry, list(profiles))
        except GeometryError:
            return False
        return True

    def repartition(self, profiles: Sequence[str]) -> int:
        """As few steps as the geometry allows: what keeps its place is not touched."""
        pinned = {place for place in self._state.placements if self._uuids.get(place) in self._held}
        try:
            change = repartition(self._state, list(profiles), pinned=pinned)
        except GeometryError as error:
            raise NoSuchProfile(str(error)) from error
        for place in change.destroy:
            self._uuids.pop(place, None)
        self._state = change.target
        return change.steps

    def close(self) -> None:
        """Nothing was started."""

    def _slice(self, place: Placement) -> DeviceSlice:
        if place not in self._uuids:
            self._uuids[place] = self._new_uuid(f"{place.profile}-{place.start}")
        return DeviceSlice(self._uuids[place], self.name, self.device, place.profile, f"memory slice {place.start}")

    def _remove(self, found: DeviceSlice) -> None:
        place = next(place for place in self._state.placements if self._uuids.get(place) == found.uuid)
        del self._uuids[place]
        self._state = self._state.remove(place.profile, place.start)

    def _environment(self, found: DeviceSlice) -> dict[str, str]:
        return {f"{PREFIX}DEVICE": self.device, "CUDA_VISIBLE_DEVICES": ""}
