"""The lease actor: one a node, detached, shared by all jobs of the cluster. A thin shell around the lease table.

It asks the backend which slices exist, hands one to a worker, and takes it back when the worker says so, when the worker's
process ends (SIGKILL included: its pidfd becomes readable at once) or when the slice vanishes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import psutil

from actors.cluster import metrics
from actors.mig.backends import BackendError, DeviceSlice, Lease, SliceBackend, make_backend
from actors.mig.lease.table import Ended, Held, Holder, LeaseTable

logger = logging.getLogger("sextant.mig.lease")

_held = metrics.gauge("mig", "leased", "slices", help="Slices that a process holds.")
_taken_back = metrics.counter("mig", "lease_ended", "events", help="Leases that ended.", tags=["why"])
NAMESPACE = "sextant_slices"
ACTOR_OPTIONS: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 100, "max_restarts": 3}


@dataclass(frozen=True)
class BackendSpec:
    """Which slices a node offers; ``layout`` is cut when the actor starts (empty: what is cut already)."""

    backend: str = "mig"
    gpu: str = "0"
    layout: tuple[str, ...] = ()
    memory_mib: float | None = None

    def open(self) -> SliceBackend:
        backend = make_backend(self.backend, gpu=self.gpu, memory_mib=self.memory_mib)
        try:
            if self.layout:
                backend.repartition(self.layout)
        except BaseException:
            backend.close()
            raise
        return backend


@dataclass(frozen=True)
class Grant:
    """What a worker gets: the number with which it gives the lease back, and its environment."""

    number: int
    slice: DeviceSlice
    environment: tuple[tuple[str, str], ...]


class SliceLeaser:
    """See the module. Every method runs on one event loop; calls into the backend are short."""

    def __init__(self, spec: BackendSpec):
        self._spec = spec
        self._backend = spec.open()
        self._table = LeaseTable()
        self._leases: dict[int, Lease] = {}
        self._watches: set[asyncio.Task[None]] = set()

    async def spec(self) -> BackendSpec:
        return self._spec

    async def lease(self, resource: str, pid: int, name: str = "") -> Grant:
        """A slice for a process of this node.

        Raises:
            BackendError: none is free, none exists, or there is no such process.
        """
        self._note(self._table.refresh(self._backend.slices()))
        try:
            holder = Holder(pid, psutil.Process(pid).create_time(), name)
            pidfd = os.pidfd_open(pid)
        except (psutil.NoSuchProcess, OSError) as error:
            raise BackendError(
                f"Process {pid} does not run on this node: a lease is asked for on the worker's own."
            ) from error
        try:
            held = self._table.take(resource, holder)
            try:
                self._leases[held.number] = self._backend.lease(held.slice.uuid, pid)
            except BaseException:
                self._table.give_back(held.number)
                raise
        except BaseException:
            os.close(pidfd)
            raise
        self._spawn(self._watch(held, pidfd))
        _held.set(len(self._table.held))
        logger.info("slice %s leased to process %d (%s)", held.slice.uuid, pid, name)
        return Grant(held.number, held.slice, self._leases[held.number].environment)

    async def release(self, number: int) -> None:
        """Raises BackendError (SliceVanished) when the lease ended before, and says how."""
        self._note([self._table.give_back(number)])

    async def held(self) -> tuple[Held, ...]:
        return self._table.held

    async def free(self) -> tuple[DeviceSlice, ...]:
        self._note(self._table.refresh(self._backend.slices()))
        return self._table.free

    async def recut(self, layout: tuple[str, ...]) -> int:
        """Cuts the node's device anew; leased slices stay or the whole is refused (SliceInUse). Returns the steps."""
        steps = await asyncio.to_thread(self._backend.repartition, layout)
        self._note(self._table.refresh(self._backend.slices()))
        return steps

    async def close(self) -> None:
        """Takes everything back and lets the backend go; the actor can then be ended."""
        for task in list(self._watches):
            task.cancel()
        for lease in self._leases.values():
            self._backend.release(lease)
        self._leases.clear()
        self._backend.close()

    # ---- the inside

    async def _watch(self, held: Held, pidfd: int) -> None:
        """Waits for the end of a holder's process."""
        loop, gone = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(pidfd, gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        if held in self._table.held:
            self._note(self._table.bury([held.holder.pid]))

    def _note(self, ended: tuple[Ended, ...] | list[Ended]) -> None:
        for one in ended:
            lease = self._leases.pop(one.held.number, None)
            if lease is not None:
                self._backend.release(lease)
            _taken_back.increase(why=one.why.replace(" ", "_"))
            logger.info("slice %s of process %d: %s", one.held.slice.uuid, one.held.holder.pid, one.why)
        _held.set(len(self._table.held))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._watches.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._watches.discard(task)
        with contextlib.suppress(asyncio.CancelledError):
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("the watch over a lease failed", exc_info=error)
