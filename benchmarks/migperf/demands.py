"""Random demands for the planner: over ParvaGPU's measured profiles where the shared data is, else over profiles of a simple
law."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Sequence
from pathlib import Path

from actors.mig.geometry import GpuGeometry, gpu_geometry
from actors.mig.planner import Demand, Measurement, PlannerError, Problem, pose
from apps.migperf.demand import read_profiles
from benchmarks.harness import REPOSITORY

LIMITS_MS = (50, 80, 120, 200, 400, 800, 2000)
ALIASES = 2
"""A workload may be demanded under this many latency limits, so that there can be more demands than measured workloads."""


def load_profiles() -> tuple[list[Measurement], dict[str, GpuGeometry], str]:
    """(measurements, geometries, where they are from)."""
    folder = Path(os.environ.get("SEXTANT_SHARED_DATA") or REPOSITORY.parent / "shared" / "data") / "mig"
    if (folder / "parvagpu.csv").exists():
        return *read_profiles(folder / "parvagpu.csv"), "ParvaGPU's measurements"
    return synthetic_profiles(random.Random(0)), {"A100-80GB": gpu_geometry("A100-80GB")}, "a simple law"


def synthetic_profiles(rng: random.Random, workloads: int = 6) -> list[Measurement]:
    """Profiles of made-up workloads: a launch floor, work shared by SMs (not perfectly), more processes filling the slice."""
    rows = []
    for number in range(workloads):
        floor_ms, work_ms, power = rng.uniform(1, 5), rng.uniform(1, 20), rng.uniform(0.7, 1.0)
        for profile, slices in (("1g.10gb", 1), ("2g.20gb", 2), ("3g.40gb", 3), ("4g.40gb", 4), ("7g.80gb", 7)):
            for batch in (1, 2, 4, 8, 16, 32):
                for processes in (1, 2, 3):
                    busy = work_ms * batch / slices**power
                    latency = floor_ms + busy * (1 + 0.9 * (processes - 1)) * rng.uniform(0.97, 1.03)
                    rows.append(
                        Measurement(
                            f"net{number}", "A100-80GB", profile, batch, processes, latency, 1000 * batch * processes / latency
                        )
                    )  # fmt: skip
    return rows


def random_problem(
    rows: Sequence[Measurement], geometries: dict[str, GpuGeometry], rng: random.Random
) -> tuple[Problem, float]:
    """A problem of about 2 to 16 GPUs and 2 to 14 demands; also its size in GPUs by perfect packing of the best slices."""
    names = sorted({row.workload for row in rows})
    target = rng.uniform(1.5, 15.5)
    pool = [(name, alias) for name in names for alias in range(ALIASES)]
    chosen = rng.sample(pool, rng.randint(2, len(pool)))
    shares = [rng.random() ** 2 + 0.05 for _ in chosen]
    demands, measured = [], []
    for (name, alias), share in zip(chosen, shares, strict=True):
        limit = float(rng.choice(LIMITS_MS))
        mine = [row for row in rows if row.workload == name]
        fits = [row for row in mine if row.latency_ms <= limit / 2]
        if not fits:
            continue
        whole = max(row.throughput_per_s / _share(geometries[row.gpu], row.profile) for row in fits)
        called = name if alias == 0 else f"{name}#{alias}"
        demands.append(Demand(called, round(max(1.0, whole * target * share / sum(shares)), 2), limit))
        measured += [dataclasses.replace(row, workload=called) for row in mine]
    if not demands:
        raise PlannerError("No limit was met.")
    return pose(measured, demands, geometries), target


def _share(geometry: GpuGeometry, profile: str) -> float:
    return geometry.profile(profile).compute_slices / geometry.compute_slices
