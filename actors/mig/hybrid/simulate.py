"""A day of a hybrid GPU, event by event: requests, batches, trainings, re-cuts with their cost. Exact to the seed; pure.

Servers share one queue (what waits moves freely: Llumnix's migration); an idle server takes as many requests as its batch
allows. A re-cut stops what it disturbs: a server ends its batch and takes no more, a training loses the time until it runs
again; everything else goes on.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from actors.mig.geometry import GpuGeometry
from actors.mig.hybrid.layout import Layout, Offer, Slot, Transition, Work, front, transition
from actors.mig.hybrid.policy import Costs, Decision, Seen, Static


@dataclass(frozen=True)
class Recut:
    """One re-partition."""

    at_s: float
    layout: Layout
    why: str
    drain_s: float
    """Until the last disturbed server had ended its batch."""


@dataclass(frozen=True)
class Day:
    """What came of it."""

    latencies_ms: NDArray[np.float64]
    trained: float
    """Samples."""
    recuts: tuple[Recut, ...]
    day_s: float

    def attainment(self, limit_ms: float) -> float:
        """Share of the requests within the limit."""
        return float(np.mean(self.latencies_ms <= limit_ms)) if len(self.latencies_ms) else 1.0

    @property
    def p99_ms(self) -> float:
        return float(np.percentile(self.latencies_ms, 99)) if len(self.latencies_ms) else 0.0


@dataclass
class _Server:
    slot: Slot
    busy_until: float = 0.0
    up_at: float = 0.0
    ending: bool = False


@dataclass
class _Training:
    slot: Slot
    up_at: float


@dataclass
class _Run:
    """The state of one simulated day."""

    geometry: GpuGeometry
    work: Work
    costs: Costs
    slots: tuple[Slot, ...]
    servers: dict[Slot, _Server] = field(default_factory=dict)
    trainings: dict[Slot, _Training] = field(default_factory=dict)
    trained: float = 0.0
    changing: tuple[Transition, float] | None = None
    """A re-cut that waits for servers to end their batches, and when it was decided."""


def simulate(
    geometry: GpuGeometry,
    work: Work,
    start: Offer,
    policy: Decision,
    arrivals_s: NDArray[np.float64],
    day_s: float,
    costs: Costs,
    *,
    check_s: float = 5.0,
    window_s: float = 60.0,
) -> Day:
    """Runs a day from a layout that stands already; every request is served to its end.

    Raises:
        GeometryError: a layout that the GPU cannot hold.
    """
    first = transition(geometry, (), start.layout)
    run = _Run(geometry, work, costs, first.slots)
    for slot in first.slots:
        if slot.role == "serve":
            run.servers[slot] = _Server(slot)
        else:
            run.trainings[slot] = _Training(slot, 0.0)
    current, queue = start, deque[float]()
    latencies: list[float] = []
    recuts: list[Recut] = []
    events: list[tuple[float, int, str, Slot | None]] = []
    number = 0

    def push(at: float, kind: str, slot: Slot | None = None) -> None:
        nonlocal number
        number += 1
        heapq.heappush(events, (at, number, kind, slot))

    def dispatch(now: float) -> None:
        for server in run.servers.values():
            if not queue:
                return
            if server.ending or server.busy_until > now or server.up_at > now:
                continue
            table = work.serve_ms[server.slot.place.profile]
            count = min(len(queue), len(table))
            done = now + table[count - 1] / 1e3
            latencies.extend((done - queue.popleft()) * 1e3 for _ in range(count))
            server.busy_until = done
            push(done, "free", server.slot)

    def apply(now: float) -> None:
        """The disturbed servers are idle: cut, and start what comes."""
        change, decided = run.changing or (None, 0.0)
        if change is None or any(
            run.servers[slot].busy_until > now for slot in change.stop if slot.role == "serve"
        ):  # fmt: skip
            return
        for slot in change.stop:
            run.servers.pop(slot, None)
        ready = now + (costs.cut_s if change.cut else 0.0)
        for slot in change.start:
            if slot.role == "serve":
                run.servers[slot] = _Server(slot, up_at=ready + costs.start_serving_s)
                push(ready + costs.start_serving_s, "up", slot)
            else:
                run.trainings[slot] = _Training(slot, ready + costs.start_training_s)
        run.slots, run.changing = change.slots, None
        recuts[-1] = Recut(recuts[-1].at_s, recuts[-1].layout, recuts[-1].why, now - decided)
        push(ready + max(costs.start_serving_s, costs.start_training_s), "settled")

    def stop_training(slot: Slot, now: float) -> None:
        training = run.trainings.pop(slot, None)
        if training is not None:
            run.trained += work.train_per_s[slot.place.profile] * max(0.0, now - training.up_at)

    settled = True
    rates: deque[tuple[float, float]] = deque(maxlen=16)
    push(check_s, "check")
    index, total = 0, len(arrivals_s)
    times = arrivals_s.tolist()
    while index < total or events:
        if index < total and (not events or times[index] <= events[0][0]):
            now = times[index]
            index += 1
            queue.append(now)
            dispatch(now)
            continue
        now, _, kind, _ = heapq.heappop(events)
        if kind == "settled":
            settled = True
        elif kind == "check" and now < day_s:
            push(now + check_s, "check")
            if len(rates) == 0 or now - rates[-1][0] >= window_s / 4:
                begin = int(np.searchsorted(arrivals_s, now - window_s))
                rates.append((now, (index - begin) / min(window_s, now)))
            if settled and run.changing is None and now >= window_s / 2:
                seen = Seen(now, rates[-1][1], _slope(rates), len(queue))

                def during(layout: Layout) -> float:
                    kept = transition(geometry, run.slots, layout).keep
                    return work.capacity_per_s([slot.place.profile for slot in kept if slot.role == "serve"])

                decision = policy.decide(seen, current, during)
                if decision is not None:
                    current, why = decision
                    change = transition(geometry, run.slots, current.layout)
                    recuts.append(Recut(now, current.layout, why, 0.0))
                    run.changing, settled = (change, now), False
                    for slot in change.stop:
                        if slot.role == "serve":
                            run.servers[slot].ending = True
                        else:
                            stop_training(slot, now)
        if run.changing is not None:
            apply(now)
        dispatch(now)
    for slot in list(run.trainings):
        stop_training(slot, day_s)
    return Day(np.array(latencies), run.trained, tuple(recuts), day_s)


def calibrate(
    geometry: GpuGeometry,
    work: Work,
    offer: Offer,
    limit_ms: float,
    *,
    attainment: float = 0.995,
    seconds: float = 240.0,
    seed: int = 0,
) -> Offer:
    """The offer with the capacity at which ``attainment`` of the requests keep the latency limit (its saturated one before):
    bisection over steady Poisson loads."""
    low, high = 0.0, offer.capacity_per_s
    for _ in range(7):
        rate = (low + high) / 2
        rng = np.random.default_rng(seed)
        arrivals = np.sort(rng.uniform(0.0, seconds, rng.poisson(rate * seconds)))
        day = simulate(geometry, work, offer, Static(), arrivals, seconds, Costs())
        low, high = (rate, high) if day.attainment(limit_ms) >= attainment else (low, rate)
    return Offer(offer.layout, low, offer.training_per_s)


def calibrate_all(geometry: GpuGeometry, work: Work, every: Sequence[Offer], limit_ms: float) -> tuple[Offer, ...]:
    """All offers with capacities at the limit: the front's found by bisection, the others' in the proportion of the next
    smaller one of the front."""
    exact = {offer.layout: calibrate(geometry, work, offer, limit_ms) for offer in front(every)}
    found, share = [], 0.0
    for offer in sorted(every, key=lambda one: one.capacity_per_s):
        known = exact.get(offer.layout)
        if known is not None:
            share = known.capacity_per_s / offer.capacity_per_s
        found.append(known or Offer(offer.layout, share * offer.capacity_per_s, offer.training_per_s))
    return tuple(one for one in found if one.capacity_per_s > 0)


def best_static(
    geometry: GpuGeometry,
    work: Work,
    offers_: Sequence[Offer],
    arrivals_s: NDArray[np.float64],
    day_s: float,
    limit_ms: float,
    attainment: float,
) -> tuple[Offer, Day] | None:
    """The layout that trains most among those that, never changed, keep the limit for this very day (found afterwards: more
    than an operator could know); None when none does."""
    for offer in sorted(offers_, key=lambda one: -one.training_per_s):
        if offer.capacity_per_s * day_s < 0.9 * len(arrivals_s):
            continue  # cannot even serve the average
        day = simulate(geometry, work, offer, Static(), arrivals_s, day_s, Costs())
        if day.attainment(limit_ms) >= attainment:
            return offer, day
    return None


def _slope(rates: deque[tuple[float, float]]) -> float:
    """Of a straight line through the last windows, requests/s a second."""
    if len(rates) < 3:
        return 0.0
    at, rate = np.array(rates).T
    return float(np.polyfit(at - at[0], rate, 1)[0])
