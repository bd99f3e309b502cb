"""MIG geometry: what may be cut out of a GPU, as pure data and functions. No Ray, no NVML, no GPU.

gpu = gpu_geometry("A100-80GB")
state = GpuState(gpu).place("3g.40gb", 4)
state.free_starts("2g.20gb")                 # (0, 2)
repartition(state, ["4g.40gb", "3g.40gb"])   # keeps 3g.40gb@4, creates 4g.40gb@0
"""

from __future__ import annotations

from actors.mig.geometry.enumerate_states import (
    all_states,
    layouts_by_multiset,
    maximal_multisets,
    maximal_states,
    multiset,
)
from actors.mig.geometry.errors import GeometryError, IllegalPlacement, UnknownGpu, UnknownProfile
from actors.mig.geometry.model import ComputeInstanceProfile, GpuGeometry, GpuInstanceProfile, Placement
from actors.mig.geometry.moves import Defragmentation, Move, Repartition, make_room, place_best, repartition
from actors.mig.geometry.state import GpuState, check_compute, place_compute
from actors.mig.geometry.tables import GPUS, gpu_geometry

__all__ = [
    "GPUS", "ComputeInstanceProfile", "Defragmentation", "GeometryError", "GpuGeometry", "GpuInstanceProfile", "GpuState",
    "IllegalPlacement", "Move", "Placement", "Repartition", "UnknownGpu", "UnknownProfile", "all_states", "check_compute",
    "gpu_geometry", "layouts_by_multiset", "make_room", "maximal_multisets", "maximal_states", "multiset", "place_best",
    "place_compute", "repartition",
]  # fmt: skip
