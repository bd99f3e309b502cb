"""What the planner is given and what it answers: measurements, demands, segments, plans.

A *segment* (ParvaGPU's term) is one MIG slice that runs one workload with a batch size and a number of MPS processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from actors.mig.geometry import GpuGeometry, Placement, maximal_multisets
from actors.mig.planner.errors import PlannerError

SliceKind = tuple[str, str]
"""(GPU, profile), for example ("A100-80GB", "3g.40gb")."""


@dataclass(frozen=True)
class Measurement:
    """A workload on a slice, as measured. ``throughput_per_s`` is the segment's: of all its processes together."""

    workload: str
    gpu: str
    profile: str
    batch: int
    processes: int
    latency_ms: float
    throughput_per_s: float
    mode: str = "infer"


@dataclass(frozen=True)
class Demand:
    """What a workload must get.

    ``mode`` ``infer``: ``requests_per_s`` in total, from any number of segments; a segment qualifies when its latency is at
    most a share (by default half) of ``latency_limit_ms``. ``mode`` ``train``: one job, which runs in one slice and must
    reach ``requests_per_s`` samples per second there; it has no latency limit.
    """

    workload: str
    requests_per_s: float
    latency_limit_ms: float = math.inf
    mode: str = "infer"

    def __post_init__(self) -> None:
        if self.mode not in ("infer", "train"):
            raise PlannerError(f"The mode of {self.workload} is {self.mode!r}: it must be infer or train.")
        if not (math.isfinite(self.requests_per_s) and self.requests_per_s > 0):
            raise PlannerError(
                f"The demand of {self.workload} is {self.requests_per_s:g} requests per second: it must be a positive number."
            )
        if math.isnan(self.latency_limit_ms) or self.latency_limit_ms <= 0:
            raise PlannerError(
                f"The latency limit of {self.workload} is {self.latency_limit_ms:g} ms: it must be a positive number."
            )


@dataclass(frozen=True)
class Segment:
    """A segment of a plan: which GPU of the plan (``gpu``, from 0), where on it, and what runs there."""

    workload: str
    gpu: int
    gpu_model: str
    placement: Placement
    measurement: Measurement


@dataclass(frozen=True)
class Plan:
    """GPUs, segments, and how good it is: no plan with fewer than ``lower_bound`` GPUs exists."""

    gpus: tuple[str, ...]
    """The model of each GPU used."""
    segments: tuple[Segment, ...]
    lower_bound: int
    method: str
    """How the plan was found: ``heuristic`` or ``milp``."""
    bound_by: str
    """What certifies the bound: ``slice prices`` (checked in exact arithmetic) or ``branch and bound`` (HiGHS)."""
    seconds: float = 0.0

    @property
    def gap(self) -> int:
        """GPUs between the plan and the bound; 0: proven to be the fewest."""
        return len(self.gpus) - self.lower_bound


@dataclass(frozen=True)
class Load:
    """A demand with what can serve it: for each slice kind the best qualifying measurement."""

    demand: Demand
    options: Mapping[SliceKind, Measurement]

    @property
    def divisible(self) -> bool:
        """Whether several segments may share the demand (a training job may not be split)."""
        return self.demand.mode == "infer"


@dataclass(frozen=True)
class Problem:
    """Demands, and GPU models with, for some, how many there are (no entry: any number)."""

    loads: tuple[Load, ...]
    geometries: Mapping[str, GpuGeometry]
    available: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def slices(self) -> tuple[SliceKind, ...]:
        """Every slice kind that some load can use."""
        used = {kind for load in self.loads for kind in load.options}
        return tuple(
            (gpu, profile.name)
            for gpu, geometry in self.geometries.items()
            for profile in geometry.profiles
            if (gpu, profile.name) in used
        )

    @cached_property
    def patterns(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(GPU, multiset of profiles) of every way to cut one GPU into slices that loads can use, undominated ones only."""
        found = []
        for gpu, geometry in self.geometries.items():
            names = {profile for owner, profile in self.slices if owner == gpu}
            found += [(gpu, names_of) for names_of in maximal_multisets(geometry.restricted(names)) if names_of]
        return tuple(found)

    def cost(self, kind: SliceKind) -> float:
        """A first guess of a slice's price in GPUs: the larger of its shares of compute and memory slices."""
        geometry = self.geometries[kind[0]]
        profile = geometry.profile(kind[1])
        compute = profile.compute_slices / geometry.compute_slices
        # 3g takes half of the memory: two of them fill a GPU although they have six of its seven compute slices.
        return max(compute, profile.memory_slices / geometry.memory_slices)


def pose(
    measurements: Iterable[Measurement],
    demands: Sequence[Demand],
    geometries: Mapping[str, GpuGeometry],
    *,
    latency_share: float = 0.5,
    available: Mapping[str, int] | None = None,
) -> Problem:
    """Selects for every demand what qualifies; of each slice kind only the best throughput counts, since all else costs the
    same.

    Args:
        geometries: GPU models by the name that the measurements use.
        latency_share: the part of the latency limit that a segment's latency may take (the rest is waiting for the batch).

    Raises:
        PlannerError: no demand; a workload that was not measured or cannot meet its limit; two demands of one name.
    """
    if not 0 < latency_share <= 1:
        raise PlannerError(f"The latency share is {latency_share:g}: it must be above 0 and at most 1.")
    if not demands:
        raise PlannerError("There is no demand to plan for.")
    by_workload: dict[tuple[str, str], list[Measurement]] = {}
    for row in measurements:
        if row.gpu in geometries:
            by_workload.setdefault((row.workload, row.mode), []).append(row)
    served: set[str] = set()
    loads = []
    for demand in demands:
        if demand.workload in served and demand.mode == "infer":
            raise PlannerError(f"{demand.workload} is demanded twice: add its requests per second up.")
        served.add(demand.workload)
        rows = by_workload.get((demand.workload, demand.mode))
        if not rows:
            known = ", ".join(sorted({name for name, mode in by_workload if mode == demand.mode})) or "none"
            raise PlannerError(
                f"The profiles have no {demand.mode} measurement of {demand.workload} that ran: measured are {known}."
            )
        loads.append(Load(demand, _options(rows, demand, latency_share)))
    return Problem(tuple(loads), dict(geometries), dict(available or {}))


def _options(rows: Sequence[Measurement], demand: Demand, latency_share: float) -> dict[SliceKind, Measurement]:
    allowed = demand.latency_limit_ms * latency_share
    best: dict[SliceKind, Measurement] = {}
    for row in rows:
        if row.latency_ms > allowed or row.throughput_per_s <= 0:
            continue
        if demand.mode == "train" and row.throughput_per_s < demand.requests_per_s:
            continue
        kind = (row.gpu, row.profile)
        current = best.get(kind)
        if current is None or _merit(row) > _merit(current):
            best[kind] = row
    if not best:
        if demand.mode == "train":
            fastest = max(row.throughput_per_s for row in rows)
            raise PlannerError(
                f"No slice trains {demand.workload} at {demand.requests_per_s:g} samples per second: "
                f"the fastest reaches {fastest:g}."
            )
        fastest = min(row.latency_ms for row in rows)
        raise PlannerError(
            f"No slice meets the latency limit of {demand.workload}: {latency_share:g} of {demand.latency_limit_ms:g} ms "
            f"are {allowed:g} ms, and the fastest measurement takes {fastest:g} ms."
        )
    return best


def _merit(row: Measurement) -> tuple[float, float, int]:
    return row.throughput_per_s, -row.latency_ms, -row.processes
