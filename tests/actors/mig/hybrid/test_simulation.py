"""The hybrid simulation against hand-worked cases and queueing theory; layouts and transitions against their definition."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from actors.mig.geometry import gpu_geometry
from actors.mig.hybrid.layout import Layout, Offer, Work, front, offers, transition
from actors.mig.hybrid.load import DiurnalLoad
from actors.mig.hybrid.policy import Costs, FollowLoad, Seen, Static
from actors.mig.hybrid.simulate import best_static, calibrate_all, simulate

GPU = gpu_geometry("A100-80GB")
SIZES = {"1g.10gb": 1, "2g.20gb": 2, "3g.40gb": 3, "4g.40gb": 4, "7g.80gb": 7}
# A batch of b takes b times 70 ms on one compute slice, b times 10 ms on seven; training is proportional too.
WORK = Work(
    {name: tuple(70.0 / size * (b + 1) for b in range(min(8, 3 * size))) for name, size in SIZES.items()},
    {name: 10.0 * size for name, size in SIZES.items()},
)
COSTS = Costs(cut_s=2.0, start_serving_s=3.0, start_training_s=5.0)


def offer(serve: tuple[str, ...], train: tuple[str, ...]) -> Offer:
    return Offer(Layout(serve, train), WORK.capacity_per_s(serve), WORK.training_per_s(train))


def test_arrivals_follow_the_day() -> None:
    load = DiurnalLoad(10, 50, 1000)
    assert (load.rate_per_s(0), load.rate_per_s(500)) == (10, 50)
    times = load.arrivals_s(seed=1)
    assert np.all(np.diff(times) >= 0)
    assert len(times) == pytest.approx(30 * 1000, rel=0.03)
    night, noon = np.sum(times < 100) / 100, np.sum(np.abs(times - 500) < 50) / 100
    assert night == pytest.approx(11.3, rel=0.2)
    assert noon == pytest.approx(49.7, rel=0.1)


def test_offers_are_all_layouts_and_the_front_is_beaten_by_none() -> None:
    every = offers(GPU, WORK)
    best = front(every)
    assert all(one.layout.serve and one.layout.train for one in every)
    for one in best:
        assert not [o for o in every if o.capacity_per_s > one.capacity_per_s and o.training_per_s > one.training_per_s]
    for one in every:
        assert [o for o in best if o.capacity_per_s >= one.capacity_per_s and o.training_per_s >= one.training_per_s]
    assert [one.capacity_per_s for one in best] == sorted(one.capacity_per_s for one in best)


def test_a_transition_touches_only_what_it_must() -> None:
    first = transition(GPU, (), Layout(("3g.40gb",), ("4g.40gb",)))
    assert first.cut
    assert len(first.start) == 2
    second = transition(GPU, first.slots, Layout(("3g.40gb", "2g.20gb"), ("2g.20gb",)))
    assert [(slot.place.profile, slot.role) for slot in second.keep] == [("3g.40gb", "serve")]
    assert Counter((slot.place.profile, slot.role) for slot in second.start) == Counter(
        [("2g.20gb", "serve"), ("2g.20gb", "train")]
    )
    swapped = transition(GPU, second.slots, Layout(("3g.40gb",), ("2g.20gb", "2g.20gb")))
    assert not swapped.cut  # a slice changes its role without being cut
    assert len(swapped.start) == 1


def test_lonely_requests_take_one_batch_and_training_is_its_rate() -> None:
    day = simulate(GPU, WORK, offer(("1g.10gb",), ("4g.40gb",)), Static(), np.array([1.0, 10.0, 20.0]), 30.0, COSTS)
    assert day.latencies_ms.tolist() == pytest.approx([70, 70, 70])
    assert day.trained == pytest.approx(40 * 30)


def test_what_waits_is_served_as_one_batch() -> None:
    arrivals = np.array([1.0, 1.001, 1.002])
    day = simulate(GPU, WORK, offer(("1g.10gb",), ("4g.40gb",)), Static(), arrivals, 10.0, COSTS)
    # The second and third wait for the end of the first at 1.070 and end together at 1.210.
    assert day.latencies_ms.tolist() == pytest.approx([70, 209, 208])


def test_a_queue_of_constant_service_waits_as_theory_says() -> None:
    one_by_one = Work({"1g.10gb": (70.0,)}, {"4g.40gb": 1.0})
    rng = np.random.default_rng(0)
    rate = 10.0  # utilisation 0.7
    arrivals = np.cumsum(rng.exponential(1 / rate, 60_000))
    layout = Offer(Layout(("1g.10gb",), ("4g.40gb",)), 1 / 0.07, 1.0)
    day = simulate(GPU, one_by_one, layout, Static(), arrivals, float(arrivals[-1]), COSTS)
    # Pollaczek-Khinchine for M/D/1: W = rho s / (2 (1 - rho)).
    assert day.latencies_ms.mean() == pytest.approx(70 + 0.7 * 70 / (2 * 0.3), rel=0.05)


class Once:
    """Re-cuts once, at 10 s."""

    def __init__(self, target: Offer):
        self.target, self.done = target, False

    def decide(self, seen, current, during):
        if self.done or seen.now_s < 40:
            return None
        self.done = True
        return self.target, "the test"


def test_a_recut_costs_training_what_it_disturbs_and_no_more() -> None:
    before, after = offer(("1g.10gb",), ("4g.40gb", "2g.20gb")), offer(("1g.10gb", "2g.20gb"), ("4g.40gb",))
    arrivals = np.arange(0.5, 99.5, 1.0)
    day = simulate(GPU, WORK, before, Once(after), arrivals, 100.0, COSTS)
    (recut,) = day.recuts
    # 4g goes on for 100 s; 2g trains until the re-cut. Its slice is kept, so nothing is cut.
    assert day.trained == pytest.approx(40 * 100 + 20 * recut.at_s)
    assert len(day.latencies_ms) == len(arrivals)
    back = simulate(GPU, WORK, after, Once(offer(("1g.10gb", "2g.20gb"), ("3g.40gb",))), arrivals, 100.0, COSTS)
    (recut,) = back.recuts
    lost = recut.drain_s + COSTS.cut_s + COSTS.start_training_s
    assert back.trained == pytest.approx(40 * recut.at_s + 30 * (100 - recut.at_s - lost), rel=1e-6)


def test_no_request_is_lost_when_every_server_is_cut() -> None:
    arrivals = np.arange(0.5, 99.5, 0.2)
    day = simulate(GPU, WORK, offer(("3g.40gb",), ("4g.40gb",)), Once(offer(("7g.80gb",), ())), arrivals, 100.0, COSTS)
    assert len(day.latencies_ms) == len(arrivals)
    assert day.latencies_ms.max() >= 1e3 * (COSTS.cut_s + COSTS.start_serving_s - 0.3)


def test_the_policy_goes_up_before_it_is_late_and_down_only_when_it_pays() -> None:
    small, middle, large = (
        offer(("1g.10gb",), ("2g.20gb", "4g.40gb")),
        offer(("1g.10gb", "2g.20gb"), ("4g.40gb",)),
        offer(("4g.40gb",), ("1g.10gb", "2g.20gb")),
    )
    policy = FollowLoad((small, middle, large), COSTS)
    calm = Seen(100, 5.0, 0.0, 0)
    assert policy.decide(calm, small, lambda layout: math.inf) is None
    up = policy.decide(Seen(100, 10.0, 0.3, 0), small, lambda layout: math.inf)
    assert up is not None
    assert up[0].capacity_per_s > small.capacity_per_s
    down = policy.decide(calm, large, lambda layout: math.inf)
    assert down is not None
    assert down[0] == small
    # No change may leave too few servers meanwhile.
    assert policy.decide(calm, large, lambda layout: 0.0) is None
    # A falling load that is still too much for less stays.
    assert policy.decide(Seen(100, 50.0, -0.01, 0), large, lambda layout: math.inf) is None


def test_following_the_load_beats_every_static_partition_and_keeps_the_limit() -> None:
    load = DiurnalLoad(5, 40, 1800)
    arrivals = load.arrivals_s(0)
    every = calibrate_all(GPU, WORK, offers(GPU, WORK), 400.0)
    assert all(one.capacity_per_s <= WORK.capacity_per_s(one.layout.serve) for one in every)
    static = best_static(GPU, WORK, front(every), arrivals, 1800, 400.0, 0.99)
    assert static is not None
    start = next(one for one in front(every) if one.capacity_per_s > 12)
    day = simulate(GPU, WORK, start, FollowLoad(every, COSTS, horizon_s=200.0), arrivals, 1800, COSTS)
    assert day.attainment(400.0) >= 0.99
    assert day.trained > 1.1 * static[1].trained
