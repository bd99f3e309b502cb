"""What a GPU slice gives a workload, read off its profile's name: share of SMs, share of memory bandwidth, memory.

Numbers come from `actors.mig.geometry`; what is not published there (SMs of 3g and 4g on Blackwell, some memory
sizes) is taken in proportion, since a prediction bears an approximation that a placement does not. Names of drivers
that count gigabytes differently (1g.23gb / 1g.24gb) are understood, and `full` is the GPU with MIG off.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from actors.mig.geometry import GeometryError, GpuGeometry, GpuInstanceProfile, gpu_geometry
from actors.mig.prediction.errors import PredictionError

_FULL_NAMES = ("full", "nomig", "whole")
_PROFILE = re.compile(r"^(?:\d+c\.)?(\d+)g\.(\d+(?:\.\d+)?)gb((?:[+-][a-z.]+)*)$")
_UNPUBLISHED_SMS = 152
"""Of GB200's whole GPU."""
_HOPPER_SHARE = {1: 16 / 132, 2: 32 / 132, 3: 60 / 132, 4: 64 / 132, 7: 1.0}
_MIB_PER_GB = 950.0
"""Usable MiB for each gigabyte of a profile's name, where a GPU's memory is not published (published ones: 910 to 1,000)."""


@dataclass(frozen=True)
class Slice:
    """What a workload gets. Shares are of the whole GPU with MIG off, above 0 and at most 1."""

    gpu: str
    profile: str
    sms: int
    sm_share: float
    bandwidth_share: float
    memory_mib: float


def parse_slice(gpu: str, profile: str) -> Slice:
    """The slice that ``profile`` names on ``gpu``: ``3g.40gb``, ``1g.10gb+me``, ``full`` or ``no-mig``.

    Raises:
        PredictionError: unknown GPU, a name that is no profile, or a profile that this GPU does not have.
    """
    try:
        geometry = gpu_geometry(gpu)
    except GeometryError as error:
        raise PredictionError(str(error)) from error
    full_sms = geometry.sm_count or _UNPUBLISHED_SMS
    text = re.sub(r"^mig[ -]", "", profile.strip().lower())
    if re.sub(r"[-_ ]", "", text) in _FULL_NAMES:
        whole = max(geometry.profiles, key=lambda one: one.memory_slices)
        return Slice(gpu, profile, full_sms, 1.0, 1.0, _memory_mib(whole))
    found = _find(geometry, text)
    if found is None:
        names = ", ".join(one.name for one in geometry.profiles)
        raise PredictionError(f"{profile!r} is no profile of {gpu}: it has {names} and 'full'.")
    sms = found.sm_count or round(full_sms * _HOPPER_SHARE.get(found.compute_slices, found.compute_slices / 7))
    share = found.memory_slices / geometry.memory_slices
    return Slice(gpu, profile, sms, sms / full_sms, share, _memory_mib(found))


def _find(geometry: GpuGeometry, text: str) -> GpuInstanceProfile | None:
    """The profile of this name or, for another driver's gigabytes, the one of as many compute slices whose memory is
    within a fifth."""
    match = _PROFILE.match(text)
    if match is None:
        return None
    compute, gigabytes = int(match.group(1)), float(match.group(2))
    alike = [one for one in geometry.profiles if one.compute_slices == compute]
    near = min(alike, key=lambda one: (abs(_gigabytes(one) - gigabytes), one.name != text), default=None)
    return near if near is not None and abs(_gigabytes(near) - gigabytes) <= 0.2 * _gigabytes(near) else None


def _gigabytes(profile: GpuInstanceProfile) -> float:
    match = _PROFILE.match(profile.name)
    return float(match.group(2)) if match else 0.0


def _memory_mib(profile: GpuInstanceProfile) -> float:
    return float(profile.memory_mib or _MIB_PER_GB * _gigabytes(profile))
