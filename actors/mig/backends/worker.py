"""Inside a leased process: what the environment of a lease asks for, carried out. Before torch is imported, then once after.

inside = enter_slice()              # variables, cores; refuses when torch is here already
import torch
with inside.torch_ready():          # memory limit; a stream on the slice's SMs
    ...
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from actors.mig.backends.errors import BackendError, BackendUnavailable
from actors.mig.backends.interface import PREFIX


@dataclass(frozen=True)
class InSlice:
    """The slice that this process is in; ``backend`` is ``none`` for a process without a lease: the whole device."""

    backend: str = "none"
    uuid: str = ""
    profile: str = "full"
    sms: tuple[int, ...] = ()
    memory_mib: float | None = None
    memory_fraction: float | None = None

    @contextlib.contextmanager
    def torch_ready(self) -> Iterator[None]:
        """Limits and streams that need torch; the limit of the address space ends with the block.

        Raises:
            BackendUnavailable: torch has no CUDA, or the driver no green contexts.
        """
        import torch

        if self.backend == "cpu":
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
            with _address_space(self.memory_mib):
                yield
            return
        if self.backend in ("mig", "green", "mps") and not torch.cuda.is_available():
            raise BackendUnavailable(
                f"The slice {self.uuid} needs CUDA, and this torch sees none (torch.cuda.is_available())."
            )
        if self.backend == "green":
            from actors.mig.backends.green_driver import GreenDriver, GreenPartition

            if self.memory_fraction is not None:
                torch.cuda.set_per_process_memory_fraction(self.memory_fraction)
            torch.cuda.init()
            # CUDA_VISIBLE_DEVICES made the GPU number 0 of this process.
            with GreenPartition(GreenDriver(0), self.sms) as partition:
                stream = torch.cuda.ExternalStream(partition.streams[-1])
                with torch.cuda.stream(stream):
                    yield
                torch.cuda.synchronize()
            return
        yield


def enter_slice(variables: Mapping[str, str] | None = None) -> InSlice:
    """Makes this process a worker of the slice that ``variables`` (default: os.environ) describe.

    Raises:
        BackendError: torch was imported before, so that the variables would not be read.
        BackendUnavailable: the slice's cores are not there.
    """
    given = os.environ if variables is None else variables
    backend = given.get(f"{PREFIX}BACKEND", "none")
    if backend == "none":
        return InSlice()
    if variables is not None:
        if "torch" in sys.modules and any(os.environ.get(name) != value for name, value in variables.items()):
            raise BackendError(
                "The slice's environment came too late: torch is imported already in this process. Take the lease before "
                "anything imports torch (in a Ray worker: first thing in the actor or task, and import torch inside it)."
            )
        os.environ.update(variables)
    cores = [int(core) for core in given.get(f"{PREFIX}CORES", "").split(",") if core]
    if cores:
        try:
            os.sched_setaffinity(0, cores)
        except OSError as error:
            raise BackendUnavailable(f"The cores {cores} of the slice cannot be used: {error.strerror}.") from error
    return InSlice(
        backend,
        given.get(f"{PREFIX}UUID", ""),
        given.get(f"{PREFIX}PROFILE", ""),
        tuple(int(sms) for sms in given.get(f"{PREFIX}SMS", "").split(",") if sms),
        _number(given, "MEMORY_MIB"),
        _number(given, "MEMORY_FRACTION"),
    )


@contextlib.contextmanager
def _address_space(memory_mib: float | None) -> Iterator[None]:
    """RLIMIT_AS at what the process maps now plus the slice's memory: libraries are not the workload's."""
    if memory_mib is None:
        yield
        return
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = mapped + int(memory_mib * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _number(given: Mapping[str, str], name: str) -> float | None:
    text = given.get(f"{PREFIX}{name}")
    return float(text) if text else None
