"""The backend ``green``: SMs of one GPU partitioned by CUDA green contexts: no privilege, no setting of the GPU changed.

SMs alone are isolated: L2, memory bandwidth, memory and the copy engines are shared, so small slices look faster on kernels
that are bound by bandwidth than MIG slices would be. Disjoint SMs run truly beside each other within *one* process; leases of
several processes name disjoint SMs too, but the GPU switches between processes in time unless MPS runs.
"""

from __future__ import annotations

from collections.abc import Callable

from actors.mig.backends.errors import NoRoom
from actors.mig.backends.green_driver import GreenDriver
from actors.mig.backends.interface import PREFIX, BookKeeping, DeviceSlice, SliceProfile

EIGHTHS = (1, 2, 3, 4, 8)


class GreenBackend(BookKeeping):
    """One GPU of this machine; profiles are named by the SMs that they really have: ``green16``."""

    name = "green"
    label = "green contexts: SMs isolated, bandwidth and memory shared"

    def __init__(
        self, gpu: int = 0, memory_mib: float | None = None, driver: Callable[[int], GreenDriver] = GreenDriver
    ):
        """``memory_mib``: of the GPU; when given, each process's memory is capped in proportion to its SMs.

        Raises:
            BackendUnavailable: no driver, an old one, no such GPU, or SMs that cannot be split.
        """
        super().__init__()
        self.gpu, self.memory_mib = gpu, memory_mib
        opened = driver(gpu)
        self._name, self._sms = opened.name(), opened.sms()
        self._slices: list[tuple[DeviceSlice, int]] = []

    @property
    def device(self) -> str:
        return self._name

    def profiles(self) -> tuple[SliceProfile, ...]:
        total, step = self._sms.sm_count, self._sms.granularity
        sizes = sorted({max(step, total * k // 8 // step * step) if k < 8 else total for k in EIGHTHS})
        return tuple(
            SliceProfile(
                f"green{sms}",
                sms / total,
                None if self.memory_mib is None else self.memory_mib * sms / total,
                total // sms,
                sms,
            )
            for sms in sizes
        )

    def slices(self) -> tuple[DeviceSlice, ...]:
        return tuple(found for found, _ in self._slices)

    def create(self, profile: str) -> DeviceSlice:
        known = self.profile(profile)
        sms = known.sm_count or 0
        taken = sum(count for _, count in self._slices)
        if taken + sms > self._sms.sm_count:
            raise NoRoom(f"No room for {profile}: {self._sms.sm_count - taken} SMs of GPU {self.gpu} are free.")
        made = DeviceSlice(self._new_uuid(profile), self.name, self.device, profile, f"{sms} SMs after {taken}")
        self._slices.append((made, sms))
        return made

    def close(self) -> None:
        """Contexts live in the processes that entered them, and end with them."""
        self._held.clear()
        self._slices.clear()

    def _remove(self, found: DeviceSlice) -> None:
        self._slices = [(one, sms) for one, sms in self._slices if one.uuid != found.uuid]

    def _environment(self, found: DeviceSlice) -> dict[str, str]:
        number = next(n for n, (one, _) in enumerate(self._slices) if one.uuid == found.uuid)
        layout = [sms for _, sms in self._slices[: number + 1]]
        variables = {"CUDA_VISIBLE_DEVICES": str(self.gpu), f"{PREFIX}SMS": ",".join(map(str, layout))}
        if self.memory_mib is not None:
            variables[f"{PREFIX}MEMORY_FRACTION"] = f"{layout[-1] / self._sms.sm_count:.4f}"
        return variables
