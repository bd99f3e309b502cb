"""The MIG controller over NVML: mode, instances at placements, re-partition in the fewest steps, roll-back, UUIDs.

with Nvml() as nvml:
    controller = MigController(nvml)
    change = controller.repartition(0, [SliceTarget("3g.40gb"), SliceTarget("2g.20gb")], dry_run=True)
    for step in change.steps: print(step)
"""

from __future__ import annotations

from actors.mig.controller.controller import Change, GpuStatus, MigController
from actors.mig.controller.errors import (
    ControllerError,
    GpuBusy,
    MigOff,
    NoNvml,
    NoPrivilege,
    RollbackFailed,
    RolledBack,
)
from actors.mig.controller.layout import ComputeInstance, GpuInstance, SliceTarget, Step, fewest_steps
from actors.mig.controller.nvml import Nvml

__all__ = [
    "Change", "ComputeInstance", "ControllerError", "GpuBusy", "GpuInstance", "GpuStatus", "MigController", "MigOff", "NoNvml",
    "NoPrivilege", "Nvml", "RollbackFailed", "RolledBack", "SliceTarget", "Step", "fewest_steps",
]  # fmt: skip
