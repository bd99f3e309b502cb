"""The lease table of one node: which slice is whose. Pure: the actor feeds it what the backend and the process table say.

A slice has one holder or none. A holder that died, or a slice that vanished, ends the lease; both are remembered, so that a
late release or heartbeat gets the right sentence.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass

from actors.mig.backends import BackendError, DeviceSlice, SliceInUse, SliceVanished
from actors.mig.lease.names import resource_name


@dataclass(frozen=True)
class Holder:
    """A process: the start time tells it from a later one of the same id."""

    pid: int
    started_at: float
    name: str = ""


@dataclass(frozen=True)
class Held:
    """One lease. ``number`` is never used again."""

    number: int
    slice: DeviceSlice
    holder: Holder


@dataclass(frozen=True)
class Ended:
    """Why a lease ended: ``released``, ``holder died``, ``slice vanished``."""

    held: Held
    why: str


class LeaseTable:
    """See the module."""

    def __init__(self) -> None:
        self._slices: dict[str, DeviceSlice] = {}
        self._held: dict[str, Held] = {}
        self._ended: dict[int, Ended] = {}
        self._numbers = itertools.count(1)

    @property
    def held(self) -> tuple[Held, ...]:
        return tuple(self._held.values())

    @property
    def free(self) -> tuple[DeviceSlice, ...]:
        return tuple(found for uuid, found in self._slices.items() if uuid not in self._held)

    def refresh(self, slices: Collection[DeviceSlice]) -> tuple[Ended, ...]:
        """What exists now; returns the leases of slices that vanished."""
        self._slices = {found.uuid: found for found in slices}
        return tuple(self._end(held, "slice vanished") for held in self.held if held.slice.uuid not in self._slices)

    def take(self, resource: str, holder: Holder) -> Held:
        """A free slice of a resource for a process.

        Raises:
            SliceVanished: the node has (or had) no such slice.
            SliceInUse: all of them are leased; or this process holds one already (a process sees one).
        """
        mine = [held for held in self._held.values() if held.holder.pid == holder.pid]
        if mine:
            raise SliceInUse(
                f"Process {holder.pid} holds slice {mine[0].slice.uuid} already: a process sees one slice alone."
            )
        alike = [found for found in self._slices.values() if resource_name(found.backend, found.profile) == resource]
        if not alike:
            names = {resource_name(found.backend, found.profile) for found in self._slices.values()}
            raise SliceVanished(
                f"This node has no slice {resource} (any more): it has {', '.join(sorted(names)) or 'none at all'}. "
                "Were its slices cut anew after Ray was started there?"
            )
        free = [found for found in alike if found.uuid not in self._held]
        if not free:
            who = ", ".join(f"{h.slice.uuid} by process {h.holder.pid}" for h in self.held if h.slice in alike)
            raise SliceInUse(f"Every slice {resource} of this node is leased: {who}.")
        held = Held(next(self._numbers), free[0], holder)
        self._held[free[0].uuid] = held
        return held

    def give_back(self, number: int) -> Ended:
        """A holder is done.

        Raises:
            BackendError: no such lease, or it ended before: the sentence says how.
        """
        for held in self.held:
            if held.number == number:
                return self._end(held, "released")
        before = self._ended.get(number)
        if before is None:
            raise BackendError(f"There is no lease {number} on this node.")
        if before.why == "slice vanished":
            raise SliceVanished(
                f"The slice {before.held.slice.uuid} of lease {number} vanished: it was cut anew while it was leased."
            )
        raise BackendError(f"The lease {number} of slice {before.held.slice.uuid} is over: {before.why}.")

    def bury(self, dead: Collection[int]) -> tuple[Ended, ...]:
        """Takes back what these processes held."""
        return tuple(self._end(held, "holder died") for held in self.held if held.holder.pid in dead)

    def _end(self, held: Held, why: str) -> Ended:
        del self._held[held.slice.uuid]
        ended = Ended(held, why)
        self._ended[held.number] = ended
        while len(self._ended) > 1000:
            del self._ended[next(iter(self._ended))]
        return ended
