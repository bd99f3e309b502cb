"""Which migrations to order: the periodic pairing of Llumnix (OSDI 2024, section 4.4.3) over the instances' loads. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from actors.llumnix.load import InstanceLoad
from actors.llumnix.policy.victim import choose_request, with_request, without
from actors.llumnix.policy.virtual_usage import NO_HEADROOM, Headroom, freeness, newest


@dataclass(frozen=True)
class RebalanceConfig:
    """When requests move. Freeness is in blocks that each request of an instance can still grow by."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    source_below: float = 3.0
    """Instances below this freeness send requests away (the artifact's migrate-out threshold)."""
    destination_above: float = 6.0
    """Instances above this freeness take requests in."""
    min_gain: float = 0.5
    """A move must raise the smaller freeness of the pair by more than so much: what less would give is not worth a copy."""


DEFAULT = RebalanceConfig()


@dataclass(frozen=True)
class Move:
    source: str
    destination: str
    request_id: str


def pair(
    loads: Sequence[InstanceLoad],
    config: RebalanceConfig = DEFAULT,
    *,
    headroom: Headroom = NO_HEADROOM,
    busy: Collection[str] = (),
    compatible: Callable[[str, str], bool] = lambda source, destination: True,
) -> list[Move]:
    """Moves to order now: at most one out of and one into each instance, the least free source first.

    ``busy``: instances that have as many migrations under way as they may. ``compatible(source, destination)``: whether
    requests can go on there (equal numerics). A source takes the freest destination to which one of its requests fits and
    whose move improves the pair. A draining instance is a source whatever its load (its freeness is -infinity), is served
    first, and may use any destination with room. Older loads of an instance are ignored; equal inputs give equal moves.
    """
    known = newest(list(loads))
    free = {load.instance_id: freeness(load, headroom) for load in known}
    sources = sorted(
        (load for load in known if free[load.instance_id] < config.source_below and load.instance_id not in busy),
        key=lambda load: (free[load.instance_id], load.instance_id),
    )
    destinations = sorted(
        (load for load in known if not load.draining and load.instance_id not in busy),
        key=lambda load: (-free[load.instance_id], load.instance_id),
    )
    moves: list[Move] = []
    taken: set[str] = set()
    for source in sources:
        if source.instance_id in taken:
            continue
        for destination in destinations:
            name = destination.instance_id
            if name in taken or name == source.instance_id or not compatible(source.instance_id, name):
                continue
            if free[name] <= config.destination_above and not source.draining:
                break  # The rest is less free still.
            request = choose_request(source, destination, headroom, config.min_gain)
            if request is not None:
                moves.append(Move(source.instance_id, name, request.request_id))
                taken |= {source.instance_id, name}
                break
    return moves


def applied(loads: Sequence[InstanceLoad], move: Move) -> list[InstanceLoad]:
    """The loads after a move (for simulators and tests). Raises KeyError if the request is not at the source."""
    by_id = {load.instance_id: load for load in newest(list(loads))}
    source = by_id[move.source]
    found = {r.request_id: r for r in (*source.running, *source.waiting)}
    request = found[move.request_id]
    by_id[move.source] = without(source, request)
    by_id[move.destination] = with_request(by_id[move.destination], request)
    return [by_id[name] for name in sorted(by_id)]
