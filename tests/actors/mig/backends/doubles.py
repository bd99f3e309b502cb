"""Doubles of CUDA's driver library and of the MPS control daemon, for tests without a GPU.

The driver's takes the arguments that ctypes would pass and keeps the rules: SMs are split in steps of 8, never twice, and
what was created must be destroyed. Its prototypes are held against cuda.h in test_green.py.
"""

from __future__ import annotations

import subprocess
from ctypes import c_int, cast, pointer

from actors.mig.backends.green_driver import _EXPORTED, PROTOTYPES, SmResource


class _Call:
    """A function of the library: ctypes sets argtypes and restype on it."""

    def __init__(self, function, name):
        self._function, self.name = function, name
        self.argtypes, self.restype = None, c_int

    def __call__(self, *arguments):
        assert len(arguments) == len(PROTOTYPES[self.name][0]), self.name
        return self._function(*arguments)


class FakeCuda:
    """libcuda.so.1 of a GPU with 132 SMs in steps of 8 (H100). ``fail``: name -> error code."""

    def __init__(self, gpus: int = 1, sms: int = 132, missing: tuple[str, ...] = ()):
        self.gpus, self.total = gpus, sms
        self.fail: dict[str, int] = {}
        self.contexts: dict[int, int] = {}
        self.streams: set[int] = set()
        self.primary = 0
        self._next = 1
        for name in PROTOTYPES:
            if name not in missing:
                setattr(self, _EXPORTED.get(name, name), _Call(self._guard(name), name))

    def _guard(self, name):
        function = getattr(self, "_" + name)

        def call(*arguments):
            return self.fail.get(name) or function(*arguments) or 0

        return call

    def _new(self) -> int:
        self._next += 1
        return self._next

    def _cuInit(self, flags):
        assert flags == 0

    def _cuDeviceGetCount(self, count):
        count._obj.value = self.gpus

    def _cuDeviceGet(self, device, number):
        device._obj.value = number

    def _cuDeviceGetName(self, text, size, device):
        text.value = b"NVIDIA H100 80GB HBM3"

    def _cuGetErrorString(self, code, text):
        text._obj.value = b"operation not supported"

    def _cuDevicePrimaryCtxRetain(self, context, device):
        self.primary += 1
        context._obj.value = 99

    def _cuDevicePrimaryCtxRelease(self, device):
        self.primary -= 1

    def _cuCtxSetCurrent(self, context):
        assert context.value == 99

    def _cuDeviceGetDevResource(self, device, resource, kind):
        assert kind == 1
        self._set(resource._obj, self.total)

    def _cuDevSmResourceSplitByCount(self, result, groups, given, remaining, flags, least):
        sms = -(-least // 8) * 8
        left = given._obj.sm.smCount
        if groups._obj.value < 1 or sms > left:
            return 1
        groups._obj.value = 1
        self._set(result._obj, sms)
        self._set(remaining._obj, left - sms)
        return None

    def _cuDevResourceGenerateDesc(self, description, resources, count):
        assert count == 1
        description._obj.value = 1000 + resources._obj.sm.smCount

    def _cuGreenCtxCreate(self, context, description, device, flags):
        assert flags == 1  # CU_GREEN_CTX_DEFAULT_STREAM is required
        sms = description.value - 1000
        if sum(self.contexts.values()) + sms > self.total:
            return 2
        context._obj.value = self._new()
        self.contexts[context._obj.value] = sms
        return None

    def _cuGreenCtxDestroy(self, context):
        del self.contexts[context.value]

    def _cuGreenCtxGetDevResource(self, context, resource, kind):
        self._set(resource._obj, self.contexts[context.value])

    def _cuGreenCtxStreamCreate(self, stream, context, flags, priority):
        assert flags == 1  # CU_STREAM_NON_BLOCKING is the only one allowed
        assert context.value in self.contexts
        stream._obj.value = self._new()
        self.streams.add(stream._obj.value)

    def _cuStreamDestroy(self, stream):
        self.streams.remove(stream.value)

    @staticmethod
    def _set(resource, sms):
        resource.type = 1
        cast(pointer(resource.sm), type(pointer(SmResource())))[0] = SmResource(sms, 8, 8, 0)


class FakeMpsDaemon:
    """``subprocess.run`` for nvidia-cuda-mps-control. ``answers``: the daemon serves; ``starts``: -d succeeds."""

    def __init__(self, starts: bool = True, answers: bool = True):
        self.starts, self.answers = starts, answers
        self.running: set[str] = set()
        self.calls: list[tuple[list[str], str | None]] = []

    def run(self, command, *, input, env, capture_output, text, timeout, check):
        self.calls.append((command, input))
        folder = env["CUDA_MPS_PIPE_DIRECTORY"]
        if command == ["nvidia-cuda-mps-control", "-d"]:
            if not self.starts:
                return subprocess.CompletedProcess(command, 1, "", "An instance of this daemon is already running\n")
            self.running.add(folder)
            return subprocess.CompletedProcess(command, 0, "", "")
        if not self.answers and not input.startswith("quit"):
            raise subprocess.TimeoutExpired(command, timeout)
        if input.startswith("quit"):
            self.running.discard(folder)
        return subprocess.CompletedProcess(
            command, 0 if folder in self.running or input.startswith("quit") else 1, "", ""
        )
