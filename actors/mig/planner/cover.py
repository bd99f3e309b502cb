"""The cheapest slices that serve one demand when slices have prices: an integer covering problem, solved exactly.

With T_s the throughput of a slice kind and p_s its price:  min sum_s p_s n_s  subject to  sum_s T_s n_s >= R,  n_s integer.
It is the heart of both the heuristic (which slices to buy) and the bound (what a demand must pay at least).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Kind = TypeVar("Kind")


def cheapest_cover(need: int, sizes: Mapping[Kind, int], prices: Mapping[Kind, int]) -> tuple[int, dict[Kind, int]]:
    """Cost and counts of a cheapest cover. Integers throughout: the answer is exact.

    Args:
        need: what the sizes must add up to at least, positive.
        sizes: what one piece of a kind brings, positive.
        prices: what it costs, not negative.
    """
    kinds = sorted(sizes, key=lambda kind: (prices[kind] / sizes[kind], -sizes[kind]))
    # A kind is useless when another brings at least as much for no more.
    kept = [
        kind
        for index, kind in enumerate(kinds)
        if not any(
            sizes[other] >= sizes[kind]
            and prices[other] <= prices[kind]
            and (sizes[other], -prices[other], -position) > (sizes[kind], -prices[kind], -index)
            for position, other in enumerate(kinds)
            if other is not kind
        )
    ]
    size = [sizes[kind] for kind in kept]
    price = [prices[kind] for kind in kept]
    last = len(kept) - 1
    best_cost: int | None = None
    best: list[int] = []
    counts = [0] * len(kept)

    def search(index: int, left: int, cost: int) -> None:
        nonlocal best_cost, best
        if left <= 0:
            if best_cost is None or cost < best_cost:
                best_cost, best = cost, counts.copy()
            return
        # All that is left at the best ratio is the least that can follow; kinds come in the order of the ratio.
        if best_cost is not None and (cost - best_cost) * size[index] + left * price[index] > -size[index]:
            return
        most = -(-left // size[index])
        if index == last:
            counts[index] = most
            search(index, left - most * size[index], cost + most * price[index])
            counts[index] = 0
            return
        for count in range(most, -1, -1):
            counts[index] = count
            after = left - count * size[index]
            if after <= 0:
                search(index, after, cost + count * price[index])
            else:
                search(index + 1, after, cost + count * price[index])
            counts[index] = 0

    search(0, need, 0)
    if best_cost is None:
        raise ValueError("No kind of slice serves the demand.")
    return best_cost, {kind: count for kind, count in zip(kept, best, strict=True) if count}
