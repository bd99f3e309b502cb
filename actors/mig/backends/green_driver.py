"""The few calls of CUDA's driver API that green contexts need, by ctypes: no CUDA toolkit, no privilege, no setting changed.

Prototypes are written as data (``PROTOTYPES``), so that a test compares them with cuda.h; ``library`` is a double in tests.
Needs a driver of CUDA 12.4 or later.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_ubyte, c_uint, c_void_p
from dataclasses import dataclass
from typing import Any

from actors.mig.backends.errors import BackendError, BackendUnavailable, NoRoom

RESOURCE_TYPE_SM = 1
DEFAULT_STREAM = 1
STREAM_NON_BLOCKING = 1


class SmResource(ctypes.Structure):
    """CUdevSmResource."""

    _fields_ = (
        ("smCount", c_uint),
        ("minSmPartitionSize", c_uint),
        ("smCoscheduledAlignment", c_uint),
        ("flags", c_uint),
    )


class _AnyResource(ctypes.Union):
    _fields_ = (("sm", SmResource), ("_oversize", c_ubyte * 40))


class DevResource(ctypes.Structure):
    """CUdevResource, ABI version 1 (older drivers, whose structure is shorter, write less of it)."""

    _anonymous_ = ("which",)
    _fields_ = (
        ("type", c_int),
        ("_internal_padding", c_ubyte * 92),
        ("which", _AnyResource),
        ("nextResource", c_void_p),
    )


# name: (argument types as cuda.h writes them, argument types of ctypes)
PROTOTYPES: dict[str, tuple[tuple[str, ...], tuple[Any, ...]]] = {
    "cuInit": (("unsigned int",), (c_uint,)),
    "cuDeviceGet": (("CUdevice*", "int"), (POINTER(c_int), c_int)),
    "cuDeviceGetCount": (("int*",), (POINTER(c_int),)),
    "cuDeviceGetName": (("char*", "int", "CUdevice"), (c_char_p, c_int, c_int)),
    "cuGetErrorString": (("CUresult", "const char**"), (c_int, POINTER(c_char_p))),
    "cuDevicePrimaryCtxRetain": (("CUcontext*", "CUdevice"), (POINTER(c_void_p), c_int)),
    "cuDevicePrimaryCtxRelease": (("CUdevice",), (c_int,)),
    "cuCtxSetCurrent": (("CUcontext",), (c_void_p,)),
    "cuDeviceGetDevResource": (
        ("CUdevice", "CUdevResource*", "CUdevResourceType"),
        (c_int, POINTER(DevResource), c_int),
    ),
    "cuDevSmResourceSplitByCount": (
        ("CUdevResource*", "unsigned int*", "const CUdevResource*", "CUdevResource*", "unsigned int", "unsigned int"),
        (POINTER(DevResource), POINTER(c_uint), POINTER(DevResource), POINTER(DevResource), c_uint, c_uint),
    ),
    "cuDevResourceGenerateDesc": (
        ("CUdevResourceDesc*", "CUdevResource*", "unsigned int"),
        (POINTER(c_void_p), POINTER(DevResource), c_uint),
    ),
    "cuGreenCtxCreate": (
        ("CUgreenCtx*", "CUdevResourceDesc", "CUdevice", "unsigned int"),
        (POINTER(c_void_p), c_void_p, c_int, c_uint),
    ),
    "cuGreenCtxDestroy": (("CUgreenCtx",), (c_void_p,)),
    "cuGreenCtxGetDevResource": (
        ("CUgreenCtx", "CUdevResource*", "CUdevResourceType"),
        (c_void_p, POINTER(DevResource), c_int),
    ),
    "cuGreenCtxStreamCreate": (
        ("CUstream*", "CUgreenCtx", "unsigned int", "int"),
        (POINTER(c_void_p), c_void_p, c_uint, c_int),
    ),
    "cuStreamDestroy": (("CUstream",), (c_void_p,)),
}
_EXPORTED = {"cuDevicePrimaryCtxRelease": "cuDevicePrimaryCtxRelease_v2", "cuStreamDestroy": "cuStreamDestroy_v2"}
"""Names that cuda.h redirects by a macro."""


@dataclass(frozen=True)
class SmGroup:
    """What a device (or a green context) has of SMs."""

    sm_count: int
    granularity: int
    """Partitions are multiples of this."""


class GreenDriver:
    """The driver, opened for one device."""

    def __init__(self, gpu: int = 0, library: Any = None):
        """Raises BackendUnavailable: no driver, a driver without green contexts, no such GPU."""
        self.gpu = gpu
        if library is None:
            try:
                library = ctypes.CDLL("libcuda.so.1")
            except OSError as error:
                raise BackendUnavailable(
                    "There is no CUDA driver (libcuda.so.1) on this machine: green contexts need an NVIDIA GPU."
                ) from error
        self._calls: dict[str, Any] = {}
        for name, (_, arguments) in PROTOTYPES.items():
            try:
                call = getattr(library, _EXPORTED.get(name, name))
            except AttributeError as error:
                raise BackendUnavailable(
                    f"The CUDA driver has no {name}: green contexts need a driver of CUDA 12.4 or later."
                ) from error
            call.argtypes, call.restype = arguments, c_int
            self._calls[name] = call
        self.call("cuInit", 0)
        count, device = c_int(), c_int()
        self.call("cuDeviceGetCount", byref(count))
        if not 0 <= gpu < count.value:
            raise BackendUnavailable(f"There is no GPU {gpu}: the CUDA driver sees {count.value}.")
        self.call("cuDeviceGet", byref(device), gpu)
        self.handle = device.value

    def call(self, name: str, *arguments: Any) -> None:
        """Raises BackendUnavailable with the driver's own words."""
        code = self._calls[name](*arguments)
        if code != 0:
            text = c_char_p()
            self._calls["cuGetErrorString"](code, byref(text))
            words = (text.value or b"error").decode().rstrip(".")
            raise BackendUnavailable(f"CUDA's {name} failed on GPU {self.gpu}: {words} (error {code}).")

    def name(self) -> str:
        text = ctypes.create_string_buffer(128)
        self.call("cuDeviceGetName", text, len(text), self.handle)
        return text.value.decode()

    def resource(self) -> DevResource:
        """All SMs of the device."""
        found = DevResource()
        self.call("cuDeviceGetDevResource", self.handle, byref(found), RESOURCE_TYPE_SM)
        return found

    def sms(self) -> SmGroup:
        """Raises BackendUnavailable on a GPU whose SMs cannot be partitioned."""
        return group_of(self.resource())


class GreenPartition:
    """Green contexts of one device in this process, on disjoint SMs. Use it as a context manager.

    Torch runs in one with ``torch.cuda.stream(torch.cuda.ExternalStream(partition.streams[i]))``.
    """

    def __init__(self, driver: GreenDriver, sms: Sequence[int]):
        """``sms``: SMs of each context in the order of the split; the driver may round them up (see ``sm_counts``).

        Raises:
            NoRoom: more SMs than the device has, or fewer than it can split off.
        """
        self._driver = driver
        self._contexts: list[c_void_p] = []
        self.streams: list[int] = []
        self.sm_counts: list[int] = []
        self._primary = c_void_p()
        driver.call("cuDevicePrimaryCtxRetain", byref(self._primary), driver.handle)
        try:
            driver.call("cuCtxSetCurrent", self._primary)
            self._split(sms)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GreenPartition:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Streams, contexts, then the hold on the primary context; the device must be idle."""
        for stream in self.streams:
            self._driver.call("cuStreamDestroy", c_void_p(stream))
        for context in self._contexts:
            self._driver.call("cuGreenCtxDestroy", context)
        self.streams, self._contexts = [], []
        if self._primary:
            self._primary = c_void_p()
            self._driver.call("cuDevicePrimaryCtxRelease", self._driver.handle)

    def _split(self, sms: Sequence[int]) -> None:
        rest = self._driver.resource()
        for number, wanted in enumerate(sms):
            left = rest.sm.smCount
            if not 0 < wanted <= left:
                raise NoRoom(f"{wanted} SMs cannot be split off GPU {self._driver.gpu}: {left} are left.")
            if wanted == left:
                part = rest
                rest = DevResource()
            else:
                part, remaining, groups = DevResource(), DevResource(), c_uint(1)
                self._driver.call(
                    "cuDevSmResourceSplitByCount", byref(part), byref(groups), byref(rest), byref(remaining), 0, wanted
                )
                if groups.value < 1:
                    raise NoRoom(f"The driver cannot split {wanted} of {left} SMs off GPU {self._driver.gpu}.")
                rest = remaining
            self._create(part, number)

    def _create(self, part: DevResource, number: int) -> None:
        driver = self._driver
        description, context, stream = c_void_p(), c_void_p(), c_void_p()
        driver.call("cuDevResourceGenerateDesc", byref(description), byref(part), 1)
        driver.call("cuGreenCtxCreate", byref(context), description, driver.handle, DEFAULT_STREAM)
        self._contexts.append(context)
        have = DevResource()
        driver.call("cuGreenCtxGetDevResource", context, byref(have), RESOURCE_TYPE_SM)
        self.sm_counts.append(have.sm.smCount)
        driver.call("cuGreenCtxStreamCreate", byref(stream), context, STREAM_NON_BLOCKING, 0)
        if stream.value is None:
            raise BackendError(f"The driver gave no stream for green context {number}.")
        self.streams.append(stream.value)


def group_of(resource: DevResource) -> SmGroup:
    """The count, and the step in which it can be split (8 on Hopper)."""
    sm = resource.sm
    return SmGroup(sm.smCount, max(sm.minSmPartitionSize, sm.smCoscheduledAlignment, 1))
