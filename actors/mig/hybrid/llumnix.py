"""Llumnix as a drainer of slices: an instance whose slice is to be re-cut is marked as draining, its requests migrate off.

The scheduler dispatches nothing to a draining instance and takes it as a source whatever its load, so waiting for an empty
instance is all that is left. Handles are those of engine actors (or doubles): ``drain`` and ``load`` are awaited.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from actors.llumnix.load import InstanceLoad
from actors.mig.backends import DeviceSlice
from actors.mig.hybrid.drain import Drained, Refused

POLL_S = 0.05


class LlumnixDrainer:
    """``instances``: the actor handle of the instance on each slice, by the slice's uuid."""

    def __init__(self, instances: Mapping[str, Any], poll_s: float = POLL_S):
        self._instances, self._poll_s = instances, poll_s

    async def drain(self, found: DeviceSlice, deadline_s: float) -> Drained | Refused:
        """Waits until the instance holds no request; refuses when some are left at the deadline."""
        handle = self._instances.get(found.uuid)
        if handle is None:
            return Refused(f"no instance is known on {found.uuid}")
        until = time.monotonic() + deadline_s
        await handle.drain.remote(True)
        load: InstanceLoad = await handle.load.remote()
        moved = len(_requests(load))
        while _requests(load):
            if time.monotonic() > until:
                left = len(_requests(load))
                return Refused(f"{left} request{'s' if left > 1 else ''} could not migrate within {deadline_s:g} s")
            await asyncio.sleep(self._poll_s)
            load = await handle.load.remote()
        return Drained(moved)

    async def undrain(self, found: DeviceSlice) -> None:
        handle = self._instances.get(found.uuid)
        if handle is not None:
            await handle.drain.remote(False)


def _requests(load: InstanceLoad) -> tuple[str, ...]:
    """What runs, waits, or is on its way (in or out)."""
    return (*(r.request_id for r in load.running), *(r.request_id for r in load.waiting), *load.migrating)
