"""Virtual usage and freeness of an instance: Algorithm 1 of Llumnix (OSDI 2024, section 4.4.1). Pure functions of InstanceLoad.

Virtual usage is what a request *should* count for, in KV blocks: a queuing request counts its demand before it holds
anything, so that an instance with a blocked head of line looks full and sheds load; a request of high priority counts
headroom that keeps others away; a draining instance counts as infinitely full.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from actors.llumnix.load import InstanceLoad

Headroom = Mapping[int, float]
"""Priority -> blocks that the requests of this priority on one instance shall have free beside them, together."""

NO_HEADROOM: Headroom = {}


def virtual_usage(load: InstanceLoad, headroom: Headroom = NO_HEADROOM) -> dict[str, float]:
    """Virtual usage in blocks of every request of the instance.

    Running: its physical blocks + headroom[p] / (running requests of its priority p). Waiting: its demand if it is the head
    of the line, else 0. On a draining instance the usage is infinite whoever asks: see ``total_virtual_usage``.
    """
    same_priority = Counter(r.priority for r in load.running)
    usage = {r.request_id: r.blocks + headroom.get(r.priority, 0.0) / same_priority[r.priority] for r in load.running}
    for position, request in enumerate(load.waiting):
        usage[request.request_id] = float(request.blocks) if position == 0 else 0.0
    return usage


def total_virtual_usage(load: InstanceLoad, headroom: Headroom = NO_HEADROOM) -> float:
    """Sum of the instance's virtual usages in blocks; infinite while it drains.

    Blocks that several running requests share count once for each in the first sum, but never more than the instance
    really uses: the physical part is capped by the blocks in use. Blocks promised to arriving migrations count in full.
    """
    if load.draining:
        return math.inf
    physical = sum(r.blocks for r in load.running)
    in_use = max(0, load.total_blocks - load.free_blocks - load.reserved_blocks)
    shared = max(0, physical - in_use) if load.running else 0
    return sum(virtual_usage(load, headroom).values()) - shared + load.reserved_blocks


def batch_size(load: InstanceLoad) -> int:
    """B of Algorithm 1: running requests, the head of the line (whose demand is counted) included."""
    return len(load.running) + bool(load.waiting)


def freeness(load: InstanceLoad, headroom: Headroom = NO_HEADROOM) -> float:
    """(M - sum of virtual usages) / B: about how many more blocks each request of the batch can grow by. May be negative.

    M is the instance's block count. An empty instance (B = 0) counts as one request that uses nothing, so its freeness is M,
    larger than any busy instance's of its size. A draining instance's is -infinity.
    """
    return (load.total_blocks - total_virtual_usage(load, headroom)) / max(1, batch_size(load))


def newest(loads: list[InstanceLoad]) -> list[InstanceLoad]:
    """One load an instance, the one of the highest step, ordered by instance id."""
    latest: dict[str, InstanceLoad] = {}
    for load in loads:
        known = latest.get(load.instance_id)
        if known is None or load.step >= known.step:
            latest[load.instance_id] = load
    return [latest[name] for name in sorted(latest)]
