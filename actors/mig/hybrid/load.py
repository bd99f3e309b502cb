"""A diurnal load: requests arrive as a Poisson process whose rate rises and falls once a day."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class DiurnalLoad:
    """rate(t) = night + (peak - night) (1 - cos(2 pi t / day)) / 2: the day begins at night."""

    night_per_s: float
    peak_per_s: float
    day_s: float

    def rate_per_s(self, at_s: float) -> float:
        return (
            self.night_per_s
            + (self.peak_per_s - self.night_per_s) * (1 - math.cos(2 * math.pi * at_s / self.day_s)) / 2
        )

    def arrivals_s(self, seed: int = 0, days: float = 1.0) -> NDArray[np.float64]:
        """Times of arrival, in order (Lewis and Shedler's thinning)."""
        rng = np.random.default_rng(seed)
        until = days * self.day_s
        most = max(self.night_per_s, self.peak_per_s)
        times = np.sort(rng.uniform(0.0, until, rng.poisson(most * until)))
        rates = (
            self.night_per_s + (self.peak_per_s - self.night_per_s) * (1 - np.cos(2 * np.pi * times / self.day_s)) / 2
        )
        return times[rng.uniform(0.0, most, len(times)) < rates]
