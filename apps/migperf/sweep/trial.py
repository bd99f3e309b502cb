"""A trial of a sweep as data: the point that is measured, and what was found. Pure; what crosses processes as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from apps.program.errors import UserError

FULL = "full"
"""The profile of the baseline: the whole device without slices."""
Status = Literal["ok", "oom", "failed", "stopped"]


@dataclass(frozen=True)
class TrialPoint:
    """One configuration. ``rate_per_s`` None: the next batch begins when the last one ends (closed loop)."""

    backend: str
    device: str
    profile: str
    workload: str
    mode: Literal["infer", "train"]
    batch: int
    sequence: int | None = None
    rate_per_s: float | None = None
    """Batches that arrive a second, open loop, Poisson."""
    scale: float = 1.0
    """Of the workload's shape."""
    corun: bool = False
    """The same runs in every other slice of the layout that has this profile."""

    @property
    def key(self) -> str:
        """Names the point in files and tables; equal points have equal keys."""
        parts = [self.backend, self.device, self.profile, self.workload, self.mode, f"b{self.batch}"]
        parts += [f"s{self.sequence}"] if self.sequence else []
        parts += [f"r{self.rate_per_s:g}"] if self.rate_per_s else []
        parts += [f"x{self.scale:g}"] if self.scale != 1 else []
        return "/".join(parts + (["corun"] if self.corun else []))

    @property
    def question(self) -> tuple[Any, ...]:
        """Points of one question compete: the same work, cut and batched differently."""
        return (
            self.backend,
            self.device,
            self.workload,
            self.mode,
            self.sequence,
            self.rate_per_s,
            self.scale,
            self.corun,
        )


@dataclass(frozen=True)
class TrialResult:
    """What a trial found. Numbers are None where they could not be measured (or the trial ran out of memory)."""

    point: TrialPoint
    status: Status
    seconds: float = 0.0
    """Of measuring, without the start."""
    start_s: float = 0.0
    """Process start, model and warm-up."""
    steps: int = 0
    latency_mean_ms: float | None = None
    latency_std_ms: float | None = None
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    latency_p99_ms: float | None = None
    throughput_per_s: float | None = None
    """Samples (pictures, sequences, tokens when decoding) a second."""
    dropped: int = 0
    """Arrivals that waited too long (open loop)."""
    sm_activity: float | None = None
    memory_mib: float | None = None
    power_w: float | None = None
    energy_j: float | None = None
    """Of this slice for the measured time: its part of the board's (see energy.py)."""
    energy_error: float | None = None
    """|sum of all slices' parts - board's counter| / board's counter."""
    achieved_share: float | None = None
    """Of the device's compute, on backends that can say it (cpu)."""
    note: str = ""

    @property
    def cost_s(self) -> float:
        """Benchmark seconds that it took."""
        return self.start_s + self.seconds


def objective(result: TrialResult, most: int, latency_limit_ms: float | None = None) -> float:
    """Samples a second of the whole device cut into slices of this profile; 0 where the limit (P99) is broken or memory ran
    out.

    Args:
        most: slices of the profile that fit on the device (1 for the baseline without slices).
    """
    if result.status not in ("ok", "stopped") or result.throughput_per_s is None:
        return 0.0
    if latency_limit_ms is not None and (result.latency_p99_ms or math.inf) > latency_limit_ms:
        return 0.0
    return most * result.throughput_per_s


def percentile(ordered: Sequence[float], share: float) -> float:
    """The nearest-rank percentile of sorted values: the smallest that at least ``share`` of them do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def to_json(result: TrialResult) -> str:
    """One line."""
    return json.dumps(dataclasses.asdict(result))


def from_json(line: str) -> TrialResult:
    """The result of ``to_json``.

    Raises:
        UserError: a line that is none.
    """
    try:
        fields = json.loads(line)
        return TrialResult(**{**fields, "point": TrialPoint(**fields["point"])})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"This is no result of a trial: {line.strip()[:80]!r}.") from error


def measurement_cells(result: TrialResult) -> Mapping[str, str]:
    """The row of the CSV: the columns of the shared measurements first (so that ``predict`` reads it), then the rest."""
    point = result.point

    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.6g}"

    gpu = point.device if point.backend in ("sim", "mig") else f"{point.backend}:{point.device}"
    return {
        "source": "sextant",
        "gpu": gpu,
        "mode": point.mode,
        "workload": point.workload,
        "batch": str(point.batch),
        "seq": str(point.sequence or ""),
        "profile": point.profile,
        "latency_ms": text(result.latency_mean_ms) or ("0" if result.status == "oom" else ""),
        "latency_std_ms": text(result.latency_std_ms),
        "gract": text(result.sm_activity),
        "fb_mib": text(result.memory_mib),
        "oom": str(int(result.status == "oom")),
        "status": result.status,
        "backend": point.backend,
        "corun": str(int(point.corun)),
        "scale": f"{point.scale:g}",
        "rate_per_s": text(point.rate_per_s),
        "throughput_per_s": text(result.throughput_per_s),
        "p50_ms": text(result.latency_p50_ms),
        "p95_ms": text(result.latency_p95_ms),
        "p99_ms": text(result.latency_p99_ms),
        "dropped": str(result.dropped),
        "power_w": text(result.power_w),
        "energy_j": text(result.energy_j),
        "energy_error": text(result.energy_error),
        "achieved_share": text(result.achieved_share),
        "seconds": text(result.seconds),
        "note": result.note,
    }


CSV_COLUMNS = tuple(measurement_cells(TrialResult(TrialPoint("", "", "", "", "infer", 1), "ok")))
