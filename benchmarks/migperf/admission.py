"""Random traces of slice requests against a fleet: who accepts more, first fit or placement with defragmentation.

Requests arrive as a Poisson process, hold one slice for an exponential time, and are refused when no place is found at once.
Both arms see the same arrivals and durations. First fit is what slice schedulers do today: the first GPU, the lowest start
(non-compact removal then leaves holes that block 3g and 4g, as in NVIDIA's DRA driver, issue 933).
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from actors.mig.geometry import GpuGeometry, GpuState, Move, Placement, make_room

Decision = tuple[int, Placement, tuple[Move, ...]]
Policy = Callable[[Sequence[GpuState], str], Decision | None]


@dataclass(frozen=True)
class Request:
    """Arrives at ``at_s``, leaves ``holds_s`` after it was accepted."""

    at_s: float
    holds_s: float
    profile: str


@dataclass(frozen=True)
class Outcome:
    """What became of a trace, by profile; ``moves`` counts instances moved for others."""

    asked: Counter[str]
    accepted: Counter[str]
    moves: int


def random_trace(
    geometry: GpuGeometry, gpus: int, load: float, mix: Mapping[str, float], requests: int, rng: random.Random
) -> list[Request]:
    """A trace that asks for ``load`` of the fleet's compute slices on average; ``mix`` weighs the profiles."""
    names = list(mix)
    mean_slices = sum(mix[n] * geometry.profile(n).compute_slices for n in names) / sum(mix.values())
    rate = load * gpus * geometry.compute_slices / mean_slices  # with a mean holding time of one second
    trace, now = [], 0.0
    for _ in range(requests):
        now += rng.expovariate(rate)
        trace.append(Request(now, rng.expovariate(1.0), rng.choices(names, [mix[n] for n in names])[0]))
    return trace


def first_fit(states: Sequence[GpuState], profile: str) -> Decision | None:
    """The first GPU, the lowest start."""
    for gpu, state in enumerate(states):
        starts = state.free_starts(profile)
        if starts:
            return gpu, state.geometry.placement(profile, starts[0]), ()
    return None


def with_moves(most: int) -> Policy:
    """The place that leaves most room; when there is none, up to ``most`` running instances move for it."""

    def decide(states: Sequence[GpuState], profile: str) -> Decision | None:
        found = make_room(states, profile, max_moves=most)
        return None if found is None else (found.gpu, found.placement, found.moves)

    return decide


def replay(geometry: GpuGeometry, gpus: int, trace: Sequence[Request], policy: Policy) -> Outcome:
    """Runs a trace through a policy. Every step goes through ``GpuState``, so an illegal decision is an error."""
    states = [GpuState(geometry)] * gpus
    where: dict[tuple[int, Placement], int] = {}
    held: dict[int, tuple[int, Placement]] = {}
    leaving: list[tuple[float, int]] = []
    asked: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    moves = 0
    for number, request in enumerate(trace):
        while leaving and leaving[0][0] <= request.at_s:
            _, gone = heapq.heappop(leaving)
            gpu, place = held.pop(gone)
            del where[gpu, place]
            states[gpu] = states[gpu].remove(place.profile, place.start)
        asked[request.profile] += 1
        decision = policy(states, request.profile)
        if decision is None:
            continue
        gpu, place, moved = decision
        owners = [where.pop((move.from_gpu, move.source)) for move in moved]
        for move in moved:
            states[move.from_gpu] = states[move.from_gpu].remove(move.source.profile, move.source.start)
        for owner, move in zip(owners, moved, strict=True):
            states[move.to_gpu] = states[move.to_gpu].place(move.target.profile, move.target.start)
            held[owner] = (move.to_gpu, move.target)
            where[move.to_gpu, move.target] = owner
        states[gpu] = states[gpu].place(place.profile, place.start)
        held[number] = (gpu, place)
        where[gpu, place] = number
        heapq.heappush(leaving, (request.at_s + request.holds_s, number))
        accepted[request.profile] += 1
        moves += len(moved)
    return Outcome(asked, accepted, moves)
