"""The verb ``profiles``: what may be cut out of a GPU, from this machine's driver or from the tables, and what is left beside
a layout."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from actors.mig.controller import ControllerError, Nvml
from actors.mig.geometry import GPUS, GeometryError, GpuGeometry, GpuState, gpu_geometry
from apps.program.errors import UserError
from apps.program.report import print_table


def profiles(
    gpu: Annotated[
        str | None,
        typer.Option(
            help="A GPU model (A100-80GB, H200, ...) or the number of a GPU of this machine; default: 0, else all models."
        ),
    ] = None,
    holding: Annotated[
        str | None,
        typer.Option(help="What the GPU holds already, as 3g.40gb@4,1g.10gb@0: shows what is left beside it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show the MIG profiles of a GPU: ids, placements, SMs, memory, and how many still fit."""
    geometry = find_geometry(gpu)
    if geometry is None:
        print_table(
            ["GPU", "profiles"],
            [[name, ", ".join(profile.name for profile in known.profiles)] for name, known in GPUS.items()],
            "GPUs with MIG, from the tables (no GPU answers here): --gpu NAME shows one",
        )
        return
    try:
        state = GpuState.of(geometry, parse_layout(holding) if holding else [])
    except GeometryError as error:
        raise UserError(str(error)) from error
    rows = profile_rows(state)
    if as_json:
        print(json.dumps({"gpu": geometry.gpu, "source": geometry.source, "profiles": rows}, indent=1))
        return
    print_table(
        ["profile", "id", "placements", "SMs", "MiB", "max", "free"],
        [
            [row["name"], row["id"], f"{{{','.join(map(str, row['starts']))}}}:{row['size']}", row["sm_count"],
             row["memory_mib"], row["max_instances"], row["remaining"]]
            for row in rows
        ],
        f"{geometry.gpu} (from {'the driver' if geometry.source == 'nvml' else 'the tables'})",
    )  # fmt: skip


def find_geometry(gpu: str | None) -> GpuGeometry | None:
    """The geometry of a model, or of a GPU of this machine; None when none is named and none is here.

    Raises:
        UserError: unknown model, no such GPU, or no privilege to ask it.
    """
    if gpu is not None and not gpu.isdigit():
        try:
            return gpu_geometry(gpu)
        except GeometryError as error:
            raise UserError(str(error)) from error
    try:
        with Nvml() as nvml:
            device = nvml.device(int(gpu or 0))
            with nvml.sentences("read the profiles", int(gpu or 0)):
                return nvml.geometry(device)
    except ControllerError as error:
        if gpu is None:
            return None
        raise UserError(str(error)) from error


def profile_rows(state: GpuState) -> list[dict[str, Any]]:
    """One row a profile, with where and how many still fit; ``starts`` and ``size`` in memory slices."""
    return [
        {
            "name": profile.name,
            "id": profile.profile_id,
            "nvml_enum": profile.nvml_enum,
            "compute_slices": profile.compute_slices,
            "starts": list(profile.starts),
            "size": profile.memory_slices,
            "sm_count": profile.sm_count,
            "memory_mib": profile.memory_mib,
            "max_instances": profile.max_instances,
            "free_starts": list(state.free_starts(profile.name)),
            "remaining": state.remaining_capacity(profile.name),
            "compute_instances": [
                f"{cut.name(profile.name)} x{cut.max_instances}"
                for cut in state.geometry.compute_profiles(profile.name)
            ],
        }
        for profile in state.geometry.profiles
    ]


def parse_layout(text: str) -> list[tuple[str, int]]:
    """``3g.40gb@4,1g.10gb@0`` as (profile, start).

    Raises:
        UserError: a part that is not PROFILE@START.
    """
    found = []
    for part in text.split(","):
        profile, _, start = part.strip().partition("@")
        if not profile or not start.isdigit():
            raise UserError(f"{part.strip()!r} is not PROFILE@START, as in 3g.40gb@4.")
        found.append((profile, int(start)))
    return found
