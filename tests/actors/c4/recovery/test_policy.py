"""The policy against a clairvoyant who knows how long the fault will last."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from actors.c4.diagnosis.verdict import Culprit, FaultKind, Verdict
from actors.c4.recovery.policy import (
    Action,
    Decision,
    Prices,
    Situation,
    batch_shares,
    decide,
    hedged_threshold,
    job_slowdown,
    rebalanced_slowdown,
    restart_price_s,
)

STEP_S = 0.02
"""Time between two questions to the policy in the simulated traces."""


def verdict(kind: FaultKind = FaultKind.WORK_SLOW, slowdown: float = 2.0, confidence: float = 1.0) -> Verdict:
    return Verdict(kind, Culprit(ranks=(3,), nodes=("n3",)), ("seen",), confidence, 0.0, 1.0, slowdown=slowdown)


def situation(**changes: float) -> Situation:
    base = Situation(step_s=0.0, running_s=100.0, slow_s=0.0, spare_nodes=1, nodes=8, world_size=8)
    return replace(base, **changes)


def cost_of_following(
    fault: Verdict, start: Situation, duration_s: float, prices: Prices, draw: float | None = None
) -> float:
    """Seconds of the job lost when the policy is asked again and again while a fault of this duration lasts."""
    lost, now = 0.0, 0.0
    slowdown = fault.slowdown
    while now < duration_s:
        decision = decide(fault, replace(start, slow_s=now), prices, draw=draw)
        if decision.action is Action.EVICT:
            return lost + restart_price_s(start, prices)
        rate = 1 - 1 / slowdown
        if decision.action is Action.REBALANCE:
            rate = 1 - 1 / rebalanced_slowdown(slowdown, 1, start.world_size)
        lost += rate * min(STEP_S, duration_s - now)
        now += STEP_S
    return lost


def cost_of_clairvoyant(fault: Verdict, start: Situation, duration_s: float, prices: Prices) -> float:
    rent = (1 - 1 / fault.slowdown) * duration_s
    options = [rent, restart_price_s(start, prices)]
    if start.can_rebalance:
        rebalanced = rebalanced_slowdown(fault.slowdown, 1, start.world_size)
        options.append((1 - 1 / rebalanced) * duration_s)
    return min(options)


def random_traces(count: int, seed: int) -> list[tuple[Verdict, Situation, float, Prices]]:
    """Faults of log-uniform duration: from hiccups (a tenth of what pays) to what lasts until repair (300 times)."""
    random = np.random.default_rng(seed)
    traces = []
    for _ in range(count):
        slowdown = float(random.uniform(1.1, 6.0))
        prices = Prices(restart_s=float(random.uniform(0.2, 2.0)), lost_steps=0.0, hedge=False)
        break_even_s = prices.restart_s / (1 - 1 / slowdown)
        duration_s = float(break_even_s * math.exp(random.uniform(math.log(0.1), math.log(300.0))))
        start = situation(can_rebalance=bool(random.random() < 0.5))
        traces.append((verdict(slowdown=slowdown), start, duration_s, prices))
    return traces


def test_the_plain_rule_never_costs_more_than_twice_the_clairvoyant() -> None:
    for fault, start, duration_s, prices in random_traces(150, seed=1):
        ours = cost_of_following(fault, start, duration_s, prices)
        best = cost_of_clairvoyant(fault, start, duration_s, prices)
        assert ours <= 2 * best + 3 * STEP_S, (fault.slowdown, duration_s, prices)


def test_the_hedged_rule_stays_within_one_and_a_half_over_random_traces() -> None:
    random = np.random.default_rng(2)
    ours = best = 0.0
    for fault, start, duration_s, prices in random_traces(400, seed=3):
        hedged = replace(prices, hedge=True)
        ours += cost_of_following(fault, start, duration_s, hedged, draw=float(random.random()))
        best += cost_of_clairvoyant(fault, start, duration_s, prices)
    assert ours <= 1.5 * best


@pytest.mark.parametrize("part", [0.02, 0.2, 0.5, 0.69, 0.9, 1.0, 3.0])
def test_the_hedged_rule_is_within_twice_in_expectation_for_every_duration(part: float) -> None:
    """Expected cost by integrating the threshold's distribution, in units of the price: loss at the end is ``part``."""
    draws = (np.arange(20_000) + 0.5) / 20_000
    thresholds = np.log1p(draws)
    assert hedged_threshold(float(draws[7])) == pytest.approx(thresholds[7])
    expected = np.where(thresholds < part, thresholds + 1.0, part).mean()
    assert expected <= 2.0 * min(part, 1.0) + 1e-3
    if part >= 1.0:
        assert expected == pytest.approx(2 * math.log(2), abs=1e-3)


def test_a_hang_is_evicted_at_once_and_its_node_quarantined() -> None:
    for kind in (FaultKind.PROCESS_STOPPED, FaultKind.HEARTBEAT_LOST, FaultKind.NODE_LOST, FaultKind.LINK_STALLED):
        decision = decide(verdict(kind), situation(slow_s=0.5))
        assert decision.action is Action.EVICT
        assert decision.quarantine


def test_a_program_that_calls_different_collectives_is_restarted_but_blames_no_node() -> None:
    decision = decide(verdict(FaultKind.MISMATCHED_COLLECTIVE), situation())
    assert decision.action is Action.EVICT
    assert not decision.quarantine


def test_an_untrusted_verdict_is_never_acted_on() -> None:
    assert decide(verdict(FaultKind.NODE_LOST, confidence=0.3), situation()).action is Action.IGNORE


def test_doubt_raises_the_price() -> None:
    sure = decide(verdict(confidence=1.0), situation(slow_s=1.0), Prices(hedge=False))
    unsure = decide(verdict(confidence=0.5), situation(slow_s=1.0), Prices(hedge=False))
    assert unsure.price_s == pytest.approx(2 * sure.price_s)
    assert unsure.threshold_s == pytest.approx(2 * sure.threshold_s)


def evicted(decision: Decision) -> bool:
    return decision.action is Action.EVICT


def test_it_evicts_when_the_loss_reaches_the_price_and_not_before() -> None:
    prices = Prices(restart_s=10.0, lost_steps=0.0, hedge=False)
    # 2 x slower: half a second is lost a second, so 10 s are lost after 20 s.
    assert not evicted(decide(verdict(), situation(slow_s=19.9), prices))
    assert evicted(decide(verdict(), situation(slow_s=20.1), prices))


def test_a_job_that_is_nearly_done_is_left_alone() -> None:
    prices = Prices(restart_s=10.0, lost_steps=0.0, hedge=False)
    assert decide(verdict(), situation(slow_s=100.0, remaining_s=15.0), prices).action is Action.IGNORE
    assert evicted(decide(verdict(), situation(slow_s=100.0, remaining_s=25.0), prices))


def test_without_a_spare_a_job_shrinks_only_when_that_loses_less() -> None:
    prices = Prices(restart_s=1.0, lost_steps=0.0, hedge=False)
    rigid = situation(slow_s=1000.0, spare_nodes=0)
    assert decide(verdict(slowdown=4.0), rigid, prices).action is Action.IGNORE
    elastic = replace(rigid, min_nodes=4)
    assert evicted(decide(verdict(slowdown=4.0), elastic, prices))
    # One node of eight missing loses 12.5 %: more than a rank that is 1.1 x slower.
    assert decide(verdict(slowdown=1.1), elastic, prices).action is Action.IGNORE


def test_a_loop_that_reads_its_share_is_rebalanced_first() -> None:
    decision = decide(verdict(), situation(slow_s=1.0, can_rebalance=True), Prices(hedge=False))
    assert decision.action is Action.REBALANCE
    link = replace(verdict(FaultKind.LINK_SLOW), culprit=Culprit(link=(0, 1), nodes=("a", "b")))
    assert decide(link, situation(slow_s=1.0, can_rebalance=True), Prices(hedge=False)).action is Action.IGNORE


def test_the_jobs_own_step_time_outweighs_the_verdicts_slowdown() -> None:
    assert job_slowdown(verdict(slowdown=8.0), situation(step_s=1.2, healthy_step_s=1.0)) == pytest.approx(1.2)
    assert job_slowdown(verdict(slowdown=8.0), situation(step_s=1.2)) == 8.0
    assert decide(verdict(slowdown=8.0), situation(step_s=1.01, healthy_step_s=1.0, slow_s=1e6)).action is Action.IGNORE


def test_shares_follow_speed_and_change_nothing_without_a_slow_rank() -> None:
    assert batch_shares(4, {}) == (1.0, 1.0, 1.0, 1.0)
    shares = batch_shares(4, {2: 3.0})
    assert sum(shares) == pytest.approx(4.0)
    assert shares[0] / shares[2] == pytest.approx(3.0)
    # Every rank now takes equally long: share over speed is the same, and that is the rebalanced slowdown.
    assert shares[2] * 3.0 == pytest.approx(shares[0])
    assert shares[0] == pytest.approx(rebalanced_slowdown(3.0, 1, 4))


def test_asking_twice_gives_the_same_threshold() -> None:
    first, second = (decide(verdict(), situation(slow_s=1.0)) for _ in range(2))
    assert first == second
    assert 0 <= first.threshold_s <= math.log(2) * first.price_s
