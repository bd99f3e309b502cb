"""NVML behind one class: initialised and shut down as a context, errors as sentences, reads as data. No text of nvidia-smi is
parsed.

`nvidia-ml-py` (module ``pynvml``) is the only binding; tests hand in a double whose signatures are compared with it. A
profile is *queried* by its enum (0, 7, 9, ...) and *created* by the id that the query returns (19, 20, 15, ...).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import byref, c_uint
from typing import Any

from actors.mig.controller.errors import ControllerError, GpuBusy, MigOff, NoNvml, NoPrivilege
from actors.mig.controller.layout import ComputeInstance, GpuInstance
from actors.mig.geometry import GpuGeometry, GpuInstanceProfile, Placement

NO_INSTANCE = 0xFFFFFFFF
_ME_ENUMS = (7, 8)  # 1_SLICE_REV1 and 2_SLICE_REV1


class Nvml:
    """NVML's calls for one GPU controller. Use it as a context; handles are only valid inside."""

    def __init__(self, module: Any = None):
        """``module``: pynvml by default."""
        if module is None:
            try:
                import pynvml as module  # type: ignore[no-redef]
            except ImportError as error:
                raise NoNvml("The package nvidia-ml-py is not installed: pip install nvidia-ml-py.") from error
        self.module = module

    def __enter__(self) -> Nvml:
        with self.sentences("start NVML"):
            self.module.nvmlInit()
        return self

    def __exit__(self, *_: object) -> None:
        self.module.nvmlShutdown()

    @contextmanager
    def sentences(self, doing: str, gpu: int | None = None) -> Iterator[None]:
        """Turns an NVMLError of the block into a ControllerError that says what could not be done and why."""
        try:
            yield
        except self.module.NVMLError as error:
            raise self._sentence(error, doing, gpu) from error

    def _sentence(self, error: Any, doing: str, gpu: int | None) -> ControllerError:
        nvml = self.module
        where = "" if gpu is None else f" on GPU {gpu}"
        code = error.value
        if code == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            return NoNvml(
                "There is no NVML library (libnvidia-ml.so.1) on this machine: it comes with NVIDIA's driver."
            )
        if code == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
            return NoNvml("NVIDIA's driver is not loaded on this machine.")
        if code == nvml.NVML_ERROR_NO_PERMISSION:
            return NoPrivilege(
                f"Could not {doing}{where}: that needs root (or, in a container, CAP_SYS_ADMIN and "
                "NVIDIA_MIG_CONFIG_DEVICES=all). The backend 'green' needs no privilege."
            )
        if code == nvml.NVML_ERROR_NOT_SUPPORTED:
            return MigOff(f"Could not {doing}{where}: the GPU has no MIG, or MIG mode is off.")
        if code == nvml.NVML_ERROR_IN_USE:
            return GpuBusy(f"Could not {doing}{where}: it is in use. End what runs there first.")
        if code == nvml.NVML_ERROR_INSUFFICIENT_RESOURCES:
            return ControllerError(f"Could not {doing}{where}: what the GPU holds leaves no room for it.")
        return ControllerError(f"Could not {doing}{where}: NVML says '{error}'.")

    # What there is

    def device(self, gpu: int) -> Any:
        """The handle of a GPU.

        Raises:
            NoNvml: there is no such GPU.
        """
        with self.sentences("count the GPUs"):
            count = self.module.nvmlDeviceGetCount()
        if not 0 <= gpu < count:
            there = "no GPU" if count == 0 else f"{count} GPU{'s' if count > 1 else ''}, numbered from 0"
            raise NoNvml(f"There is no GPU {gpu}: this machine has {there}.")
        with self.sentences("open the device", gpu):
            return self.module.nvmlDeviceGetHandleByIndex(gpu)

    def name(self, device: Any) -> str:
        return _text(self.module.nvmlDeviceGetName(device))

    def mig_mode(self, device: Any) -> tuple[bool, bool] | None:
        """(current, pending); None when the GPU has no MIG."""
        try:
            current, pending = self.module.nvmlDeviceGetMigMode(device)
        except self.module.NVMLError as error:
            if error.value == self.module.NVML_ERROR_NOT_SUPPORTED:
                return None
            raise self._sentence(error, "read MIG mode", None) from error
        return bool(current), bool(pending)

    def processes(self, device: Any) -> dict[int, int | None]:
        """Process ids on the GPU, each with the id of its GPU instance (None: the whole GPU, or not known)."""
        found: dict[int, int | None] = {}
        nvml = self.module
        for query in (
            nvml.nvmlDeviceGetComputeRunningProcesses,
            nvml.nvmlDeviceGetGraphicsRunningProcesses,
            nvml.nvmlDeviceGetMPSComputeRunningProcesses,
        ):
            try:
                running = query(device)
            except nvml.NVMLError as error:
                if error.value == nvml.NVML_ERROR_NOT_SUPPORTED:
                    continue
                raise self._sentence(error, "list the processes", None) from error
            for process in running:
                instance = getattr(process, "gpuInstanceId", NO_INSTANCE)
                found[process.pid] = None if instance in (None, NO_INSTANCE) else instance
        return found

    def geometry(self, device: Any) -> GpuGeometry:
        """The GPU's profiles and placements as the driver says them (needs privilege; MIG mode may be off)."""
        profiles = []
        most_compute = most_memory = 1
        nvml = self.module
        total = nvml.nvmlDeviceGetMemoryInfo(device).total
        for enum in range(nvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
            info = self._profile_info(device, enum)
            if info is None:
                continue
            places = self._gpu_instance_placements(device, info)
            if not places:
                continue
            size = places[0][1]
            profiles.append(
                GpuInstanceProfile(
                    name=_profile_name(info, enum, total),
                    nvml_enum=enum,
                    profile_id=info.id,
                    compute_slices=info.sliceCount,
                    memory_slices=size,
                    starts=tuple(sorted(start for start, _ in places)),
                    max_instances=info.instanceCount,
                    sm_count=info.multiprocessorCount,
                    memory_mib=info.memorySizeMB,
                    copy_engines=info.copyEngineCount,
                    ofa_count=info.ofaCount,
                )
            )
            most_compute = max(most_compute, info.sliceCount)
            most_memory = max(most_memory, *(start + size for start, _ in places))
        if not profiles:
            raise MigOff(f"{self.name(device)} has no MIG profiles.")
        return GpuGeometry(self.name(device), most_compute, most_memory, tuple(profiles), source="nvml")

    def _gpu_instance_placements(self, device: Any, info: Any) -> list[tuple[int, int]]:
        return self._placements(
            lambda ref, count: self.module.nvmlDeviceGetGpuInstancePossiblePlacements(device, info.id, ref, count),
            self.module.c_nvmlGpuInstancePlacement_t,
            "list the placements",
        )

    def _profile_info(self, device: Any, enum: int) -> Any:
        """None for a profile that this GPU does not have; drivers before the named query answer version 1."""
        nvml = self.module
        skip = (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_INVALID_ARGUMENT)
        for version in (2, 1):
            try:
                return nvml.nvmlDeviceGetGpuInstanceProfileInfo(device, enum, version=version)
            except nvml.NVMLError as error:
                if error.value == nvml.NVML_ERROR_FUNCTION_NOT_FOUND and version == 2:
                    continue
                if error.value in skip:
                    return None
                raise self._sentence(error, "read the profiles", None) from error
        return None

    def _placements(self, query: Callable[[Any, Any], Any], kind: Any, doing: str) -> list[tuple[int, int]]:
        count = c_uint(0)
        with self.sentences(doing):
            query(None, byref(count))
            if not count.value:
                return []
            array = (kind * count.value)()
            query(array, byref(count))
        return [(array[number].start, array[number].size) for number in range(count.value)]

    # What exists

    def gpu_instances(self, device: Any, geometry: GpuGeometry) -> tuple[GpuInstance, ...]:
        """All GPU instances with their compute instances and the UUIDs of their MIG devices (needs privilege)."""
        nvml = self.module
        uuids = self.uuids(device)
        found = []
        for profile in geometry.profiles:
            for handle in self.gpu_instance_handles(device, profile):
                info = nvml.nvmlGpuInstanceGetInfo(handle)
                compute = self._compute_instances(handle, info.id, uuids)
                place = Placement(info.placement.start, profile.name, info.placement.size)
                found.append(GpuInstance(info.id, place, compute))
        return tuple(sorted(found, key=lambda instance: instance.placement))

    def _compute_instances(
        self, gpu_instance: Any, gi: int, uuids: dict[tuple[int, int], str]
    ) -> tuple[ComputeInstance, ...]:
        nvml = self.module
        found = []
        for _, info in self.compute_profiles(gpu_instance):
            for handle in self.compute_instance_handles(gpu_instance, info):
                have = nvml.nvmlComputeInstanceGetInfo(handle)
                uuid = uuids.get((gi, have.id), "")
                found.append(ComputeInstance(have.id, info.sliceCount, have.placement.start, uuid))
        return tuple(sorted(found, key=lambda one: one.start))

    def compute_profiles(self, gpu_instance: Any) -> list[tuple[int, Any]]:
        """(enum, NVML's info) of the compute instance profiles of a GPU instance."""
        nvml = self.module
        found = []
        for enum in range(nvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
            try:
                info = nvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(
                    gpu_instance, enum, nvml.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED
                )
            except nvml.NVMLError as error:
                if error.value in (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_INVALID_ARGUMENT):
                    continue
                raise self._sentence(error, "read the compute profiles", None) from error
            found.append((enum, info))
        return found

    def gpu_instance_handles(self, device: Any, profile: GpuInstanceProfile) -> list[Any]:
        """NVML's handles of the GPU instances of one profile."""
        return self._handles(
            lambda ref, count: self.module.nvmlDeviceGetGpuInstances(device, profile.profile_id, ref, count),
            self.module.c_nvmlGpuInstance_t,
            profile.max_instances,
            "list the GPU instances",
        )

    def compute_instance_handles(self, gpu_instance: Any, info: Any) -> list[Any]:
        """NVML's handles of the compute instances of one compute profile."""
        return self._handles(
            lambda ref, count: self.module.nvmlGpuInstanceGetComputeInstances(gpu_instance, info.id, ref, count),
            self.module.c_nvmlComputeInstance_t,
            info.instanceCount,
            "list the compute instances",
        )

    def compute_placements(self, gpu_instance: Any, info: Any) -> list[tuple[int, int]]:
        """(start, size) of every place that a compute profile has in its GPU instance."""
        return self._placements(
            lambda ref, count: self.module.nvmlGpuInstanceGetComputeInstancePossiblePlacements(
                gpu_instance, info.id, ref, count
            ),
            self.module.c_nvmlComputeInstancePlacement_t,
            "list the compute placements",
        )

    def _handles(self, query: Callable[[Any, Any], Any], kind: Any, most: int, doing: str) -> list[Any]:
        array = (kind * max(1, most))()
        count = c_uint(0)
        with self.sentences(doing):
            query(array, byref(count))
        return [array[number] for number in range(count.value)]

    def uuids(self, device: Any) -> dict[tuple[int, int], str]:
        """UUIDs of the GPU's MIG devices by (GPU instance id, compute instance id); readable without privilege."""
        nvml = self.module
        found: dict[tuple[int, int], str] = {}
        try:
            most = nvml.nvmlDeviceGetMaxMigDeviceCount(device)
        except nvml.NVMLError:
            return {}
        for index in range(most):
            try:
                handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(device, index)
            except nvml.NVMLError as error:
                if error.value in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_INVALID_ARGUMENT):
                    continue  # indices of MIG devices have gaps
                if error.value == nvml.NVML_ERROR_NOT_SUPPORTED:
                    return found
                raise self._sentence(error, "list the MIG devices", None) from error
            ids = nvml.nvmlDeviceGetGpuInstanceId(handle), nvml.nvmlDeviceGetComputeInstanceId(handle)
            found[ids] = _text(nvml.nvmlDeviceGetUUID(handle))
        return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _profile_name(info: Any, enum: int, total_bytes: int) -> str:
    """NVML's name; where the driver gives none, slices and the rounded eighths of the GPU's memory, as nvidia-smi names
    them."""
    given = _text(getattr(info, "name", b"")).removeprefix("MIG ").strip()
    if re.match(r"\d+g\.", given):
        return given
    eighths = round(info.memorySizeMB * 2**20 / total_bytes * 8)
    gigabytes = round(eighths / 8 * -(-total_bytes // 2**30))
    return f"{info.sliceCount}g.{gigabytes}gb{'+me' if enum in _ME_ENUMS else ''}"
