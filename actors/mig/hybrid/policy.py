"""When to re-cut, and to what: a policy with one method. It sees the arrivals of the past, not of the future. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.mig.hybrid.layout import Layout, Offer


@dataclass(frozen=True)
class Costs:
    """Seconds that a re-cut costs."""

    cut_s: float = 4.0
    """Destroying and creating the instances."""
    start_serving_s: float = 10.0
    """From a slice to a warm server."""
    start_training_s: float = 15.0
    """Checkpoint before, process start and state loaded after."""

    @property
    def ready_s(self) -> float:
        """From the decision to more capacity."""
        return self.cut_s + self.start_serving_s


@dataclass(frozen=True)
class Seen:
    """What the policy is shown."""

    now_s: float
    rate_per_s: float
    """Of the last window."""
    slope_per_s2: float
    """How fast the rate rises (a straight line through the windows of the past)."""
    waiting: int
    """Requests in the queue."""


class Decision(Protocol):
    """Decides; ``None`` leaves the partition as it is."""

    def decide(self, seen: Seen, current: Offer, during_per_s: Callable[[Layout], float]) -> tuple[Offer, str] | None:
        """``during_per_s``: capacity of the servers that go on undisturbed while the device is re-cut to a layout."""


@dataclass(frozen=True)
class Static:
    """Never changes."""

    def decide(self, seen: Seen, current: Offer, during_per_s: Callable[[Layout], float]) -> None:
        return None


@dataclass(frozen=True)
class FollowLoad:
    """Takes the most training whose servers carry the load that is forecast for when they are ready, with headroom."""

    offers: Sequence[Offer]
    costs: Costs
    utilisation: float = 0.92
    """Load over an offer's capacity (at which the latency limit just holds) that is asked of it."""
    utilisation_during: float = 0.8
    """Load over the servers' saturated capacity while the device is re-cut."""
    hysteresis: float = 0.92
    """Going down asks for this much less still, so that noise does not make it come back at once."""
    payback: float = 2.0
    """Going down must win this many times the training that it costs, within ``horizon_s``."""
    horizon_s: float = 600.0
    """How long a layout is expected to last at least."""
    check_s: float = 5.0
    margin_sigmas: float = 2.0
    """Of the rate's own noise."""
    window_s: float = 60.0

    def decide(
        self, seen: Seen, current: Offer, during_per_s: Callable[[Layout], float]
    ) -> tuple[Offer, str] | None:  # fmt: skip
        need_soon = self._need(seen, self.costs.ready_s + 2 * self.check_s)
        if need_soon > self.utilisation * current.capacity_per_s:
            wanted = self._need(seen, self.costs.ready_s + self.horizon_s / 4)
            found = self._most_training(max(wanted, need_soon), seen, during_per_s, above=current.capacity_per_s)
            found = found or self._most_training(need_soon, seen, during_per_s, above=current.capacity_per_s)
            if found is None and seen.rate_per_s > 1.05 * current.capacity_per_s:
                found = self._way_out(need_soon, current, during_per_s)
            if found is not None:
                return (
                    found,
                    f"{need_soon:.0f} requests/s soon exceed {self.utilisation:.0%} of {current.capacity_per_s:.0f}",
                )
            return None
        # Down only by what lasts: the largest need within the horizon counts.
        lasting = max(need_soon, self._need(seen, self.costs.ready_s + self.horizon_s / 2))
        found = self._most_training(lasting / self.hysteresis, seen, during_per_s)
        if found is None or found.training_per_s <= current.training_per_s:
            return None
        lost = current.training_per_s * (self.costs.cut_s + self.costs.start_training_s)
        won = (found.training_per_s - current.training_per_s) * self.horizon_s
        if won < self.payback * lost:
            return None
        return (
            found,
            f"{lasting:.0f} requests/s leave room: training {found.training_per_s / current.training_per_s:.2f}x",
        )

    def _way_out(self, need: float, current: Offer, during_per_s: Callable[[Layout], float]) -> Offer | None:
        """The load is too much already, and no change leaves enough servers up meanwhile: the one that leaves most, of those
        that suffice afterwards (or else give most)."""
        better = [offer for offer in self.offers if offer.capacity_per_s > 1.05 * current.capacity_per_s]
        enough = [offer for offer in better if need <= self.utilisation * offer.capacity_per_s]
        return max(
            enough or better,
            key=lambda one: (during_per_s(one.layout), one.training_per_s if enough else one.capacity_per_s),
            default=None,
        )

    def _need(self, seen: Seen, ahead_s: float) -> float:
        noise = self.margin_sigmas * math.sqrt(max(seen.rate_per_s, 1e-9) / self.window_s)
        ahead_s += self.window_s / 2  # the window's rate is that of its middle
        return max(0.0, seen.rate_per_s + seen.slope_per_s2 * ahead_s) + noise

    def _most_training(
        self, need: float, seen: Seen, during_per_s: Callable[[Layout], float], above: float = 0.0
    ) -> Offer | None:
        able = [
            offer
            for offer in self.offers
            if offer.capacity_per_s > above
            and need <= self.utilisation * offer.capacity_per_s
            and seen.rate_per_s <= self.utilisation_during * during_per_s(offer.layout)
        ]
        return max(able, key=lambda offer: offer.training_per_s, default=None)
