"""The errors of the controller; each text is a sentence that says what to do. Nothing is left half-created when one is raised."""

from __future__ import annotations


class ControllerError(RuntimeError):
    """Something stands in the way of reading or changing a GPU's partition."""


class NoNvml(ControllerError):
    """No NVML library, no driver, or no GPU."""


class NoPrivilege(ControllerError):
    """The user may not change (or, for placements, not even read) MIG instances."""


class MigOff(ControllerError):
    """The GPU has no MIG, MIG mode is off, or a reset is outstanding."""


class GpuBusy(ControllerError):
    """Processes run on the GPU, or an instance is in use."""


class RolledBack(ControllerError):
    """A change failed on the way and was undone: the GPU is cut as before (MIG devices made anew have new UUIDs)."""


class RollbackFailed(ControllerError):
    """A change failed and could not be undone; the sentence says what the GPU holds now."""
