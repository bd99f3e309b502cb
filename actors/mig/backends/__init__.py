"""Slices of a device behind one interface: MIG, green contexts, MPS, CPU shares, simulation. Pure of Ray and of torch.

with open_backend("cpu") as backend:
    backend.repartition(["cpu4of7", "cpu2of7", "cpu1of7"])
    lease = backend.lease(backend.slices()[0].uuid)
    child = subprocess.Popen(command, env=lease.over())
    backend.attach(lease, child.pid)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from actors.mig.backends.errors import (
    BackendError,
    BackendUnavailable,
    NoRoom,
    NoSuchProfile,
    SliceInUse,
    SliceVanished,
)
from actors.mig.backends.interface import DeviceSlice, Lease, SliceBackend, SliceProfile
from actors.mig.backends.worker import InSlice, enter_slice

BACKENDS = ("cpu", "mig", "green", "mps", "sim")

__all__ = [
    "BACKENDS", "BackendError", "BackendUnavailable", "DeviceSlice", "InSlice", "Lease", "NoRoom", "NoSuchProfile",
    "SliceBackend", "SliceInUse", "SliceProfile", "SliceVanished", "enter_slice", "make_backend", "open_backend",
]  # fmt: skip


def make_backend(name: str, *, gpu: str = "0", memory_mib: float | None = None) -> SliceBackend:
    """The backend of this name. ``gpu``: the number of a GPU of this machine; for ``sim`` the name of a model.

    Raises:
        BackendError: unknown name, or a GPU that is no number.
        BackendUnavailable: this machine lacks what it needs.
    """
    if name not in BACKENDS:
        raise BackendError(f"There is no backend {name!r}: there are {', '.join(BACKENDS)}.")
    if name == "cpu":
        from actors.mig.backends.cpu import CpuBackend

        return CpuBackend(memory_mib=memory_mib)
    if name == "sim":
        from actors.mig.backends.simulated import SimBackend

        return SimBackend("A100-80GB" if gpu == "0" else gpu)
    if not gpu.isdigit():
        raise BackendError(f"The backend {name} needs the number of a GPU of this machine, not {gpu!r}.")
    if name == "mig":
        from actors.mig.backends.mig import MigBackend

        return MigBackend(int(gpu))
    if name == "green":
        from actors.mig.backends.green import GreenBackend

        return GreenBackend(int(gpu), memory_mib)
    from actors.mig.backends.mps import MpsBackend

    return MpsBackend(int(gpu), memory_mib)


@contextlib.contextmanager
def open_backend(name: str, *, gpu: str = "0", memory_mib: float | None = None) -> Iterator[SliceBackend]:
    """``make_backend``, closed in every ending."""
    backend = make_backend(name, gpu=gpu, memory_mib=memory_mib)
    try:
        yield backend
    finally:
        backend.close()
