"""The verb ``plan``: the fewest GPUs for given demands, how each is cut, and what runs in every slice. Needs neither Ray nor
a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from actors.mig.geometry import GeometryError, GpuGeometry, gpu_geometry
from actors.mig.planner import Plan, PlannerError, make_plan, pose
from apps.migperf.demand import read_demand, read_profiles
from apps.program.errors import UserError
from apps.program.report import print_table


def plan(
    profiles: Annotated[Path, typer.Option(help="CSV of measurements on slices (the columns of ParvaGPU's profiles).")],
    demand: Annotated[Path, typer.Option(help="CSV: workload, requests_per_s, latency_limit_ms [, mode].")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    latency_share: Annotated[
        float, typer.Option(help="Part of the latency limit that a segment's latency may take; the rest is waiting.")
    ] = 0.5,
    gpus: Annotated[
        str | None,
        typer.Option(help="GPUs that there are, as A100-80GB=4,A30=2; by default any number of those measured."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for the exact planner.")] = 10.0,
    heuristic: Annotated[bool, typer.Option("--heuristic", help="Only the fast planner.")] = False,
) -> None:
    """Choose the fewest GPUs, their partition, and batch and processes of each slice, with a proven lower bound."""
    made = plan_files(profiles, demand, latency_share=latency_share, gpus=gpus, seconds=seconds, heuristic=heuristic)
    if as_json:
        print(json.dumps(plan_json(made), indent=1))
        return
    several = len(set(made.gpus)) > 1
    print_table(
        ["GPU", *(["model"] if several else []), "profile", "start", "workload", "batch", "proc", "per s", "ms"],
        [
            [s.gpu, *([s.gpu_model] if several else []), s.placement.profile, s.placement.start, s.workload,
             s.measurement.batch, s.measurement.processes, round(s.measurement.throughput_per_s, 1), s.measurement.latency_ms]
            for s in made.segments
        ],
        f"{len(made.gpus)} x {', '.join(sorted(set(made.gpus)))} (at least {made.lower_bound} needed, by {made.bound_by})",
    )  # fmt: skip


def plan_files(
    profiles: Path,
    demand: Path,
    *,
    latency_share: float = 0.5,
    gpus: str | None = None,
    seconds: float = 10.0,
    heuristic: bool = False,
) -> Plan:
    """Reads both tables and plans.

    Raises:
        UserError: what is wrong with a table, an option or the demands, as one sentence.
    """
    rows, geometries = read_profiles(profiles)
    demands = read_demand(demand)
    available = None if gpus is None else _available(gpus, geometries)
    if available is not None:
        geometries = {name: geometry for name, geometry in geometries.items() if name in available}
    try:
        problem = pose(rows, demands, geometries, latency_share=latency_share, available=available)
        return make_plan(problem, seconds=seconds, method="heuristic" if heuristic else "auto")
    except PlannerError as error:
        raise UserError(str(error)) from error


def plan_json(made: Plan) -> dict[str, Any]:
    """The plan as it is printed; ``start`` and ``size`` are in memory slices, ``throughput_per_s`` is of all processes
    together."""
    return {
        "gpus": len(made.gpus),
        "lower_bound": made.lower_bound,
        "gap": made.gap,
        "bound_by": made.bound_by,
        "method": made.method,
        "seconds": round(made.seconds, 3),
        "gpu_models": list(made.gpus),
        "segments": [
            {
                "workload": segment.workload,
                "mode": segment.measurement.mode,
                "gpu": segment.gpu,
                "gpu_model": segment.gpu_model,
                "profile": segment.placement.profile,
                "start": segment.placement.start,
                "size": segment.placement.size,
                "batch": segment.measurement.batch,
                "processes": segment.measurement.processes,
                "throughput_per_s": round(segment.measurement.throughput_per_s, 6),
                "latency_ms": segment.measurement.latency_ms,
            }
            for segment in made.segments
        ],
    }


def _available(text: str, geometries: dict[str, GpuGeometry]) -> dict[str, int]:
    """``A100-80GB=4,A30=2``, by the names that the measurements use."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, count = part.partition("=")
        if not count.strip().isdigit() or int(count) < 1:
            raise UserError(f"--gpus {text!r}: each part must be MODEL=COUNT, as in A100-80GB=4,A30=2.")
        try:
            wanted = gpu_geometry(name).gpu
        except GeometryError as error:
            raise UserError(f"--gpus {text!r}: {error}") from error
        names = [measured for measured, geometry in geometries.items() if geometry.gpu == wanted]
        if not names:
            raise UserError(
                f"--gpus {text!r}: nothing was measured on {name.strip()}, only on {', '.join(geometries)}."
            )
        found[names[0]] = found.get(names[0], 0) + int(count)
    return found
