"""Which instance gets a new request. ``llumnix`` is the paper's rule (the freest); the others are for comparison.

A policy's ``choose`` is deterministic: the same loads and calls give the same instances, whatever order the loads come in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, Protocol

from actors.llumnix.load import InstanceLoad
from actors.llumnix.policy.virtual_usage import NO_HEADROOM, Headroom, freeness, newest

DispatchName = Literal["llumnix", "round_robin", "least_loaded"]


class NoInstance(RuntimeError):
    """No instance can take the request: none is there, all are draining, or it is too large for each of them."""


class Placeable(Protocol):
    """What a policy looks at in a request; ``ports.DispatchRequest`` is one."""

    @property
    def tokens(self) -> int: ...


class DispatchPolicy(Protocol):
    """One rule. ``choose`` returns an instance id; raises NoInstance."""

    name: str

    def choose(self, loads: Sequence[InstanceLoad], request: Placeable) -> str: ...


def demand(request: Placeable, block_size: int) -> int:
    """Blocks that the request needs to start: its tokens and the next one."""
    return request.tokens // block_size + 1


def candidates(loads: Sequence[InstanceLoad], request: Placeable) -> list[InstanceLoad]:
    """Instances that may take the request, newest load each, ordered by id. Raises NoInstance."""
    known = newest(list(loads))
    if not known:
        raise NoInstance("no instance is registered")
    able = [load for load in known if not load.draining]
    if not able:
        raise NoInstance("every instance is draining")
    able = [load for load in able if demand(request, load.block_size) <= load.total_blocks]
    if not able:
        raise NoInstance(f"a request of {request.tokens} tokens is larger than every instance's KV memory")
    return able


def admitted(load: InstanceLoad) -> InstanceLoad:
    """The load once the instance has taken in those waiting requests that fit, in order.

    Algorithm 1 counts of the queue only its head, because whatever fits is no longer queued. Between two reports of an
    instance that is not so: several requests may just have been sent there. Without this, a burst would pile up on one.
    """
    free, running, waiting = load.free_blocks, list(load.running), list(load.waiting)
    while waiting and waiting[0].blocks <= free:
        free -= waiting[0].blocks
        running.append(waiting.pop(0))
    return replace(load, free_blocks=free, running=tuple(running), waiting=tuple(waiting))


class Llumnix:
    """To the freest instance that could start the request now; of equals the one with fewer requests, then the smaller id.

    Where no instance could, the paper's freeness no longer tells them apart well: of a queue it counts the head alone, so a
    small head with a long queue behind it looks freer than a large head with none. The request would wait for the whole
    queue; it goes where least is waiting beyond what is free.
    """

    name = "llumnix"

    def __init__(self, headroom: Headroom = NO_HEADROOM):
        self._headroom = headroom

    def choose(self, loads: Sequence[InstanceLoad], request: Placeable) -> str:
        """See the class."""

        def rank(load: InstanceLoad) -> tuple[bool, float, int, str]:
            settled = admitted(load)
            missing = demand(request, load.block_size) + sum(r.blocks for r in settled.waiting) - settled.free_blocks
            blocked = bool(settled.waiting) or missing > 0
            order = missing if blocked else -freeness(settled, self._headroom)
            return blocked, order, len(load.running) + len(load.waiting), load.instance_id

        return min(candidates(loads, request), key=rank).instance_id


class RoundRobin:
    """In the order of their ids, one after the other."""

    name = "round_robin"

    def __init__(self) -> None:
        self._last = ""

    def choose(self, loads: Sequence[InstanceLoad], request: Placeable) -> str:
        """See the class."""
        names = [load.instance_id for load in candidates(loads, request)]
        self._last = next((name for name in names if name > self._last), names[0])
        return self._last


class LeastLoaded:
    """To the instance whose KV memory is least used, everything in its queue included: load-aware, as INFaaS++ in the paper."""

    name = "least_loaded"

    def choose(self, loads: Sequence[InstanceLoad], request: Placeable) -> str:
        """See the class."""

        def rank(load: InstanceLoad) -> tuple[float, int, str]:
            used = load.total_blocks - load.free_blocks + sum(r.blocks for r in load.waiting)
            return used / load.total_blocks, len(load.running) + len(load.waiting), load.instance_id

        return min(candidates(loads, request), key=rank).instance_id


POLICIES: dict[str, Callable[[], DispatchPolicy]] = {p.name: p for p in (Llumnix, RoundRobin, LeastLoaded)}


def make_policy(name: str) -> DispatchPolicy:
    """The policy of that name. Raises ValueError that names the allowed ones."""
    if name not in POLICIES:
        raise ValueError(f"unknown dispatch policy {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name]()
