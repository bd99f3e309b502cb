"""The backend ``cpu``: slices of this machine's cores, for machines without a GPU. An analogue: its numbers say nothing of MIG.

A slice is a share of the cores' time (kept by the governor, in a closed loop over what was really used), a set of cores, and
a limit of address space. Profiles are named ``cpu2of7``: two of seven equal parts of the cores and of the memory.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.mig.backends.errors import BackendError, BackendUnavailable, NoRoom, SliceVanished
from actors.mig.backends.interface import PREFIX, BookKeeping, DeviceSlice, Lease, SliceProfile

PARTS = 7
SIZES = (1, 2, 3, 4, 5, 6, 7)
MEMORY_SHARE = 0.75
"""Of the machine's memory that slices share."""
_ANSWER_S = 10.0


@dataclass(frozen=True)
class CpuUse:
    """What a leased slice used since its process was attached, in CPU seconds."""

    asked_share: float
    used_s: float
    wall_s: float
    cores: int

    @property
    def achieved_share(self) -> float:
        """Of the device's CPU time; what a process that always wants to run gets. nan before any time has passed."""
        return self.used_s / (self.cores * self.wall_s) if self.wall_s > 0 else math.nan

    @property
    def error(self) -> float:
        """Relative error of the share, for a process that always wants to run."""
        return abs(self.achieved_share - self.asked_share) / self.asked_share


class GovernorProcess:
    """The governor (governor.py) as a child process; starts with the first process that it holds."""

    def __init__(self, most_cores: float):
        self._most_cores = most_cores
        self._process: subprocess.Popen[bytes] | None = None
        self._holding: dict[str, int] = {}

    def hold(self, name: str, cores: float, pid: int) -> None:
        answer = self._ask({"do": "hold", "slice": name, "cores": cores, "pid": pid})
        if not answer["ok"]:
            raise BackendError(f"Process {pid} cannot be held to its slice: {answer['why']}.")
        self._holding[name] = pid

    def let_go(self, name: str) -> None:
        self._holding.pop(name, None)
        if self._process is not None:
            self._ask({"do": "let_go", "slice": name})

    def read(self, name: str) -> tuple[float, float]:
        """(CPU seconds used, wall seconds) since it is held.

        Raises:
            SliceVanished: nothing is held under this name; its process may have ended.
        """
        answer = self._ask({"do": "read", "slice": name})
        if not answer["ok"]:
            raise SliceVanished(f"No process runs in slice {name}: it has ended, or was never attached.")
        return float(answer["used_s"]), float(answer["wall_s"])

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]
        try:
            process.wait(_ANSWER_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()  # type: ignore[union-attr]

    def _ask(self, command: dict[str, object]) -> dict[str, Any]:
        process = self._running()
        try:
            process.stdin.write(json.dumps(command).encode() + b"\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            # A governor that hangs must not hang its owner.
            if select.select([process.stdout.fileno()], [], [], _ANSWER_S)[0]:  # type: ignore[union-attr]
                line = process.stdout.readline()  # type: ignore[union-attr]
                if line:
                    return dict(json.loads(line))
        except (BrokenPipeError, OSError):
            pass
        self._lost()
        raise BackendError(
            "The CPU governor has ended unexpectedly; its processes were let go: lease the slices again."
        )

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            path = Path(__file__).with_name("governor.py")
            command = [sys.executable, "-I", "-S", str(path), str(self._most_cores)]
            try:
                # Its own session: a Ctrl-C at the terminal must not end it before its processes go on.
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
                )
            except OSError as error:
                raise BackendUnavailable(f"The CPU governor could not be started: {error.strerror}.") from error
        return self._process

    def _lost(self) -> None:
        """Whoever the lost governor had stopped must go on."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
        for pid in self._holding.values():
            with suppress(OSError):
                os.kill(pid, signal.SIGCONT)
        self._holding.clear()


class CpuBackend(BookKeeping):
    """This machine's cores (or some of them) cut into ``PARTS`` parts."""

    name = "cpu"
    label = "CPU shares: an analogue, no MIG numbers"

    def __init__(self, cores: Sequence[int] | None = None, memory_mib: float | None = None):
        """``cores``: those that this process may use by default. ``memory_mib``: of the whole device.

        Raises:
            BackendUnavailable: no Linux with pidfds, or cores that this process may not use.
        """
        super().__init__()
        if not hasattr(os, "pidfd_open") or not hasattr(os, "sched_getaffinity"):
            raise BackendUnavailable("The backend cpu needs Linux (5.3 or later) and Python with os.pidfd_open.")
        allowed = os.sched_getaffinity(0)
        self.cores = tuple(sorted(allowed if cores is None else set(cores)))
        if not self.cores or not set(self.cores) <= allowed:
            raise BackendUnavailable(
                f"The cores {list(self.cores)} are not all allowed here: these are {sorted(allowed)}."
            )
        if memory_mib is None:
            memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20 * MEMORY_SHARE
        self.memory_mib = memory_mib
        self._slices: dict[str, tuple[DeviceSlice, int, tuple[int, ...]]] = {}
        self._governor = GovernorProcess(float(len(self.cores)))

    @property
    def device(self) -> str:
        return f"cpu-{len(self.cores)}-cores"

    def profiles(self) -> tuple[SliceProfile, ...]:
        return tuple(
            SliceProfile(f"cpu{k}of{PARTS}", k / PARTS, self.memory_mib * k / PARTS, PARTS // k, None) for k in SIZES
        )

    def slices(self) -> tuple[DeviceSlice, ...]:
        return tuple(found for found, _, _ in self._slices.values())

    def create(self, profile: str) -> DeviceSlice:
        known = self.profile(profile)
        parts = round(known.compute_share * PARTS)
        free = PARTS - sum(taken for _, taken, _ in self._slices.values())
        if parts > free:
            raise NoRoom(f"No room for {profile}: {free} of {PARTS} parts of {self.device} are free.")
        cores = self._choose_cores(parts)
        where = f"{parts}/{PARTS} of the time of cores {', '.join(map(str, self.cores))}"
        if len(cores) < len(self.cores):
            where = f"cores {', '.join(map(str, cores))}"
        made = DeviceSlice(self._new_uuid(f"{parts}OF{PARTS}"), self.name, self.device, profile, where)
        self._slices[made.uuid] = (made, parts, cores)
        return made

    def use(self, uuid: str) -> CpuUse:
        """What the process in a leased slice used so far.

        Raises:
            SliceVanished: no such slice, or nothing runs in it.
        """
        self.find(uuid)
        used, wall = self._governor.read(uuid)
        return CpuUse(self._slices[uuid][1] / PARTS, used, wall, len(self.cores))

    def close(self) -> None:
        """Lets every process go on at full speed and ends the governor."""
        self._held.clear()
        self._governor.close()

    # ---- the inside

    def _choose_cores(self, parts: int) -> tuple[int, ...]:
        """Whole cores of its own where the share is a whole number of cores and they are free; else all, shared in time."""
        wanted = parts * len(self.cores) / PARTS
        taken = {core for _, _, cores in self._slices.values() if len(cores) < len(self.cores) for core in cores}
        free = [core for core in self.cores if core not in taken]
        if wanted.is_integer() and wanted < len(self.cores) and len(free) >= wanted:
            return tuple(free[: int(wanted)])
        return self.cores

    def _remove(self, found: DeviceSlice) -> None:
        del self._slices[found.uuid]

    def _environment(self, found: DeviceSlice) -> dict[str, str]:
        _, parts, cores = self._slices[found.uuid]
        threads = str(max(1, min(len(cores), math.ceil(parts * len(self.cores) / PARTS))))
        return {
            f"{PREFIX}CORES": ",".join(map(str, cores)),
            f"{PREFIX}MEMORY_MIB": f"{self.memory_mib * parts / PARTS:.1f}",
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            # Threads that spin while they wait for one another would use up the slice's time.
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": "0",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def _begin(self, lease: Lease) -> None:
        _, parts, _ = self._slices[lease.slice.uuid]
        self._governor.hold(lease.slice.uuid, parts * len(self.cores) / PARTS, lease.holder)

    def _end(self, lease: Lease) -> None:
        if lease.holder:
            self._governor.let_go(lease.slice.uuid)
