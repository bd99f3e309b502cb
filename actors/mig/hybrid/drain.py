"""Re-cutting a device while it works: drain, stop, cut, start, go on; or refuse, and everything goes on as before. Pure.

Who serves on a slice is asked through ``SliceDrainer`` to bring its requests elsewhere first (Llumnix migrates them,
llumnix.py); a drainer that refuses, fails or takes too long ends the re-cut before anything was touched.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from actors.mig.backends import BackendError, DeviceSlice, SliceBackend


@dataclass(frozen=True)
class Drained:
    """Nothing runs on the slice any more."""

    moved: int = 0
    """Requests that went on elsewhere."""


@dataclass(frozen=True)
class Refused:
    """The slice cannot be drained now."""

    why: str


class SliceDrainer(Protocol):
    """Whoever has work on slices."""

    async def drain(self, found: DeviceSlice, deadline_s: float) -> Drained | Refused:
        """Takes no new work on the slice, and brings away (or ends) what is there, within ``deadline_s`` seconds."""

    async def undrain(self, found: DeviceSlice) -> None:
        """The slice stays after all: takes new work again. Also after a drain that failed or was cancelled."""


@dataclass(frozen=True)
class RecutOutcome:
    """What came of a re-cut; ``refused`` left everything as it was."""

    outcome: Literal["done", "nothing to do", "refused", "failed"]
    why: str = ""
    moved: int = 0
    steps: int = 0
    drain_s: float = 0.0
    stop_s: float = 0.0
    cut_s: float = 0.0
    start_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.drain_s + self.stop_s + self.cut_s + self.start_s


SliceCall = Callable[[DeviceSlice], Awaitable[None]]


async def recut(
    backend: SliceBackend,
    target: Sequence[str],
    drainers: Mapping[str, SliceDrainer],
    stop: SliceCall,
    start: SliceCall,
    *,
    deadline_s: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
) -> RecutOutcome:
    """Makes the device hold ``target``.

    Args:
        drainers: by the uuid of the slice; a slice without one has nothing to drain.
        stop: ends the process on a slice and gives its lease back (a training: after a checkpoint).
        start: begins the work of a slice that was made; called for every new one, and again for those stopped when the cut
            failed.

    Raises:
        Nothing of a drainer or of the backend: those are outcomes. What ``stop`` or ``start`` raise is raised after the device
        was brought into a state that ``slices`` tells.
    """
    before = {found.uuid: found for found in backend.slices()}
    going = _going(list(before.values()), target)
    if not going and not Counter(target) - Counter(found.profile for found in before.values()):
        return RecutOutcome("nothing to do")
    if not backend.fits(target):
        return RecutOutcome("refused", f"{' + '.join(target)} do not fit on the device.")
    began = clock()
    answers = await asyncio.gather(*(_drain(drainers.get(found.uuid), found, deadline_s) for found in going))
    drained = clock()
    refusals = [f"{found.profile}: {answer.why}" for found, answer in zip(going, answers, strict=True)
                if isinstance(answer, Refused)]  # fmt: skip
    if refusals:
        await _undrain(drainers, going)
        return RecutOutcome("refused", "; ".join(refusals), drain_s=drained - began)
    moved = sum(answer.moved for answer in answers if isinstance(answer, Drained))
    stopped: list[DeviceSlice] = []
    try:
        for found in going:
            await stop(found)
            stopped.append(found)
    except BaseException:
        await _go_on(backend, stopped, start, drainers, going)
        raise
    ended = clock()
    try:
        steps = await asyncio.to_thread(backend.repartition, tuple(target))
    except BackendError as error:
        await _go_on(backend, stopped, start, drainers, going)
        return RecutOutcome("failed", str(error), moved, 0, drained - began, ended - drained, clock() - ended)
    cut = clock()
    for found in backend.slices():
        if found.uuid not in before:
            await start(found)
    return RecutOutcome("done", "", moved, steps, drained - began, ended - drained, cut - ended, clock() - cut)


def _going(held: Sequence[DeviceSlice], target: Sequence[str]) -> list[DeviceSlice]:
    """The slices that the target does not keep: beyond the number wanted of their profile, the newest first."""
    missing = Counter(target)
    going = []
    for found in held:
        if missing[found.profile] > 0:
            missing[found.profile] -= 1
        else:
            going.append(found)
    return going


async def _drain(drainer: SliceDrainer | None, found: DeviceSlice, deadline_s: float) -> Drained | Refused:
    if drainer is None:
        return Drained()
    try:
        # A little longer than it was given: its own sentence is better than ours.
        return await asyncio.wait_for(drainer.drain(found, deadline_s), deadline_s * 1.1 + 0.1)
    except TimeoutError:
        return Refused(f"not drained within {deadline_s:g} s")
    except Exception as error:
        return Refused(f"the drainer failed ({type(error).__name__}: {error})")


async def _undrain(drainers: Mapping[str, SliceDrainer], going: Sequence[DeviceSlice]) -> None:
    """Every one, whatever the others say."""
    known = [(drainers[found.uuid], found) for found in going if found.uuid in drainers]
    await asyncio.gather(*(drainer.undrain(found) for drainer, found in known), return_exceptions=True)


async def _go_on(
    backend: SliceBackend,
    stopped: Sequence[DeviceSlice],
    start: SliceCall,
    drainers: Mapping[str, SliceDrainer],
    going: Sequence[DeviceSlice],
) -> None:
    """The cut did not happen: what was stopped starts on the slices that are there (a roll-back may have made them anew)."""
    there = list(backend.slices())
    for found in stopped:
        same = next((one for one in there if one.uuid == found.uuid), None) or next(
            (one for one in there if one.profile == found.profile and one.uuid not in {s.uuid for s in stopped}), None
        )
        if same is not None:
            there.remove(same)
            await start(same)
    await _undrain(drainers, going)
