"""Ignore, rebalance or evict: the policy of recovery as a pure function of expected cost. No Ray, no torch.

All costs are seconds of the whole job (rank-seconds over ranks, because in synchronous training every rank waits for the
slowest). Living with a slow part is renting: it loses ``1 - 1/slowdown`` seconds a second for as long as the fault lasts,
which nobody knows. Eviction is buying: it costs a restart once. So this is ski rental (Karlin et al. 1988): evict when what
was lost reaches a threshold ``a`` times the price. ``a = 1`` never costs more than twice what a clairvoyant pays. The hedged
form (default) draws ``a`` with F(a) = e^a - 1 on [0, ln 2], the earliest distribution whose expected cost stays within twice
the clairvoyant's for every duration of the fault; for faults that do not go away it is within 2 ln 2 = 1.39.

A hang is a slowdown without end whose rent is the whole job: it is evicted as soon as the verdict is trusted.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from enum import StrEnum

from actors.c4.diagnosis.verdict import FaultClass, FaultKind, Verdict


class Action(StrEnum):
    IGNORE = "ignore"
    """Go on and watch."""
    REBALANCE = "rebalance"
    """Give the slow ranks a smaller share of the global batch (a hint that the loop may read)."""
    EVICT = "evict"
    """Kill this generation, quarantine the culprit's nodes, restart elsewhere."""


@dataclass(frozen=True)
class Prices:
    """What actions cost, measured or set."""

    restart_s: float = 8.0
    """From the order to the first new step."""
    lost_steps: float = 1.0
    """Steps that a restart repeats."""
    spare_s: float = 0.0
    """What taking a spare node out of the pool is worth, in seconds of the job."""
    rebalance_s: float = 0.0
    """What changing the shares costs once (loops that must rebuild their loader)."""
    min_confidence: float = 0.5
    """A verdict below this is never acted on."""
    worth_slowdown: float = 1.05
    """A job slower than its healthy self by less than this factor is left alone: it is noise."""
    hedge: bool = True
    """Draw the threshold (see the module); false takes a = 1."""


@dataclass(frozen=True)
class Situation:
    """What the master knows of the job when a fault was named."""

    step_s: float
    """Median step now."""
    running_s: float
    """Since the generation began."""
    slow_s: float
    """Since the onset of the fault."""
    spare_nodes: int
    """Live nodes of the cluster outside the generation, not quarantined, with room for a node's workers."""
    nodes: int
    """Of the generation."""
    evictions: int = 0
    """So far in this run."""
    healthy_step_s: float = 0.0
    """Median step before the fault; 0 when unknown: then the verdict's own slowdown stands for the job's."""
    min_nodes: int = 0
    """Fewest nodes that an elastic job runs on; 0: the job cannot shrink."""
    world_size: int = 0
    """Ranks; 0 when unknown: then a node counts as a rank."""
    remaining_s: float = math.inf
    """Expected time to the end of the job without the fault."""
    can_rebalance: bool = False
    """The loop has read its batch share at least once."""


@dataclass(frozen=True)
class Decision:
    """What to do, why, and the numbers behind it (seconds of the job)."""

    action: Action
    reason: str
    quarantine: bool = False
    """The culprit's nodes are at fault, not the program: keep the next generation off them."""
    lost_s: float = 0.0
    """Lost to the fault so far."""
    price_s: float = 0.0
    """Of eviction, over the probability that the verdict is right."""
    threshold_s: float = math.inf
    """Evict when ``lost_s`` (beyond what is lost after eviction, too) reaches this."""


DEFAULT_PRICES = Prices()

_PROGRAM_FAULTS = frozenset({FaultKind.MISMATCHED_COLLECTIVE})
"""Ranks disagree on what to call: the program's doing; another node would not help."""


def decide(
    verdict: Verdict, situation: Situation, prices: Prices = DEFAULT_PRICES, *, draw: float | None = None
) -> Decision:
    """What to do about a verdict now; called again while the fault lasts.

    Args:
        verdict: the named fault.
        situation: of the job at this moment.
        prices: of the actions.
        draw: uniform in [0, 1), fixes the hedged threshold; None derives it from the culprit, so that repeated calls agree.
    """
    if verdict.confidence < prices.min_confidence:
        return Decision(
            Action.IGNORE, f"confidence {verdict.confidence:.2f} is below {prices.min_confidence:.2f}: wait for more"
        )
    price_s = restart_price_s(situation, prices) / verdict.confidence
    if verdict.fault_class in (FaultClass.COMMUNICATION_HANG, FaultClass.NON_COMMUNICATION_HANG):
        return _hang(verdict, situation, price_s)
    return _slow(verdict, situation, prices, price_s, draw)


def restart_price_s(situation: Situation, prices: Prices = DEFAULT_PRICES) -> float:
    """Seconds of the job that one eviction costs: restart, repeated steps, spare."""
    step_s = situation.healthy_step_s or situation.step_s
    return prices.restart_s + prices.lost_steps * step_s + (prices.spare_s if situation.spare_nodes else 0.0)


def job_slowdown(verdict: Verdict, situation: Situation) -> float:
    """How much longer a step takes than without the fault, at least 1."""
    if situation.healthy_step_s > 0 and situation.step_s > 0:
        return max(1.0, situation.step_s / situation.healthy_step_s)
    return max(1.0, verdict.slowdown)


def rebalanced_slowdown(slowdown: float, ranks: int, world_size: int) -> float:
    """Slowdown of the job when ``ranks`` slow ranks of ``world_size`` do 1/slowdown of a rank's work: capacity decides."""
    return world_size / (world_size - ranks + ranks / slowdown)


def batch_shares(world_size: int, slowdown_of_rank: dict[int, float]) -> tuple[float, ...]:
    """Share of the global batch of each rank, in units of an even share (they sum to ``world_size``), proportional to speed.

    Without slow ranks every share is exactly 1.0, so that a loop that multiplies by it computes the same bits.
    """
    if all(slowdown <= 1.0 for slowdown in slowdown_of_rank.values()):
        return (1.0,) * world_size
    speeds = [1.0 / max(1.0, slowdown_of_rank.get(rank, 1.0)) for rank in range(world_size)]
    total = sum(speeds)
    return tuple(world_size * speed / total for speed in speeds)


def hedged_threshold(draw: float) -> float:
    """Threshold in units of the price for a uniform draw in [0, 1): inverse of F(a) = e^a - 1."""
    return math.log1p(draw)


def _hang(verdict: Verdict, situation: Situation, price_s: float) -> Decision:
    program = verdict.kind in _PROGRAM_FAULTS
    where = (
        "the program, not a node, is at fault" if program else f"keep off {', '.join(verdict.culprit.nodes) or 'it'}"
    )
    return Decision(
        Action.EVICT,
        f"{verdict.kind}: the job stands still and will not go on by itself; restart ({price_s:.1f} s), {where}",
        quarantine=not program,
        lost_s=situation.slow_s,
        price_s=price_s,
        threshold_s=0.0,
    )


def _slow(verdict: Verdict, situation: Situation, prices: Prices, price_s: float, draw: float | None) -> Decision:
    slowdown = job_slowdown(verdict, situation)
    rent = 1.0 - 1.0 / slowdown
    lost_s = rent * situation.slow_s
    if slowdown < prices.worth_slowdown:
        return Decision(Action.IGNORE, f"the job is only {slowdown:.2f} x slower", lost_s=lost_s, price_s=price_s)

    stay, stay_rent = Action.IGNORE, rent
    if _may_rebalance(verdict, situation):
        world_size = situation.world_size or situation.nodes
        ranks = max(1, len(verdict.culprit.ranks))
        rebalanced = 1.0 - 1.0 / rebalanced_slowdown(slowdown, ranks, world_size)
        if rebalanced < rent and lost_s >= prices.rebalance_s:
            stay, stay_rent = Action.REBALANCE, rebalanced

    after_rent = _rent_after_eviction(verdict, situation)
    if after_rent is None:
        return Decision(
            stay, f"{slowdown:.2f} x slower, but no node to move to: living with it", lost_s=lost_s, price_s=price_s
        )
    saved_rate = stay_rent - after_rent
    if saved_rate <= 0:
        return Decision(
            stay,
            f"without the node the job would lose {after_rent:.0%}, with it {stay_rent:.0%}",
            lost_s=lost_s,
            price_s=price_s,
        )
    if saved_rate * situation.remaining_s < price_s:
        return Decision(
            stay,
            f"eviction costs {price_s:.1f} s, the rest of the job loses at most {saved_rate * situation.remaining_s:.1f} s",
            lost_s=lost_s,
            price_s=price_s,
        )
    factor = hedged_threshold(_draw(verdict, situation) if draw is None else draw) if prices.hedge else 1.0
    threshold_s = factor * price_s
    # While it was rebalanced or shared with the state after eviction, only the difference counts.
    excess_s = saved_rate * situation.slow_s
    if excess_s < threshold_s:
        return Decision(
            stay,
            f"{slowdown:.2f} x slower; {excess_s:.1f} s lost, eviction pays from {threshold_s:.1f} s",
            lost_s=lost_s,
            price_s=price_s,
            threshold_s=threshold_s,
        )
    return Decision(
        Action.EVICT,
        f"{slowdown:.2f} x slower for {situation.slow_s:.1f} s: {excess_s:.1f} s lost, a restart costs {price_s:.1f} s",
        quarantine=True,
        lost_s=lost_s,
        price_s=price_s,
        threshold_s=threshold_s,
    )


def _may_rebalance(verdict: Verdict, situation: Situation) -> bool:
    return situation.can_rebalance and verdict.kind is FaultKind.WORK_SLOW


def _rent_after_eviction(verdict: Verdict, situation: Situation) -> float | None:
    """Seconds lost a second without the culprit's nodes: none with spares, capacity when shrunk, None when impossible."""
    evicted = max(1, len(set(verdict.culprit.nodes)))
    missing = evicted - situation.spare_nodes
    if missing <= 0:
        return 0.0
    if situation.min_nodes and situation.nodes - missing >= situation.min_nodes:
        return missing / situation.nodes
    return None


def _draw(verdict: Verdict, situation: Situation) -> float:
    """Uniform in [0, 1) and the same for the same fault, so that asking twice does not draw twice."""
    text = f"{verdict.kind}|{verdict.culprit}|{situation.evictions}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
