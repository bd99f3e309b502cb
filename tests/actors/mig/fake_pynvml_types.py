"""The structures of the double of ``pynvml``: the real module's fields, written anew (test_fake_pynvml.py compares them)."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_uint, c_ulonglong

import pynvml as real


class struct_c_nvmlDevice_t(Structure):
    pass


class struct_c_nvmlGpuInstance_t(Structure):
    pass


class struct_c_nvmlComputeInstance_t(Structure):
    pass


class c_nvmlGpuInstancePlacement_t(Structure):
    _fields_ = [("start", c_uint), ("size", c_uint)]


class c_nvmlComputeInstancePlacement_t(Structure):
    _fields_ = [("start", c_uint), ("size", c_uint)]


_GI_COUNTS = ["sliceCount", "instanceCount", "multiprocessorCount", "copyEngineCount", "decoderCount", "encoderCount",
              "jpegCount", "ofaCount"]  # fmt: skip
_CI_COUNTS = [f"shared{name[0].upper()}{name[1:]}" if number > 2 else name for number, name in enumerate(_GI_COUNTS)]


class c_nvmlGpuInstanceProfileInfo_t(Structure):
    _fields_ = [
        ("id", c_uint),
        ("isP2pSupported", c_uint),
        *[(n, c_uint) for n in _GI_COUNTS],
        ("memorySizeMB", c_ulonglong),
    ]


class c_nvmlGpuInstanceProfileInfo_v2_t(Structure):
    _fields_ = [("version", c_uint), *c_nvmlGpuInstanceProfileInfo_t._fields_,
                ("name", dict(real.c_nvmlGpuInstanceProfileInfo_v2_t._fields_)["name"])]  # fmt: skip


class c_nvmlComputeInstanceProfileInfo_v2_t(Structure):
    _fields_ = [("version", c_uint), ("id", c_uint), *[(n, c_uint) for n in _CI_COUNTS],
                ("name", dict(real.c_nvmlComputeInstanceProfileInfo_v2_t._fields_)["name"])]  # fmt: skip


c_nvmlDevice_t = POINTER(struct_c_nvmlDevice_t)
c_nvmlGpuInstance_t = POINTER(struct_c_nvmlGpuInstance_t)
c_nvmlComputeInstance_t = POINTER(struct_c_nvmlComputeInstance_t)


class c_nvmlGpuInstanceInfo_t(Structure):
    _fields_ = [
        ("device", c_nvmlDevice_t),
        ("id", c_uint),
        ("profileId", c_uint),
        ("placement", c_nvmlGpuInstancePlacement_t),
    ]


class c_nvmlComputeInstanceInfo_t(Structure):
    _fields_ = [("device", c_nvmlDevice_t), ("gpuInstance", c_nvmlGpuInstance_t), ("id", c_uint), ("profileId", c_uint),
                ("placement", c_nvmlComputeInstancePlacement_t)]  # fmt: skip
