"""Which request of a source moves to a given destination. Llumnix (OSDI 2024, section 4.4.3): low priority and short first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from actors.llumnix.load import InstanceLoad, RequestLoad
from actors.llumnix.policy.virtual_usage import NO_HEADROOM, Headroom, freeness

SPARE_BLOCKS = 2
"""A destination must have so many blocks beside the request's own: it goes on growing while it is copied."""


def movable(source: InstanceLoad, waiting: bool = False) -> Iterator[RequestLoad]:
    """Requests that may move, the best first: low priority, then short, then late arrivals; ids break ties.

    Decoding ones that no migration touches; with ``waiting`` (a source that must become empty) also those that prefill, and
    after all running ones those that wait.
    """
    busy = frozenset(source.migrating)
    running = [r for r in source.running if r.request_id not in busy and (r.prefilled or waiting)]
    yield from sorted(running, key=lambda r: (not r.prefilled, r.priority, r.blocks, -r.arrival_time, r.request_id))
    if waiting:
        yield from (r for r in source.waiting if r.request_id not in busy)


def fits(request: RequestLoad, destination: InstanceLoad) -> bool:
    """Whether the destination has free blocks for the request beside what its own queue's head waits for."""
    head = destination.waiting[0].blocks if destination.waiting else 0
    return request.blocks + SPARE_BLOCKS + head <= destination.free_blocks


def without(load: InstanceLoad, request: RequestLoad) -> InstanceLoad:
    """The load after the request has left."""
    running = tuple(r for r in load.running if r.request_id != request.request_id)
    waiting = tuple(r for r in load.waiting if r.request_id != request.request_id)
    held = request.blocks if len(running) < len(load.running) else 0
    free = min(load.total_blocks, load.free_blocks + held)
    return replace(load, running=running, waiting=waiting, free_blocks=free)


def with_request(load: InstanceLoad, request: RequestLoad) -> InstanceLoad:
    """The load after the request has come in and runs."""
    free = max(0, load.free_blocks - request.blocks)
    return replace(load, running=(*load.running, request), free_blocks=free)


def improves(
    source: InstanceLoad,
    destination: InstanceLoad,
    request: RequestLoad,
    headroom: Headroom = NO_HEADROOM,
    min_gain: float = 0.0,
) -> bool:
    """Whether the move raises the smaller freeness of the two by more than ``min_gain``.

    The smaller freeness only ever rises, so a sequence of such moves under unchanged load cannot come back to where it was:
    no ping-pong. Anything improves a draining source.
    """
    if destination.draining:
        return False
    if source.draining:
        return True
    before = min(freeness(source, headroom), freeness(destination, headroom))
    after = min(freeness(without(source, request), headroom), freeness(with_request(destination, request), headroom))
    return after > before + min_gain


def choose_request(
    source: InstanceLoad,
    destination: InstanceLoad,
    headroom: Headroom = NO_HEADROOM,
    min_gain: float = 0.0,
    allowed: Callable[[RequestLoad], bool] = lambda request: True,
) -> RequestLoad | None:
    """The best request to move from ``source`` to ``destination``; None if no move is possible or worth it."""
    for request in movable(source, waiting=source.draining):
        worth = allowed(request) and fits(request, destination)
        if worth and improves(source, destination, request, headroom, min_gain):
            return request
    return None
