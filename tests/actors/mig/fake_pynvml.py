"""A double of ``pynvml`` that keeps MIG's rules, for tests without a GPU: overlap, capacity, order of destruction,
privileges, MIG mode.

Written from NVIDIA's published tables, apart from `actors.mig.geometry` (so that the two can be held against each other).
Functions have pynvml's names and signatures, structures its fields: test_fake_pynvml.py compares both with the real module.
"""

from __future__ import annotations

import uuid
from ctypes import c_void_p, cast
from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml as real

from tests.actors.mig.fake_pynvml_types import (
    c_nvmlComputeInstance_t,
    c_nvmlComputeInstanceInfo_t,
    c_nvmlComputeInstancePlacement_t,
    c_nvmlComputeInstanceProfileInfo_v2_t,
    c_nvmlDevice_t,
    c_nvmlGpuInstance_t,
    c_nvmlGpuInstanceInfo_t,
    c_nvmlGpuInstancePlacement_t,
    c_nvmlGpuInstanceProfileInfo_t,
    c_nvmlGpuInstanceProfileInfo_v2_t,
)

GIB = 2**30
# name suffix: (enum, id, compute slices, memory slices, starts, count, ofa)
SEVEN = {
    "1g": (0, 19, 1, 1, [0, 1, 2, 3, 4, 5, 6], 7, 0),
    "1g+me": (7, 20, 1, 1, [0, 1, 2, 3, 4, 5, 6], 1, 1),
    "1g2": (9, 15, 1, 2, [0, 2, 4, 6], 4, 0),
    "2g": (1, 14, 2, 2, [0, 2, 4], 3, 0),
    "3g": (2, 9, 3, 4, [0, 4], 2, 0),
    "4g": (3, 5, 4, 4, [0], 1, 0),
    "7g": (4, 0, 7, 8, [0], 1, 1),
}
FOUR = {
    "1g": (0, 14, 1, 1, [0, 1, 2, 3], 4, 0),
    "1g+me": (7, 21, 1, 1, [0, 1, 2, 3], 1, 1),
    "2g": (1, 5, 2, 2, [0, 2], 2, 0),
    "2g+me": (8, 6, 2, 2, [0, 2], 1, 1),
    "4g": (3, 0, 4, 4, [0], 1, 1),
}
# (name, total GiB, table, memory slices, gigabytes in names by memory slices, SMs by compute slices, needs a reset for MIG)
NAMES_80 = {1: 10, 2: 20, 4: 40, 8: 80}
MODELS = {
    "A100-80GB": ("NVIDIA A100-SXM4-80GB", 80, SEVEN, 8, NAMES_80, {1: 14, 2: 28, 3: 42, 4: 56, 7: 98}, True),
    "H100-80GB": ("NVIDIA H100 80GB HBM3", 80, SEVEN, 8, NAMES_80, {1: 16, 2: 32, 3: 60, 4: 64, 7: 132}, False),
    "A30": ("NVIDIA A30", 24, FOUR, 4, {1: 6, 2: 12, 4: 24}, {1: 14, 2: 28, 4: 56}, True),
    "T4": ("Tesla T4", 16, {}, 0, {}, {}, False),
}  # fmt: skip
COMPUTE = {1: (0, 1), 2: (1, 2), 3: (2, 4), 4: (3, 4), 7: (4, 8)}  # slices: (enum and id, step of the starts)


@dataclass
class _Gpu:
    model: str
    uuid: str = ""
    current: int = 0
    pending: int = 0
    instances: dict[int, _Gi] = field(default_factory=dict)


@dataclass
class _Gi:
    gpu: _Gpu
    id: int
    kind: str
    start: int
    compute: dict[int, _Ci] = field(default_factory=dict)


@dataclass
class _Ci:
    gi: _Gi
    id: int
    slices: int
    start: int
    uuid: str


class NVMLError(Exception):
    def __init__(self, value):
        super().__init__(f"error {value}")
        self.value = value


class FakeNvml:
    """The module's double.

    ``root``: privileges. ``processes``: (pid, GPU, GI id or None). ``fail``: function name -> (which call from now, code).
    """

    NVMLError = NVMLError
    c_nvmlDevice_t = c_nvmlDevice_t
    c_nvmlGpuInstance_t = c_nvmlGpuInstance_t
    c_nvmlComputeInstance_t = c_nvmlComputeInstance_t
    c_nvmlGpuInstancePlacement_t = c_nvmlGpuInstancePlacement_t
    c_nvmlComputeInstancePlacement_t = c_nvmlComputeInstancePlacement_t

    def __init__(
        self, *models: str, root: bool = True, mig: bool = True, library: bool = True, old_driver: bool = False
    ):
        self.gpus = [_Gpu(model, f"GPU-{number:08d}", int(mig), int(mig)) for number, model in enumerate(models)]
        self.root, self.library, self.old_driver = root, library, old_driver
        self.processes: list[tuple[int, int, int | None]] = []
        self.fail: dict[str, tuple[int, int]] = {}
        self.calls: list[str] = []
        self.initialised = 0
        self._objects: dict[int, object] = {}
        self._next = 0x1000
        self._next_id = 1

    def __getattr__(self, name):
        # Constants are the real module's.
        if name.startswith("NVML_"):
            return getattr(real, name)
        raise AttributeError(name)

    # Of the tests: what happens outside NVML

    def reset(self, gpu: int) -> None:
        self.gpus[gpu].current = self.gpus[gpu].pending

    def layout(self, gpu: int = 0) -> list[tuple[str, int, tuple[tuple[int, int], ...]]]:
        """(kind, start, compute (slices, start)) of every instance."""
        return sorted(
            (gi.kind, gi.start, tuple(sorted((ci.slices, ci.start) for ci in gi.compute.values())))
            for gi in self.gpus[gpu].instances.values()
        )

    # NVML

    def nvmlInit(self):
        if not self.library:
            raise NVMLError(real.NVML_ERROR_LIBRARY_NOT_FOUND)
        self.initialised += 1

    def nvmlShutdown(self):
        self._called("nvmlShutdown")
        self.initialised -= 1

    def nvmlDeviceGetCount(self):
        self._called("nvmlDeviceGetCount")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        self._called("nvmlDeviceGetHandleByIndex")
        if not 0 <= index < len(self.gpus):
            raise NVMLError(real.NVML_ERROR_INVALID_ARGUMENT)
        return self._handle(self.gpus[index], c_nvmlDevice_t)

    def nvmlDeviceGetName(self, handle):
        return MODELS[self._object(handle).model][0]

    def nvmlDeviceGetUUID(self, handle):
        return self._object(handle).uuid

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):
        return SimpleNamespace(total=MODELS[self._object(handle).model][1] * GIB, free=0, used=0)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        self._called("nvmlDeviceGetComputeRunningProcesses")
        gpu = self.gpus.index(self._object(handle))
        return [
            SimpleNamespace(
                pid=pid, usedGpuMemory=None, gpuInstanceId=0xFFFFFFFF if gi is None else gi, computeInstanceId=0
            )
            for pid, owner, gi in self.processes
            if owner == gpu
        ]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle):
        return []

    def nvmlDeviceGetMPSComputeRunningProcesses(self, handle):
        raise NVMLError(real.NVML_ERROR_NOT_SUPPORTED)

    def nvmlDeviceGetMigMode(self, device):
        gpu = self._object(device)
        if not MODELS[gpu.model][2]:
            raise NVMLError(real.NVML_ERROR_NOT_SUPPORTED)
        return [gpu.current, gpu.pending]

    def nvmlDeviceSetMigMode(self, device, mode):
        self._called("nvmlDeviceSetMigMode", root=True)
        gpu = self._object(device)
        if gpu.instances or any(owner == self.gpus.index(gpu) for _, owner, _ in self.processes):
            raise NVMLError(real.NVML_ERROR_IN_USE)
        gpu.pending = mode
        if not MODELS[gpu.model][6]:
            gpu.current = mode
        return 0

    def nvmlDeviceGetGpuInstanceProfileInfo(self, device, profile, version=2):
        gpu = self._object(device)
        if self.old_driver and version == 2:
            raise NVMLError(real.NVML_ERROR_FUNCTION_NOT_FOUND)
        _, total, table, slices, names, sms, _ = MODELS[gpu.model]
        for kind, (enum, number, compute, memory, _, count, ofa) in table.items():
            if enum == profile:
                info = c_nvmlGpuInstanceProfileInfo_t() if version == 1 else c_nvmlGpuInstanceProfileInfo_v2_t()
                info.id, info.sliceCount, info.instanceCount, info.ofaCount = number, compute, count, ofa
                info.multiprocessorCount, info.copyEngineCount = sms[compute], compute
                info.memorySizeMB = int(total * 1024 * memory / slices * 0.97)
                if version == 2:
                    info.name = f"MIG {compute}g.{names[memory]}gb{'+me' if kind.endswith('+me') else ''}".encode()
                return info
        raise NVMLError(real.NVML_ERROR_NOT_SUPPORTED)

    def nvmlDeviceGetGpuInstancePossiblePlacements(self, device, profileId, placementsRef, countRef):
        self._called("nvmlDeviceGetGpuInstancePossiblePlacements", root=True)
        _, (_, _, _, memory, starts, _, _) = self._profile(self._object(device), profileId)
        return _fill([(start, memory) for start in starts], placementsRef, countRef)

    def nvmlDeviceGetGpuInstanceRemainingCapacity(self, device, profileId):
        self._called("nvmlDeviceGetGpuInstanceRemainingCapacity", root=True)
        gpu = self._on(device)
        kind, (_, _, _, memory, starts, count, _) = self._profile(gpu, profileId)
        free = sum(not self._memory(gpu) & set(range(start, start + memory)) for start in starts)
        return (
            0 if self._limited(gpu, kind) else min(free, count - sum(gi.kind == kind for gi in gpu.instances.values()))
        )

    def nvmlDeviceCreateGpuInstanceWithPlacement(self, device, profileId, placement):
        self._called("nvmlDeviceCreateGpuInstanceWithPlacement", root=True)
        gpu = self._on(device)
        kind, (_, _, _, memory, starts, _, _) = self._profile(gpu, profileId)
        wanted = placement._obj
        if wanted.start not in starts or wanted.size != memory:
            raise NVMLError(real.NVML_ERROR_INVALID_ARGUMENT)
        span = set(range(wanted.start, wanted.start + memory))
        if self._memory(gpu) & span or self._limited(gpu, kind):
            raise NVMLError(real.NVML_ERROR_INSUFFICIENT_RESOURCES)
        gi = _Gi(gpu, self._new_id(gpu.instances), kind, wanted.start)
        gpu.instances[gi.id] = gi
        return self._handle(gi, c_nvmlGpuInstance_t)

    def nvmlGpuInstanceDestroy(self, gpuInstance):
        self._called("nvmlGpuInstanceDestroy", root=True)
        gi = self._object(gpuInstance)
        if gi.compute:
            raise NVMLError(real.NVML_ERROR_IN_USE)
        if gi.gpu.instances.pop(gi.id, None) is None:
            raise NVMLError(real.NVML_ERROR_NOT_FOUND)
        return real.NVML_SUCCESS

    def nvmlDeviceGetGpuInstances(self, device, profileId, gpuInstancesRef, countRef):
        self._called("nvmlDeviceGetGpuInstances", root=True)
        gpu = self._on(device)
        kind, _ = self._profile(gpu, profileId)
        found = [gi for gi in gpu.instances.values() if gi.kind == kind]
        for index, gi in enumerate(found):
            gpuInstancesRef[index] = self._handle(gi, c_nvmlGpuInstance_t)
        countRef._obj.value = len(found)
        return real.NVML_SUCCESS

    def nvmlGpuInstanceGetInfo(self, gpuInstance):
        gi = self._object(gpuInstance)
        _, number, _, memory, *_ = MODELS[gi.gpu.model][2][gi.kind]
        return c_nvmlGpuInstanceInfo_t(None, gi.id, number, c_nvmlGpuInstancePlacement_t(gi.start, memory))

    def nvmlGpuInstanceGetComputeInstanceProfileInfo(self, device, profile, engProfile, version=2):
        gi = self._object(device)
        slices = MODELS[gi.gpu.model][2][gi.kind][2]
        for size, (enum, _) in COMPUTE.items():
            if enum == profile and size <= slices:
                info = c_nvmlComputeInstanceProfileInfo_v2_t()
                info.id, info.sliceCount, info.instanceCount = enum, size, len(_starts(size, slices))
                return info
        raise NVMLError(real.NVML_ERROR_NOT_SUPPORTED)

    def nvmlGpuInstanceGetComputeInstancePossiblePlacements(self, gpuInstance, profileId, placementsRef, countRef):
        self._called("nvmlGpuInstanceGetComputeInstancePossiblePlacements", root=True)
        gi = self._object(gpuInstance)
        size = _size(profileId)
        starts = _starts(size, MODELS[gi.gpu.model][2][gi.kind][2])
        return _fill([(start, size) for start in starts], placementsRef, countRef)

    def nvmlGpuInstanceCreateComputeInstance(self, gpuInstance, profileId):
        gi = self._object(gpuInstance)
        size = _size(profileId)
        for start in _starts(size, MODELS[gi.gpu.model][2][gi.kind][2]):
            if not _compute(gi) & set(range(start, start + size)):
                return self._new_compute(gi, size, start, "nvmlGpuInstanceCreateComputeInstance")
        raise NVMLError(real.NVML_ERROR_INSUFFICIENT_RESOURCES)

    def nvmlGpuInstanceCreateComputeInstanceWithPlacement(self, gpuInstance, profileId, placement):
        gi, size, wanted = self._object(gpuInstance), _size(profileId), placement._obj
        if wanted.size != size or wanted.start not in _starts(size, MODELS[gi.gpu.model][2][gi.kind][2]):
            raise NVMLError(real.NVML_ERROR_INVALID_ARGUMENT)
        return self._new_compute(gi, size, wanted.start, "nvmlGpuInstanceCreateComputeInstanceWithPlacement")

    def nvmlComputeInstanceDestroy(self, computeInstance):
        self._called("nvmlComputeInstanceDestroy", root=True)
        ci = self._object(computeInstance)
        gpu = self.gpus.index(ci.gi.gpu)
        if any(owner == gpu and gi == ci.gi.id for _, owner, gi in self.processes):
            raise NVMLError(real.NVML_ERROR_IN_USE)
        if ci.gi.compute.pop(ci.id, None) is None:
            raise NVMLError(real.NVML_ERROR_NOT_FOUND)
        return real.NVML_SUCCESS

    def nvmlGpuInstanceGetComputeInstances(self, gpuInstance, profileId, computeInstancesRef, countRef):
        self._called("nvmlGpuInstanceGetComputeInstances", root=True)
        gi, size = self._object(gpuInstance), _size(profileId)
        found = [ci for ci in gi.compute.values() if ci.slices == size]
        for index, ci in enumerate(found):
            computeInstancesRef[index] = self._handle(ci, c_nvmlComputeInstance_t)
        countRef._obj.value = len(found)
        return real.NVML_SUCCESS

    def nvmlComputeInstanceGetInfo(self, computeInstance):
        ci = self._object(computeInstance)
        return c_nvmlComputeInstanceInfo_t(
            None, None, ci.id, COMPUTE[ci.slices][0], c_nvmlComputeInstancePlacement_t(ci.start, ci.slices)
        )

    def nvmlDeviceGetMaxMigDeviceCount(self, device):
        return MODELS[self._object(device).model][3] and 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device, index):
        gpu = self._object(device)
        devices = [ci for gi in gpu.instances.values() for ci in gi.compute.values()]
        gap = int(len(devices) < 7)  # indices have gaps: here the first, while there is room for one
        if not gap <= index < len(devices) + gap:
            raise NVMLError(real.NVML_ERROR_NOT_FOUND)
        return self._handle(devices[index - gap], c_nvmlDevice_t)

    def nvmlDeviceGetGpuInstanceId(self, device):
        return self._object(device).gi.id

    def nvmlDeviceGetComputeInstanceId(self, device):
        return self._object(device).id

    # The inside

    def _called(self, name: str, root: bool = False) -> None:
        self.calls.append(name)
        if not self.initialised:
            raise NVMLError(real.NVML_ERROR_UNINITIALIZED)
        if root and not self.root:
            raise NVMLError(real.NVML_ERROR_NO_PERMISSION)
        number, code = self.fail.get(name, (0, 0))
        if number:
            self.fail[name] = (number - 1, code)
            if number == 1:
                raise NVMLError(code)

    def _handle(self, thing, kind):
        for address, known in self._objects.items():
            if known is thing:
                return cast(c_void_p(address), kind)
        self._next += 16
        self._objects[self._next] = thing
        return cast(c_void_p(self._next), kind)

    def _object(self, handle):
        return self._objects[cast(handle, c_void_p).value]

    def _on(self, device) -> _Gpu:
        gpu = self._object(device)
        if not gpu.current:
            raise NVMLError(real.NVML_ERROR_NOT_SUPPORTED)
        return gpu

    def _profile(self, gpu: _Gpu, number: int):
        for kind, row in MODELS[gpu.model][2].items():
            if row[1] == number:
                return kind, row
        raise NVMLError(real.NVML_ERROR_INVALID_ARGUMENT)

    def _memory(self, gpu: _Gpu) -> set[int]:
        rows = MODELS[gpu.model][2]
        return {slot for gi in gpu.instances.values() for slot in range(gi.start, gi.start + rows[gi.kind][3])}

    def _limited(self, gpu: _Gpu, kind: str) -> bool:
        """Whether the GPU's media engines or the profile's count are used up."""
        rows = MODELS[gpu.model][2]
        count = sum(gi.kind == kind for gi in gpu.instances.values())
        media = sum(rows[gi.kind][6] for gi in gpu.instances.values()) + rows[kind][6]
        compute = sum(rows[gi.kind][2] for gi in gpu.instances.values()) + rows[kind][2]
        return count >= rows[kind][5] or media > 1 or compute > max(row[2] for row in rows.values())

    def _new_id(self, taken) -> int:
        self._next_id += 3  # ids are not dense
        return self._next_id

    def _new_compute(self, gi: _Gi, size: int, start: int, name: str):
        self._called(name, root=True)
        if _compute(gi) & set(range(start, start + size)):
            raise NVMLError(real.NVML_ERROR_INSUFFICIENT_RESOURCES)
        ci = _Ci(gi, len(gi.compute) and max(gi.compute) + 1, size, start, f"MIG-{uuid.uuid4()}")
        gi.compute[ci.id] = ci
        return self._handle(ci, c_nvmlComputeInstance_t)


def _starts(size: int, slices: int) -> list[int]:
    if size == slices:
        return [0]
    return list(range(0, slices - size + 1, COMPUTE[size][1]))


def _size(profile_id: int) -> int:
    for size, (enum, _) in COMPUTE.items():
        if enum == profile_id:
            return size
    raise NVMLError(real.NVML_ERROR_INVALID_ARGUMENT)


def _compute(gi: _Gi) -> set[int]:
    return {slot for ci in gi.compute.values() for slot in range(ci.start, ci.start + ci.slices)}


def _fill(places, placementsRef, countRef):
    if placementsRef is not None:
        for index, (start, size) in enumerate(places):
            placementsRef[index].start, placementsRef[index].size = start, size
    countRef._obj.value = len(places)
    return real.NVML_SUCCESS
