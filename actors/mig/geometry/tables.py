"""NVIDIA's published MIG tables, for the simulator and the planner: where there is a GPU, NVML is asked instead.

Placements, ids, SMs and memory of A100, A30, H100 are those of real `nvidia-smi mig -lgip / -lgipp`; the other GPUs of seven
compute slices share the placements. Memory and even names differ between drivers (1g.23gb / 1g.24gb on GB200). None stands
for what is not published (SMs of 3g and 4g on Blackwell).
"""

from __future__ import annotations

import re

from actors.mig.geometry.errors import UnknownGpu
from actors.mig.geometry.model import GpuGeometry, GpuInstanceProfile

# (kind, NVML enum, nvidia-smi id, compute slices, memory slices, starts, most instances, OFA)
_SEVEN = (
    ("1g", 0, 19, 1, 1, (0, 1, 2, 3, 4, 5, 6), 7, 0),
    ("1g+me", 7, 20, 1, 1, (0, 1, 2, 3, 4, 5, 6), 1, 1),
    ("1g.x2", 9, 15, 1, 2, (0, 2, 4, 6), 4, 0),
    ("2g", 1, 14, 2, 2, (0, 2, 4), 3, 0),
    ("3g", 2, 9, 3, 4, (0, 4), 2, 0),
    ("4g", 3, 5, 4, 4, (0,), 1, 0),
    ("7g", 4, 0, 7, 8, (0,), 1, 1),
)
_FOUR = (
    ("1g", 0, 14, 1, 1, (0, 1, 2, 3), 4, 0),
    ("1g+me", 7, 21, 1, 1, (0, 1, 2, 3), 1, 1),
    ("2g", 1, 5, 2, 2, (0, 2), 2, 0),
    ("2g+me", 8, 6, 2, 2, (0, 2), 1, 1),
    ("4g", 3, 0, 4, 4, (0,), 1, 1),
)
_A100_SMS = {"1g": 14, "1g+me": 14, "1g.x2": 14, "2g": 28, "3g": 42, "4g": 56, "7g": 98}
_HOPPER_SMS = {"1g": 16, "1g+me": 16, "1g.x2": 26, "2g": 32, "3g": 60, "4g": 64, "7g": 132}
_A100_COPY = {"1g": 1, "1g+me": 1, "1g.x2": 1, "2g": 2, "3g": 3, "4g": 4, "7g": 7}
_HOPPER_COPY = {**_A100_COPY, "7g": 8}
_B200_COPY = {"1g": 2, "1g+me": 2, "1g.x2": 2, "2g": 3, "3g": 6, "4g": 8, "7g": 16}


def _seven(
    gpu: str,
    names: tuple[int, int, int, int],
    gib: tuple[float | None, float | None, float | None, float | None],
    sms: dict[str, int],
    sm_count: int | None,
    copy_engines: dict[str, int],
) -> GpuGeometry:
    """A GPU of seven compute and eight memory slices; ``names`` (gigabytes) and ``gib`` of 1, 2, 4 and 8 memory slices."""
    return _geometry(gpu, 7, 8, _SEVEN, dict(zip((1, 2, 4, 8), names, strict=True)),
                     dict(zip((1, 2, 4, 8), gib, strict=True)), sms, sm_count, copy_engines)  # fmt: skip


def _geometry(
    gpu: str,
    compute: int,
    memory: int,
    rows: tuple[tuple[str, int, int, int, int, tuple[int, ...], int, int], ...],
    names: dict[int, int],
    gib: dict[int, float | None],
    sms: dict[str, int],
    sm_count: int | None,
    copy_engines: dict[str, int],
) -> GpuGeometry:
    profiles = []
    for kind, enum, profile_id, slices, size, starts, most, ofa in rows:
        suffix = "+me" if kind.endswith("+me") else ""
        memory_gib = gib[size]
        profiles.append(
            GpuInstanceProfile(
                name=f"{slices}g.{names[size]}gb{suffix}",
                nvml_enum=enum,
                profile_id=profile_id,
                compute_slices=slices,
                memory_slices=size,
                starts=starts,
                max_instances=most,
                sm_count=sms.get(kind),
                memory_mib=None if memory_gib is None else round(memory_gib * 1024),
                copy_engines=copy_engines.get(kind),
                ofa_count=ofa,
            )
        )
    return GpuGeometry(gpu, compute, memory, tuple(profiles), sm_count)


_B200_SMS = {"1g": 18, "1g+me": 18, "1g.x2": 30, "2g": 36, "7g": 148}
_GB200_SMS = {"1g": 18, "1g+me": 18, "1g.x2": 32, "2g": 38}
GPUS: dict[str, GpuGeometry] = {
    geometry.gpu: geometry
    for geometry in (
        _geometry("A30", 4, 4, _FOUR, {1: 6, 2: 12, 4: 24}, {1: 5.81, 2: 11.69, 4: 23.44},
                  {"1g": 14, "1g+me": 14, "2g": 28, "2g+me": 28, "4g": 56}, 56,
                  {"1g": 1, "1g+me": 1, "2g": 2, "2g+me": 2, "4g": 4}),
        _seven("A100-40GB", (5, 10, 20, 40), (4.75, 9.62, 19.5, 39.25), _A100_SMS, 108, _A100_COPY),
        _seven("A100-80GB", (10, 20, 40, 80), (9.62, 19.5, 39.25, 78.5), _A100_SMS, 108, _A100_COPY),
        _seven("H100-80GB", (10, 20, 40, 80), (9.75, 19.62, 39.5, 79.25), _HOPPER_SMS, 132, _HOPPER_COPY),
        _seven("H100-94GB", (12, 24, 47, 94), (10.75, 21.62, 46.38, None), _HOPPER_SMS, 132, _HOPPER_COPY),
        _seven("GH200-96GB", (12, 24, 48, 96), (None, None, None, None), _HOPPER_SMS, 132, _HOPPER_COPY),
        _seven("H200", (18, 35, 71, 141), (16.0, 32.25, 69.5, None), _HOPPER_SMS, 132, _HOPPER_COPY),
        _seven("B200", (23, 45, 90, 180), (20.5, 44.25, None, None), _B200_SMS, 148, _B200_COPY),
        _seven("GB200", (23, 47, 93, 186), (20.0, 45.5, None, None), _GB200_SMS, None, _B200_COPY),
    )
}  # fmt: skip

_PATTERNS = (
    (r"GH200", "GH200-96GB"), (r"GB200", "GB200"), (r"B200", "B200"), (r"H200", "H200"), (r"(?<![A-Z0-9])A30(?![0-9])", "A30"),
    (r"H100.*(NVL|94)", "H100-94GB"), (r"H100.*96", "GH200-96GB"), (r"H[18]00", "H100-80GB"),
    (r"A[18]00.*80", "A100-80GB"), (r"A[18]00.*40", "A100-40GB"),
)  # fmt: skip


def gpu_geometry(name: str) -> GpuGeometry:
    """The geometry of a GPU by its name here (``A100-80GB``) or NVML's (``NVIDIA H100 80GB HBM3``).

    Raises:
        UnknownGpu: the sentence lists the known ones.
    """
    text = name.strip().upper().replace("_", "-")
    if text in GPUS:
        return GPUS[text]
    for pattern, gpu in _PATTERNS:
        if re.search(pattern, text):
            return GPUS[gpu]
    hint = " Say which A100 it is: A100-40GB or A100-80GB." if "A100" in text else ""
    raise UnknownGpu(f"No MIG table of a GPU {name!r}: known are {', '.join(GPUS)}.{hint}")
