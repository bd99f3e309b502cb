"""The fast planner: buys slices at given prices, demand by demand, and packs them; tries several prices and keeps the best.

With the dual prices of `bound.py` this is price-directed rounding; with guessed prices it needs no solver at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from actors.mig.planner.bound import PRICE_UNIT, cover
from actors.mig.planner.errors import PlannerError
from actors.mig.planner.packing import Cuts, Purchase, covered, pack, prune
from actors.mig.planner.problem import Load, Problem, SliceKind


def plan_by_prices(problem: Problem, many: Iterable[Mapping[SliceKind, int]]) -> tuple[Purchase, Cuts]:
    """The plan with the fewest GPUs over these price lists, every one also refilled (see ``_refill``).

    Raises:
        PlannerError: no plan keeps the limits on GPUs.
    """
    best: tuple[Purchase, Cuts] | None = None
    for prices in many:
        for purchase in (_buy(problem, prices), _refill(problem, prices)):
            cuts = pack(problem, _total(purchase))
            if _within(problem, cuts) and (best is None or len(cuts) < len(best[1])):
                best = purchase, cuts
    if best is None:
        limits = ", ".join(f"{count} x {gpu}" for gpu, count in problem.available.items())
        raise PlannerError(f"The fast planner found no plan within {limits}.")
    return best


def _buy(problem: Problem, prices: Mapping[SliceKind, int]) -> Purchase:
    cost = {kind: float(price) for kind, price in prices.items()}
    return [prune(load, _enough(load, cover(load, prices)[1]), cost) for load in problem.loads]


def _enough(load: Load, bought: Mapping[SliceKind, int]) -> dict[SliceKind, int]:
    """A cover in rounded integers may miss the demand by its last millionth: then one more of the smallest kind."""
    kept = dict(bought)
    while not covered(load, kept):
        kind = min(load.options, key=lambda kind: load.options[kind].throughput_per_s)
        kept[kind] = kept.get(kind, 0) + 1
    return kept


def _refill(problem: Problem, prices: Mapping[SliceKind, int]) -> Purchase:
    """Demand by demand, the dearest first, slices that fit what is already cut open are cheaper by half.

    What a GPU already in use still offers costs nothing more, so filling gaps beats the nominal price.
    """
    order = sorted(range(len(problem.loads)), key=lambda index: -cover(problem.loads[index], prices)[0])
    purchase: list[dict[SliceKind, int]] = [{} for _ in problem.loads]
    total: Counter[SliceKind] = Counter()
    for index in order:
        load = problem.loads[index]
        base = len(pack(problem, total))
        choices = []
        for discounted in (None, *load.options):
            tried = dict(prices)
            if discounted is not None:
                tried[discounted] = tried[discounted] // 2
            cost = {kind: float(price) for kind, price in prices.items()}
            bought = prune(load, _enough(load, cover(load, tried)[1]), cost)
            cuts = pack(problem, total + Counter(bought))
            price = sum(prices[kind] * count for kind, count in bought.items())
            choices.append((len(cuts) - base, price / PRICE_UNIT, sorted(bought.items())))
        purchase[index] = dict(min(choices)[2])
        total += Counter(purchase[index])
    return purchase


def _total(purchase: Purchase) -> Counter[SliceKind]:
    total: Counter[SliceKind] = Counter()
    for bought in purchase:
        total.update(bought)
    return total


def _within(problem: Problem, cuts: Cuts) -> bool:
    used = Counter(gpu for gpu, _ in cuts)
    return all(used[gpu] <= count for gpu, count in problem.available.items())
