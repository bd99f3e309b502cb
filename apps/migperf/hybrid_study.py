"""The hybrid study in simulation: a partition that follows a diurnal load against the best one that never changes."""

from __future__ import annotations

from dataclasses import dataclass

from actors.mig.geometry import gpu_geometry
from actors.mig.hybrid.layout import Offer, Work, front, offers
from actors.mig.hybrid.load import DiurnalLoad
from actors.mig.hybrid.policy import Costs, FollowLoad
from actors.mig.hybrid.simulate import Day, best_static, calibrate_all, simulate
from apps.migperf.config import HybridConfig
from apps.migperf.hybrid_model import make_work
from apps.program.errors import UserError


@dataclass(frozen=True)
class Study:
    """Both days, of the same arrivals."""

    static: Offer
    static_day: Day
    moving_day: Day
    offers: tuple[Offer, ...]

    @property
    def gain(self) -> float:
        """Training samples, following over best static."""
        return self.moving_day.trained / self.static_day.trained


def largest_capacity_per_s(config: HybridConfig, work: Work | None = None) -> float:
    """The most requests a second that any layout serves within the limit."""
    every = calibrated(config, work or make_work(config))
    return max(offer.capacity_per_s for offer in every)


def calibrated(config: HybridConfig, work: Work) -> tuple[Offer, ...]:
    """The GPU's layouts with their capacities at the latency limit."""
    geometry = gpu_geometry(config.gpu)
    return calibrate_all(geometry, work, offers(geometry, work), config.latency_limit_ms)


def run_study(config: HybridConfig, work: Work | None = None, every: tuple[Offer, ...] | None = None) -> Study:
    """Simulates one day twice.

    Raises:
        UserError: no static layout keeps the limit, so that there is nothing to compare with.
    """
    geometry = gpu_geometry(config.gpu)
    work = work or make_work(config)
    every = every or calibrated(config, work)
    costs = Costs(config.cut_s, config.start_serving_s, config.start_training_s)
    load = DiurnalLoad(config.night_per_s, config.peak_per_s, config.day_s)
    arrivals = load.arrivals_s(config.seed)
    best = front(every)
    static = best_static(geometry, work, best, arrivals, config.day_s, config.latency_limit_ms, config.attainment)
    if static is None:
        raise UserError(
            f"No partition of {config.gpu} serves a peak of {config.peak_per_s:g} requests/s within "
            f"{config.latency_limit_ms:g} ms: the most is about {max(o.capacity_per_s for o in every):.0f}."
        )
    policy = FollowLoad(every, costs)
    start = next((o for o in best if policy.utilisation * o.capacity_per_s > 1.3 * config.night_per_s), best[-1])
    moving = simulate(geometry, work, start, policy, arrivals, config.day_s, costs)
    return Study(static[0], static[1], moving, every)
