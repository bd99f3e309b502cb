"""What a backend of GPU slices is: profiles, create, destroy, and lease -> environment. Five rooms stand behind it.

    mig     hardware partitions through NVML (root, MIG mode)        green   SM partitions in a process (any recent NVIDIA GPU)
    mps     a cap on the share of SMs of a process (a daemon)         cpu     an analogue on CPU cores (embedded default)
    sim     the published tables and the prediction model

A lease is nothing but environment variables: a process that has them *before torch is imported* calls ``enter_slice``
(worker.py) and runs in its slice. So the same sweep, the same Ray worker and the same benchmark run on all five.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from actors.mig.backends.errors import BackendError, NoSuchProfile, SliceInUse, SliceVanished

PREFIX = "SEXTANT_SLICE_"
"""Of the variables with which a lease tells ``enter_slice`` what to do."""


@dataclass(frozen=True)
class SliceProfile:
    """A kind of slice. Shares are of the whole device, above 0 and at most 1."""

    name: str
    compute_share: float
    memory_mib: float | None
    """What a slice may use; None: not limited by the slice."""
    most: int
    """Slices of this profile that fit on an empty device."""
    sm_count: int | None = None
    bandwidth_share: float = 1.0
    """Of the device's memory bandwidth; 1 where the backend does not partition it."""


@dataclass(frozen=True)
class DeviceSlice:
    """A slice that exists. ``uuid`` names it for as long as it exists: a slice that is cut anew gets another one."""

    uuid: str
    backend: str
    device: str
    profile: str
    detail: str = ""
    """Where it lies, for people: ``memory slice 4``, ``SMs 16 to 31``, ``cores 0, 1``."""


@dataclass(frozen=True)
class Lease:
    """The right of one process to a slice, and what it must have in its environment before torch is imported."""

    slice: DeviceSlice
    holder: int
    """Process id; 0 while the process does not exist yet (see ``SliceBackend.attach``)."""
    environment: tuple[tuple[str, str], ...]

    def over(self, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """A whole environment for a child process: ``base`` (default: this process's) with the lease laid over it."""
        return {**(os.environ if base is None else base), **dict(self.environment)}


@runtime_checkable
class SliceBackend(Protocol):
    """One device cut into slices. Methods raise BackendError (or a subclass) with a sentence; all may be called again."""

    name: str
    """``mig``, ``green``, ``mps``, ``cpu`` or ``sim``."""
    label: str
    """What its numbers are, printed beside every one of them."""

    @property
    def device(self) -> str: ...

    def profiles(self) -> tuple[SliceProfile, ...]:
        """What may be cut, the smallest first."""

    def slices(self) -> tuple[DeviceSlice, ...]:
        """What exists now, asked of the device where it can be asked."""

    def fits(self, profiles: Sequence[str]) -> bool:
        """Whether an empty device could hold these beside one another. Nothing is changed."""

    def create(self, profile: str) -> DeviceSlice:
        """One slice more, where it leaves most room."""

    def destroy(self, uuid: str) -> None:
        """Raises SliceInUse while it is leased, SliceVanished when it is not there."""

    def repartition(self, profiles: Sequence[str]) -> int:
        """Makes the device hold exactly these; slices of a wanted profile stay. Returns how many were destroyed and created."""

    def lease(self, uuid: str, holder: int = 0) -> Lease: ...

    def attach(self, lease: Lease, holder: int) -> Lease:
        """Names the process of a lease that was given out before it existed."""

    def release(self, lease: Lease) -> None:
        """Takes it back; a lease that is not held (any more) is no error."""

    def close(self) -> None:
        """Lets go of everything that this object started; slices of hardware stay."""


class BookKeeping:
    """What all backends share: which slices exist, who holds them, and the sentences for what cannot be."""

    name = ""

    def __init__(self) -> None:
        self._held: dict[str, Lease] = {}
        self._number = itertools.count()

    # ---- a backend says these

    def profiles(self) -> tuple[SliceProfile, ...]:
        raise NotImplementedError

    def slices(self) -> tuple[DeviceSlice, ...]:
        raise NotImplementedError

    def create(self, profile: str) -> DeviceSlice:
        raise NotImplementedError

    def _remove(self, found: DeviceSlice) -> None:
        raise NotImplementedError

    def _environment(self, found: DeviceSlice) -> dict[str, str]:
        raise NotImplementedError

    def _begin(self, lease: Lease) -> None:
        """The process of a lease is known."""

    def _end(self, lease: Lease) -> None:
        """The lease is over."""

    # ---- and gets these

    def fits(self, profiles: Sequence[str]) -> bool:
        """By shares; backends with a geometry know better."""
        return sum(self.profile(name).compute_share for name in profiles) <= 1 + 1e-9

    def profile(self, name: str) -> SliceProfile:
        """Raises NoSuchProfile, with the list."""
        for profile in self.profiles():
            if profile.name == name:
                return profile
        names = ", ".join(profile.name for profile in self.profiles())
        raise NoSuchProfile(f"The backend {self.name} has no profile {name!r}: it has {names}.")

    def find(self, uuid: str) -> DeviceSlice:
        """Raises SliceVanished."""
        for found in self.slices():
            if found.uuid == uuid:
                return found
        there = ", ".join(f"{found.uuid} ({found.profile})" for found in self.slices()) or "no slice"
        raise SliceVanished(f"The slice {uuid} does not exist (any more): the backend {self.name} has {there}.")

    def destroy(self, uuid: str) -> None:
        found = self.find(uuid)
        self._refuse_if_held(uuid)
        self._remove(found)

    def repartition(self, profiles: Sequence[str]) -> int:
        """Fewest steps: what is wanted and there stays. Undone as far as possible when a creation fails."""
        for name in profiles:
            self.profile(name)
        missing = Counter(profiles)
        spare: list[DeviceSlice] = []
        for found in sorted(self.slices(), key=lambda one: one.uuid not in self._held):  # what is leased stays first
            if missing[found.profile] > 0:
                missing[found.profile] -= 1
            else:
                spare.append(found)
        for found in spare:
            self._refuse_if_held(found.uuid)
        for found in spare:
            self._remove(found)
        made: list[DeviceSlice] = []
        wanted = sorted(missing.elements(), key=lambda name: -self.profile(name).compute_share)
        try:
            for name in wanted:
                made.append(self.create(name))  # noqa: PERF401 (what was made must be known when one fails)
        except BackendError as error:
            for found in made:
                self._remove(found)
            for found in spare:
                self.create(found.profile)
            raise type(error)(f"{error} The device is cut as before.") from error
        return len(spare) + len(made)

    def lease(self, uuid: str, holder: int = 0) -> Lease:
        found = self.find(uuid)
        self._refuse_if_held(uuid)
        variables = {
            f"{PREFIX}BACKEND": self.name,
            f"{PREFIX}UUID": uuid,
            f"{PREFIX}PROFILE": found.profile,
            **self._environment(found),
        }
        lease = Lease(found, holder, tuple(sorted(variables.items())))
        self._held[uuid] = lease
        if holder:
            self._start(lease)
        return lease

    def attach(self, lease: Lease, holder: int) -> Lease:
        if self._held.get(lease.slice.uuid) != lease:
            raise SliceVanished(f"The lease of slice {lease.slice.uuid} is not held: it was taken back.")
        known = Lease(lease.slice, holder, lease.environment)
        self._held[lease.slice.uuid] = known
        self._start(known)
        return known

    def release(self, lease: Lease) -> None:
        held = self._held.get(lease.slice.uuid)
        if held is not None and held.environment == lease.environment and lease.holder in (0, held.holder):
            del self._held[lease.slice.uuid]
            self._end(held)

    def _start(self, lease: Lease) -> None:
        try:
            self._begin(lease)
        except BaseException:
            self._held.pop(lease.slice.uuid, None)
            raise

    def _refuse_if_held(self, uuid: str) -> None:
        held = self._held.get(uuid)
        if held is not None:
            who = f"process {held.holder}" if held.holder else "a process that is being started"
            raise SliceInUse(
                f"The slice {uuid} ({held.slice.profile}) is leased to {who}: release it or end that first."
            )

    def _new_uuid(self, word: str) -> str:
        return f"{self.name.upper()}-{word}-{os.getpid():x}-{next(self._number)}"


OpenBackend = Callable[[], SliceBackend]
