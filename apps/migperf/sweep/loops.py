"""The two ways to load a workload: closed (the next batch when the last one ends) and open (Poisson arrivals, one queue).

Time is handed in (a clock and a sleep), so that the same loops run live, on a virtual clock in tests, and for ``sim``.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from apps.migperf.sweep.trial import percentile

MOST_WAIT_S = 10.0
"""An arrival that waited longer is dropped (MIGPerf's rule)."""
LEAST_STEPS = 3


@dataclass(frozen=True)
class Time:
    """A clock (seconds) and a sleep."""

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep


class VirtualTime:
    """Time that passes only by ``sleep``; a simulated step sleeps for its latency."""

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += max(0.0, seconds)


@dataclass(frozen=True)
class Window:
    """What was seen in one window: latencies from arrival to end, of batches."""

    latencies_ms: tuple[float, ...]
    seconds: float
    dropped: int = 0

    @property
    def mean_ms(self) -> float:
        return statistics.fmean(self.latencies_ms)

    @property
    def std_ms(self) -> float:
        return statistics.stdev(self.latencies_ms) if len(self.latencies_ms) > 1 else 0.0

    def percentile_ms(self, share: float) -> float:
        return percentile(sorted(self.latencies_ms), share)

    def batches_per_s(self) -> float:
        return len(self.latencies_ms) / self.seconds if self.seconds > 0 else 0.0

    def joined(self, other: Window) -> Window:
        """Both as one, in order."""
        return Window(
            self.latencies_ms + other.latencies_ms, self.seconds + other.seconds, self.dropped + other.dropped
        )


def closed_loop(step: Callable[[], object], seconds: float, clock: Time | VirtualTime | None = None) -> Window:
    """Batches one after another for ``seconds``, at least ``LEAST_STEPS``."""
    clock = clock or Time()
    began = before = clock.now()
    latencies: list[float] = []
    while before - began < seconds or len(latencies) < LEAST_STEPS:
        step()
        now = clock.now()
        latencies.append((now - before) * 1e3)
        before = now
    return Window(tuple(latencies), before - began)


def open_loop(
    step: Callable[[], object],
    rate_per_s: float,
    seconds: float,
    clock: Time | VirtualTime | None = None,
    seed: int = 0,
) -> Window:
    """Arrivals of a Poisson process for ``seconds``, served in order by one server; latency counts from the arrival.

    All arrivals of the window are served (or dropped), so that an overload shows in the tail and is not cut off.
    """
    clock, rng = clock or Time(), random.Random(seed)
    began = clock.now()
    arrival, latencies, dropped = began, [], 0
    while True:
        arrival += rng.expovariate(rate_per_s)
        if arrival - began > seconds:
            break
        now = clock.now()
        if now < arrival:
            clock.sleep(arrival - now)
        elif now - arrival > MOST_WAIT_S:
            dropped += 1
            continue
        step()
        latencies.append((clock.now() - arrival) * 1e3)
    return Window(tuple(latencies), max(clock.now() - began, seconds), dropped)
