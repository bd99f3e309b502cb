"""The MIG controller: reads a GPU's partition, and changes it in the fewest steps or not at all.

Every change is planned first (``dry_run`` stops there), refused while processes run on the GPU, and undone when a step of it
fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass, replace
from typing import Any

from actors.mig.controller.errors import ControllerError, GpuBusy, MigOff, RollbackFailed, RolledBack
from actors.mig.controller.layout import Action, GpuInstance, SliceTarget, Step, fewest_steps
from actors.mig.controller.nvml import Nvml
from actors.mig.geometry import GpuGeometry, GpuInstanceProfile, GpuState, IllegalPlacement, Placement, place_best

_OPPOSITE: dict[Action, Action] = {
    "destroy compute": "create compute",
    "create compute": "destroy compute",
    "destroy": "create",
    "create": "destroy",
}


@dataclass(frozen=True)
class GpuStatus:
    """A GPU as it is. ``mig`` is None for a GPU without MIG; ``instances`` is empty where MIG is off."""

    gpu: int
    name: str
    uuid: str
    mig: bool | None
    mig_pending: bool | None
    geometry: GpuGeometry | None
    instances: tuple[GpuInstance, ...]
    processes: tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """What was done (or, dry, would be): the steps, and the instances afterwards (before, when dry)."""

    steps: tuple[Step, ...]
    instances: tuple[GpuInstance, ...]
    dry_run: bool


class MigController:
    """Controls the GPUs of this machine through an open ``Nvml``."""

    def __init__(self, nvml: Nvml):
        self.nvml = nvml

    def status(self, gpu: int) -> GpuStatus:
        """Everything about a GPU.

        Raises:
            NoNvml: there is no such GPU.
            NoPrivilege: MIG is on and its instances may not be read.
        """
        device = self.nvml.device(gpu)
        with self.nvml.sentences("read the GPU", gpu):
            mode = self.nvml.mig_mode(device)
            name, uuid = self.nvml.name(device), self.nvml.module.nvmlDeviceGetUUID(device)
            pids = tuple(sorted(self.nvml.processes(device)))
            geometry: GpuGeometry | None = None
            instances: tuple[GpuInstance, ...] = ()
            if mode is not None and mode[0]:
                geometry = self.nvml.geometry(device)
                instances = self.nvml.gpu_instances(device, geometry)
        current, pending = mode if mode is not None else (None, None)
        uuid = uuid.decode() if isinstance(uuid, bytes) else uuid
        return GpuStatus(gpu, name, uuid, current, pending, geometry, instances, pids)

    def set_mig_mode(self, gpu: int, enabled: bool, *, dry_run: bool = False) -> tuple[str, ...]:
        """Turns MIG mode on or off; off destroys the instances first. Returns what was (or would be) done.

        Raises:
            GpuBusy: processes run on the GPU.
            MigOff: the GPU has no MIG, or the change waits for a reset (Ampere): the sentence says how.
            NoPrivilege: the user may not.
        """
        nvml, device = self.nvml, self.nvml.device(gpu)
        mode = nvml.mig_mode(device)
        if mode is None:
            raise MigOff(f"GPU {gpu} ({nvml.name(device)}) has no MIG.")
        done = []
        word = "on" if enabled else "off"
        if mode == (enabled, enabled):
            return ()
        self._refuse_if_busy(device, gpu)
        if not enabled and mode[0]:
            change = self.repartition(gpu, [], dry_run=dry_run)
            done += [str(step) for step in change.steps]
        done.append(f"turn MIG mode of GPU {gpu} {word}")
        if dry_run:
            return tuple(done)
        with nvml.sentences(f"turn MIG mode {word}", gpu):
            activation = nvml.module.nvmlDeviceSetMigMode(device, int(enabled))
        if nvml.mig_mode(device) != (enabled, enabled):
            reason = "" if activation == 0 else f" (NVML's reason: error {activation})"
            raise MigOff(
                f"MIG mode of GPU {gpu} will be {word} after a reset{reason}: stop its clients (DCGM, nvidia-persistenced), "
                f"then run 'nvidia-smi --gpu-reset -i {gpu}' as root, or reboot."
            )
        return tuple(done)

    def create(
        self,
        gpu: int,
        profile: str,
        start: int | None = None,
        compute: Sequence[int] | None = None,
        *,
        dry_run: bool = False,
    ) -> Change:
        """Adds one GPU instance with compute instances of these slices (None: one, the whole); without ``start`` where it
        leaves most room.

        Raises:
            ControllerError, GeometryError: nothing was changed.
        """
        device, geometry, instances = self._open(gpu)
        state = GpuState.of(geometry, [instance.placement for instance in instances])
        if start is None:
            found = place_best([state], profile)
            if found is None:
                held = ", ".join(str(instance.placement) for instance in instances) or "nothing"
                raise IllegalPlacement(f"No place for {profile} is left on GPU {gpu}: it holds {held}.")
            start = found[1].start
        state.place(profile, start)  # the sentence that says why not
        kept = [_as_target(instance) for instance in instances]
        wanted = SliceTarget(profile, start, None if compute is None else tuple(compute))
        return self._change(gpu, device, geometry, instances, [*kept, wanted], dry_run)

    def destroy(self, gpu: int, instance_id: int, *, dry_run: bool = False) -> Change:
        """Destroys a GPU instance (by its id) with its compute instances.

        Raises:
            ControllerError: no such instance, busy, or it failed (and was undone).
        """
        device, geometry, instances = self._open(gpu)
        if instance_id not in {instance.id for instance in instances}:
            known = ", ".join(f"{i.id} ({i.placement})" for i in instances) or "none"
            raise ControllerError(f"GPU {gpu} has no GPU instance {instance_id}: it has {known}.")
        kept = [_as_target(instance) for instance in instances if instance.id != instance_id]
        return self._change(gpu, device, geometry, instances, kept, dry_run)

    def repartition(
        self,
        gpu: int,
        target: Sequence[SliceTarget],
        *,
        dry_run: bool = False,
        keep_running: bool = False,
    ) -> Change:
        """Makes the GPU hold exactly ``target``, in the fewest steps.

        Args:
            keep_running: instances on which processes run are kept untouched, instead of refusing the whole GPU.

        Raises:
            GeometryError: the target is not possible; nothing was changed.
            ControllerError: as ``RolledBack`` when a step failed.
        """
        device, geometry, instances = self._open(gpu)
        return self._change(gpu, device, geometry, instances, target, dry_run, keep_running)

    # The inside

    def _open(self, gpu: int) -> tuple[Any, GpuGeometry, tuple[GpuInstance, ...]]:
        device = self.nvml.device(gpu)
        mode = self.nvml.mig_mode(device)
        if mode is None:
            raise MigOff(f"GPU {gpu} ({self.nvml.name(device)}) has no MIG.")
        if not mode[0]:
            how = f"reset it ('nvidia-smi --gpu-reset -i {gpu}')" if mode[1] else (
                f"turn it on first: python -m apps.migperf controller enable --gpu {gpu}"
            )  # fmt: skip
            raise MigOff(f"MIG mode of GPU {gpu} is off: {how}.")
        with self.nvml.sentences("read the partition", gpu):
            geometry = self.nvml.geometry(device)
            return device, geometry, self.nvml.gpu_instances(device, geometry)

    def _refuse_if_busy(self, device: Any, gpu: int) -> None:
        pids = sorted(self.nvml.processes(device))
        if pids:
            raise GpuBusy(f"GPU {gpu} is busy: end process {', '.join(map(str, pids))} first.")

    def _change(
        self,
        gpu: int,
        device: Any,
        geometry: GpuGeometry,
        instances: tuple[GpuInstance, ...],
        target: Sequence[SliceTarget],
        dry_run: bool,
        keep_running: bool = False,
    ) -> Change:
        pinned: set[Placement] = set()
        if keep_running:
            busy = self.nvml.processes(device)
            whole = sorted(pid for pid, instance in busy.items() if instance is None)
            if whole:
                raise GpuBusy(f"GPU {gpu} is busy: end process {', '.join(map(str, whole))} first.")
            pinned = {instance.placement for instance in instances if instance.id in busy.values()}
        steps = fewest_steps(geometry, instances, target, pinned=pinned)
        touched = [step for step in steps if step.action.startswith("destroy") and step.placement in pinned]
        if touched:
            raise GpuBusy(f"GPU {gpu} is busy: processes run in {touched[0].placement}, which the plan would re-cut.")
        if dry_run or not steps:
            return Change(steps, instances, dry_run)
        if not keep_running:
            self._refuse_if_busy(device, gpu)
        done: list[Step] = []
        try:
            for step in steps:
                carried_out = self._do(device, gpu, geometry, step)
                done.append(carried_out)
        except BaseException as error:  # a Ctrl-C too must leave nothing half-created
            self._undo(device, gpu, geometry, done, error)
            raise
        with self.nvml.sentences("read the partition", gpu):
            return Change(steps, self.nvml.gpu_instances(device, geometry), False)

    def _undo(self, device: Any, gpu: int, geometry: GpuGeometry, done: list[Step], error: BaseException) -> None:
        """Takes the done steps back, the last one first; raises what the user is told, unless nothing had been done."""
        for step in reversed(done):
            try:
                self._do(device, gpu, geometry, replace(step, action=_OPPOSITE[step.action]))
            except ControllerError as second:
                try:
                    held = ", ".join(str(i.placement) for i in self.nvml.gpu_instances(device, geometry)) or "nothing"
                except ControllerError:
                    held = "what cannot be read"
                raise RollbackFailed(
                    f"{error} Undoing the {len(done)} steps before it failed too ({second}). GPU {gpu} now holds {held}."
                ) from error
        if done and isinstance(error, ControllerError):
            count = f"{len(done)} step{'s' if len(done) > 1 else ''}"
            raise RolledBack(f"{error} The {count} before it were undone: GPU {gpu} is cut as before.") from error

    def _do(self, device: Any, gpu: int, geometry: GpuGeometry, step: Step) -> Step:
        """One call of NVML; returns the step as it was done (a driver may put a compute instance elsewhere than the tables
        do)."""
        nvml, module = self.nvml, self.nvml.module
        profile = geometry.profile(step.placement.profile)
        with nvml.sentences(str(step), gpu):
            if step.action == "create":
                place = module.c_nvmlGpuInstancePlacement_t(step.placement.start, step.placement.size)
                module.nvmlDeviceCreateGpuInstanceWithPlacement(device, profile.profile_id, byref(place))
                return step
            handle = self._gpu_instance(device, step.placement, profile)
            if step.action == "destroy":
                module.nvmlGpuInstanceDestroy(handle)
            elif step.action == "create compute":
                return self._create_compute(handle, step)
            else:
                module.nvmlComputeInstanceDestroy(self._compute_instance(handle, step))
            return step

    def _gpu_instance(self, device: Any, place: Placement, profile: GpuInstanceProfile) -> Any:
        for handle in self.nvml.gpu_instance_handles(device, profile):
            if self.nvml.module.nvmlGpuInstanceGetInfo(handle).placement.start == place.start:
                return handle
        raise ControllerError(f"{place} is gone: something else changes this GPU's partition at the same time.")

    def _compute_profile(self, handle: Any, step: Step) -> tuple[Any, int, int]:
        """(NVML's info, slices, start)."""
        slices, start = step.compute if step.compute is not None else (0, 0)
        found = [info for _, info in self.nvml.compute_profiles(handle) if info.sliceCount == slices]
        if not found:
            raise ControllerError(f"Could not {step}: the driver has no compute profile of {slices} slices there.")
        return found[0], slices, start

    def _create_compute(self, handle: Any, step: Step) -> Step:
        module = self.nvml.module
        info, slices, start = self._compute_profile(handle, step)
        if (start, slices) in self.nvml.compute_placements(handle, info):
            place = module.c_nvmlComputeInstancePlacement_t(start, slices)
            module.nvmlGpuInstanceCreateComputeInstanceWithPlacement(handle, info.id, byref(place))
            return step
        made = module.nvmlGpuInstanceCreateComputeInstance(handle, info.id)
        return replace(step, compute=(slices, module.nvmlComputeInstanceGetInfo(made).placement.start))

    def _compute_instance(self, handle: Any, step: Step) -> Any:
        info, _, start = self._compute_profile(handle, step)
        for found in self.nvml.compute_instance_handles(handle, info):
            if self.nvml.module.nvmlComputeInstanceGetInfo(found).placement.start == start:
                return found
        raise ControllerError(f"Could not {step}: it is gone; something else changes this GPU at the same time.")


def _as_target(instance: GpuInstance) -> SliceTarget:
    return SliceTarget(
        instance.placement.profile, instance.placement.start, tuple(ci.slices for ci in instance.compute)
    )
