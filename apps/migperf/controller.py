"""The verb ``controller``: shows and changes the MIG partition of this machine's GPUs, through NVML."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from actors.mig.controller import Change, ControllerError, GpuInstance, GpuStatus, MigController, Nvml, SliceTarget
from actors.mig.geometry import GeometryError
from apps.program.errors import UserError
from apps.program.report import print_table


class Action(StrEnum):
    """What the controller can do."""

    status = "status"
    enable = "enable"
    disable = "disable"
    create = "create"
    destroy = "destroy"
    repartition = "repartition"


def controller(
    action: Annotated[Action, typer.Argument(help="What to do.")] = Action.status,
    gpu: Annotated[int, typer.Option(min=0, help="Number of the GPU.")] = 0,
    layout: Annotated[
        str | None,
        typer.Option(
            help="For create and repartition: PROFILE[@START][:COMPUTE], ..., as 4g.40gb@0:2c+2c,3g.40gb; '' is an empty GPU."
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="For repartition: JSON that the verb plan printed; see --plan-gpu.")
    ] = None,
    plan_gpu: Annotated[int, typer.Option(min=0, help="Which GPU of the plan this GPU becomes.")] = 0,
    instance: Annotated[int | None, typer.Option(help="For destroy: the id of the GPU instance.")] = None,
    keep_running: Annotated[
        bool, typer.Option("--keep-running", help="Leave instances with processes alone instead of refusing the GPU.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the steps.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show or change the MIG partition of a GPU: mode, instances, re-partition in the fewest steps."""
    result = run_action(
        action,
        gpu,
        layout=layout,
        plan=plan,
        plan_gpu=plan_gpu,
        instance=instance,
        keep_running=keep_running,
        dry_run=dry_run,
    )
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for step in result.get("steps", []):
        print(f"{'would ' if dry_run else ''}{step}")
    if "steps" in result and not result["steps"]:
        print("Nothing to do.")
    if "instances" in result:
        print_table(
            ["GI", "profile", "start", "CI", "slices", "UUID"],
            [[row["id"], row["profile"], row["start"], ci["id"], ci["slices"], ci["uuid"]]
             for row in result["instances"] for ci in (row["compute"] or [{"id": None, "slices": None, "uuid": None}])],
            result["title"],
        )  # fmt: skip


def run_action(
    action: Action,
    gpu: int,
    *,
    layout: str | None = None,
    plan: Path | None = None,
    plan_gpu: int = 0,
    instance: int | None = None,
    keep_running: bool = False,
    dry_run: bool = False,
    module: Any = None,
) -> dict[str, Any]:
    """What the verb does, as JSON; ``module`` stands in for pynvml in tests.

    Raises:
        UserError: what stands in the way, as one sentence.
    """
    try:
        with Nvml(module) as nvml:
            mig = MigController(nvml)
            if action is Action.status:
                return _status(mig.status(gpu))
            if action in (Action.enable, Action.disable):
                return {"steps": list(mig.set_mig_mode(gpu, action is Action.enable, dry_run=dry_run))}
            if action is Action.create:
                (wanted,) = _targets(layout, None, 0, "create", single=True)
                change = mig.create(gpu, wanted.profile, wanted.start, wanted.compute, dry_run=dry_run)
            elif action is Action.destroy:
                if instance is None:
                    raise UserError("destroy needs --instance ID; 'controller status' lists the ids.")
                change = mig.destroy(gpu, instance, dry_run=dry_run)
            else:
                targets = _targets(layout, plan, plan_gpu, "repartition")
                change = mig.repartition(gpu, targets, dry_run=dry_run, keep_running=keep_running)
            return _change(gpu, change)
    except (ControllerError, GeometryError) as error:
        raise UserError(str(error)) from error


def parse_target(text: str) -> SliceTarget:
    """``4g.40gb@0:2c+2c``: the profile, where it starts (else anywhere), its compute instances (else one, the whole).

    Raises:
        UserError: a text that is not of this form.
    """
    place, _, cut = text.strip().partition(":")
    profile, at, start = place.partition("@")
    sizes = [size.strip().removesuffix("c") for size in cut.split("+")] if cut else []
    if not profile or (at and not start.isdigit()) or not all(size.isdigit() for size in sizes):
        raise UserError(f"{text.strip()!r} is not PROFILE[@START][:COMPUTE], as in 4g.40gb@0:2c+2c.")
    return SliceTarget(profile, int(start) if at else None, tuple(map(int, sizes)) if cut else None)


def _targets(
    layout: str | None, plan: Path | None, plan_gpu: int, action: str, single: bool = False
) -> list[SliceTarget]:
    if (layout is None) == (plan is None):
        raise UserError(f"{action} needs {'--layout' if single else 'either --layout or --plan'}.")
    if layout is not None:
        targets = [parse_target(part) for part in layout.split(",") if part.strip()]
        if single and len(targets) != 1:
            raise UserError(f"{action} makes one instance: --layout {layout!r} names {len(targets)}.")
        return targets
    try:
        segments = json.loads(Path(plan).read_text())["segments"] if plan is not None else []
        found = [SliceTarget(s["profile"], int(s["start"])) for s in segments if s["gpu"] == plan_gpu]
    except OSError as error:
        raise UserError(f"The plan {plan} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{plan} is no plan: 'python -m apps.migperf plan --json' prints one.") from error
    if not found:
        raise UserError(f"The plan {plan} has no GPU {plan_gpu}.")
    return found


def _status(status: GpuStatus) -> dict[str, Any]:
    mode = {None: "no MIG", True: "MIG on", False: "MIG off"}[status.mig]
    if status.mig_pending is not None and status.mig_pending != status.mig:
        mode += f", {'on' if status.mig_pending else 'off'} after a reset"
    return {
        "title": f"GPU {status.gpu}: {status.name} ({status.uuid}), {mode}, {len(status.processes)} processes",
        "gpu": status.gpu,
        "name": status.name,
        "uuid": status.uuid,
        "mig": status.mig,
        "mig_pending": status.mig_pending,
        "processes": list(status.processes),
        "instances": [_instance(one) for one in status.instances],
    }


def _change(gpu: int, change: Change) -> dict[str, Any]:
    return {
        "title": f"GPU {gpu}" + (" (unchanged: a dry run)" if change.dry_run else ""),
        "gpu": gpu,
        "dry_run": change.dry_run,
        "steps": [str(step) for step in change.steps],
        "instances": [_instance(one) for one in change.instances],
    }


def _instance(instance: GpuInstance) -> dict[str, Any]:
    place = instance.placement
    return {
        "id": instance.id,
        "profile": place.profile,
        "start": place.start,
        "size": place.size,
        "compute": [asdict(one) for one in instance.compute],
    }
