"""The backend ``mig``: real MIG devices of one GPU, cut by the controller over NVML (root, MIG mode on).

A lease is CUDA_VISIBLE_DEVICES with the UUID of one MIG device: a process sees one, and that one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from actors.mig.backends.errors import BackendError, BackendUnavailable, NoRoom, NoSuchProfile, SliceInUse
from actors.mig.backends.interface import BookKeeping, DeviceSlice, SliceProfile
from actors.mig.controller import (
    ControllerError,
    GpuBusy,
    GpuInstance,
    MigController,
    MigOff,
    NoNvml,
    NoPrivilege,
    Nvml,
    SliceTarget,
)
from actors.mig.geometry import GeometryError, GpuGeometry, IllegalPlacement, UnknownProfile
from actors.mig.geometry.moves import place_multiset


class MigBackend(BookKeeping):
    """One GPU of this machine. Every slice is a GPU instance with one compute instance, the whole of it."""

    name = "mig"
    label = "MIG: hardware partitions"

    def __init__(self, gpu: int = 0, module: Any = None, dry_run: bool = False):
        """``module``: a double of pynvml in tests. Nothing is read yet, so that an error comes from what needs it."""
        super().__init__()
        self.gpu, self.dry_run = gpu, dry_run
        self._module = module

    @property
    def device(self) -> str:
        return self._do(lambda controller: controller.status(self.gpu).name)

    def profiles(self) -> tuple[SliceProfile, ...]:
        geometry = self._do(self._geometry)
        full_sms = max((p.sm_count or 0 for p in geometry.profiles), default=0)
        found = [
            SliceProfile(
                p.name,
                (p.sm_count or 0) / full_sms if full_sms else p.compute_slices / geometry.compute_slices,
                p.memory_mib,
                p.max_instances,
                p.sm_count,
                p.memory_slices / geometry.memory_slices,
            )
            for p in geometry.profiles
        ]
        return tuple(sorted(found, key=lambda one: (one.compute_share, one.bandwidth_share)))

    def slices(self) -> tuple[DeviceSlice, ...]:
        status = self._do(lambda controller: controller.status(self.gpu))
        if status.mig is not True:
            self._do(lambda controller: controller.repartition(self.gpu, [], dry_run=True))  # the sentence: MIG is off
        return tuple(one for instance in status.instances for one in self._devices(status.name, instance))

    def create(self, profile: str) -> DeviceSlice:
        self.profile(profile)
        before = {found.uuid for found in self.slices()}
        change = self._do(lambda controller: controller.create(self.gpu, profile, dry_run=self.dry_run))
        if self.dry_run:
            raise BackendError("A dry run: would " + "; ".join(map(str, change.steps)) + ".")
        made = [found for found in self.slices() if found.uuid not in before]
        if not made:
            raise BackendError(f"The driver made no MIG device for {profile} on GPU {self.gpu}.")
        return made[0]

    def fits(self, profiles: Sequence[str]) -> bool:
        geometry = self._do(self._geometry)
        try:
            place_multiset(geometry, list(profiles))
        except GeometryError:
            return False
        return True

    def repartition(self, profiles: Sequence[str]) -> int:
        """Through the controller's own plan: fewest steps, undone when one fails; leased slices are left alone or refused."""
        wanted = [SliceTarget(name) for name in profiles]
        plan = self._do(lambda controller: controller.repartition(self.gpu, wanted, dry_run=True, keep_running=True))
        held = {lease.slice.detail: lease for lease in self._held.values()}
        for step in plan.steps:
            lease = held.get(_where(step.placement.start))
            if step.action.startswith("destroy") and lease is not None:
                self._refuse_if_held(lease.slice.uuid)
        change = self._do(
            lambda controller: controller.repartition(self.gpu, wanted, dry_run=self.dry_run, keep_running=True)
        )
        return sum(step.action in ("create", "destroy") for step in change.steps)

    def close(self) -> None:
        """Hardware slices stay as they are cut."""
        self._held.clear()

    # ---- the inside

    def _remove(self, found: DeviceSlice) -> None:
        def destroy(controller: MigController) -> None:
            for instance in controller.status(self.gpu).instances:
                if any(one.uuid == found.uuid for one in instance.compute):
                    controller.destroy(self.gpu, instance.id, dry_run=self.dry_run)

        self._do(destroy)

    def _environment(self, found: DeviceSlice) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": found.uuid, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}

    def _devices(self, device: str, instance: GpuInstance) -> Iterator[DeviceSlice]:
        for compute in instance.compute:
            if compute.uuid:
                place = instance.placement
                yield DeviceSlice(compute.uuid, self.name, device, place.profile, _where(place.start))

    def _geometry(self, controller: MigController) -> GpuGeometry:
        device = controller.nvml.device(self.gpu)
        with controller.nvml.sentences("read the profiles", self.gpu):
            return controller.nvml.geometry(device)

    def _do(self, work: Callable[[MigController], Any]) -> Any:
        with _sentences(), Nvml(self._module) as nvml:
            return work(MigController(nvml))


def _where(start: int) -> str:
    return f"memory slice {start}"


@contextmanager
def _sentences() -> Iterator[None]:
    """The controller's errors as the backends'; their sentences stay."""
    try:
        yield
    except (NoNvml, MigOff, NoPrivilege) as error:
        raise BackendUnavailable(str(error)) from error
    except GpuBusy as error:
        raise SliceInUse(str(error)) from error
    except UnknownProfile as error:
        raise NoSuchProfile(str(error)) from error
    except IllegalPlacement as error:
        raise NoRoom(str(error)) from error
    except (ControllerError, GeometryError) as error:
        raise BackendError(str(error)) from error
